"""Random inputs, and one test per registered format and method.

A test's numbers follow from its name and ``HFQ_TEST_SEED`` (0 by default), which the header of each run shows.

A test marked ``every_spec`` that takes ``format_name`` and ``spec`` runs for every registered format with every spec
that it accepts out of `SETTINGS`. One marked ``every_recipe`` that takes ``method`` and ``options`` too runs for every
method that can produce that spec.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

import hfq
from hfq.algorithms import ALGORITHMS
from hfq.core.errors import ConfigError
from hfq.core.spec import QuantSpec
from hfq.formats import FORMATS

SEED = int(os.environ.get("HFQ_TEST_SEED", "0"))

# Processes that tests start import the hfq under test, and not one that lies in the current folder.
os.environ["PYTHONSAFEPATH"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(hfq.__file__).parents[1]), os.environ.get("PYTHONPATH")))
)

SETTINGS: dict[str, tuple[object, ...]] = {
    "bits": (None, 2, 3, 4, 5, 6, 7, 8),
    "group_size": (None, 5, -1),
    "sym": (None, False),
    "scale_dtype": (None, "float32"),
    "double_quant": (None, True),
    "activation": (
        None,
        "dynamic",
    ),  # "static" stores a scale that no weight tells: tests/formats/test_int_grouped.py
    "outliers": (None, 0.1),
}

# Methods run longer than formats.
FEWER_SETTINGS = {
    **SETTINGS,
    "bits": (None, 2, 8),
    "group_size": (5, -1),
    "scale_dtype": (None,),
    "activation": (None,),
}


def pytest_report_header() -> str:
    return f"random inputs: HFQ_TEST_SEED={SEED}"


def pytest_configure(config: pytest.Config) -> None:
    for name in ("every_spec", "every_recipe"):
        config.addinivalue_line("markers", f"{name}: see tests/conftest.py")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "spec" not in metafunc.fixturenames:
        return
    if metafunc.definition.get_closest_marker("every_recipe"):
        metafunc.parametrize(("method", "options", "format_name", "spec"), list(every_recipe()))
    elif metafunc.definition.get_closest_marker("every_spec"):
        metafunc.parametrize(("format_name", "spec"), list(every_spec(SETTINGS)))


def every_spec(settings: Mapping[str, tuple[object, ...]]) -> Iterator[Any]:
    """(format, spec) for each format and all that it can store of `settings`."""
    for name in FORMATS.names():
        specs: dict[QuantSpec, None] = {}
        for values in itertools.product(*settings.values()):
            try:
                specs[FORMATS.get(name).spec(dict(zip(settings, values, strict=True)))] = None
            except ConfigError:
                continue
        for spec in specs:
            yield pytest.param(name, spec, id=f"{name}-{_fields(spec)}")


def every_recipe() -> Iterator[Any]:
    """(method, options, format, spec) for each method, its flags off and on, and what it can produce."""
    for method in ALGORITHMS.names():
        algorithm = ALGORITHMS.get(method)
        for options, stored in itertools.product(
            _options(algorithm.options), every_spec(FEWER_SETTINGS)
        ):
            format_name, spec = stored.values
            try:
                algorithm.check(spec, options)
            except ConfigError:
                continue
            on = "".join(f"-{name}" for name, value in options.items() if value is True)
            yield pytest.param(method, options, format_name, spec, id=f"{method}{on}-{stored.id}")


def _options(defaults: Mapping[str, object]) -> Iterator[dict[str, object]]:
    """The defaults, and once more with each flag turned around."""
    yield dict(defaults)
    for name, value in defaults.items():
        if isinstance(value, bool):
            yield {**defaults, name: not value}


def _fields(spec: QuantSpec) -> str:
    return "-".join(f"{name}={value}" for name, value in vars(spec).items())


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Random numbers of this test."""
    return torch.Generator().manual_seed(SEED + zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def random_weight(generator: torch.Generator) -> Callable[..., Tensor]:
    """Normal float32 weights `[N, K]` with a standard deviation of `size`."""

    def make(rows: int, columns: int, size: float = 0.02) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * size

    return make


@pytest.fixture
def heavy_tailed_weight(generator: torch.Generator) -> Callable[..., Tensor]:
    """Float32 weights `[N, K]` with Student's t distribution, 4 degrees of freedom: a few are very large."""

    def make(rows: int, columns: int, size: float = 0.02) -> Tensor:
        normal = torch.randn(5, rows, columns, generator=generator)
        return size * normal[0] / normal[1:].square().mean(0).sqrt()

    return make


@pytest.fixture
def gate_in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`hfq.quantize` loads what it wrote in the test's process: a new one takes seconds to import everything.

    Tests marked ``real_gate`` start one, as users do.
    """
    if not request.node.get_closest_marker("real_gate"):
        from hfq.integrations import gate

        monkeypatch.setattr(gate, "_from_new_process", lambda *args: (gate.logits_of(*args), None))


@pytest.fixture
def brief_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """`hfq.plan` does each piece of work that it times once, and small: for tests that do not look at seconds."""
    from hfq.diagnose import rates

    brief = {"_SIZE": 512, "_TOKENS": 512, "_LEAST_SECONDS": 0.0, "_LEAST_TURNS": 1}
    for name, value in brief.items():
        monkeypatch.setattr(rates, name, value)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests on tiny tensors: threads would wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cuda() -> torch.device:
    """The GPU; the test is skipped where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


@pytest.fixture
def fsdp2() -> None:
    """Where `fully_shard` takes integers, which are what packed weights are."""
    if Version(torch.__version__).release < (2, 12):
        pytest.skip("fully_shard of PyTorch before 2.12 takes no integers")


@pytest.fixture
def one_process(fsdp2: None) -> Iterator[torch.distributed.DeviceMesh]:
    """The mesh of a process group that has this process only, on the CPU."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()
