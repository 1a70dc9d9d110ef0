"""The public face: what ``hfq`` exports, and what importing it costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hfq

# The contract: these names stay. More may come.
CONTRACT = {
    "HfqConfig",
    "evaluate",
    "explain",
    "doctor",
    "HfqError",
    "CheckpointError",
    "ConfigError",
    "KernelError",
    "UnknownNameError",
    "VersionError",
    "WeightError",
    "__version__",
}


def run(program: str) -> str:
    """Run a program in a fresh interpreter that sees this hfq; its output."""
    setup = f"import sys; sys.path.insert(0, {str(Path(hfq.__file__).parent.parent)!r})\n"
    result = subprocess.run(
        [sys.executable, "-c", setup + program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_contract_is_exported() -> None:
    assert set(hfq.__all__) >= CONTRACT
    assert len(set(hfq.__all__)) == len(hfq.__all__)


@pytest.mark.parametrize("name", hfq.__all__)
def test_every_exported_name_exists_and_is_described(name: str) -> None:
    value = getattr(hfq, name)
    assert name in dir(hfq)
    assert isinstance(value, str) or value.__doc__
    if isinstance(value, type) and issubclass(value, Exception):
        assert issubclass(value, hfq.HfqError)


def test_type_checkers_see_what_is_exported() -> None:
    """The lazy names are written down twice, for the interpreter and for type checkers."""
    tree = ast.parse(Path(hfq.__file__).read_text())
    declared: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for line in node.body:
                assert isinstance(line, ast.ImportFrom)
                declared |= {str(alias.asname): str(line.module) for alias in line.names}
    assert declared == hfq._LAZY


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'hfq' has no attribute 'nonsense'"):
        hfq.nonsense  # noqa: B018


def test_the_version_is_a_release_number() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+([ab]|rc)?\d*(\.dev\d+)?", hfq.__version__)


def test_the_package_is_typed() -> None:
    assert (Path(hfq.__file__).parent / "py.typed").is_file()


def test_importing_loads_nothing_heavy() -> None:
    loaded = run("import hfq\nprint(*sorted(sys.modules))").split()
    assert "hfq" in loaded
    assert not {"torch", "transformers", "peft", "numpy", "huggingface_hub"} & set(loaded)
    assert not {"hfq.kernels", "hfq.kernels.ops", "hfq.kernels.native"} & set(loaded)


def test_importing_is_cheap_and_touches_no_device() -> None:
    """Beyond torch and Transformers it takes less than 0.3 seconds; the best of five, as machines are busy."""
    program = """
import time
import torch
import transformers

def refuse(*arguments, **named):
    raise SystemExit("import hfq asked for a device")

for name in ("_lazy_init", "init", "is_available", "device_count", "current_device", "get_device_capability"):
    setattr(torch.cuda, name, refuse)

seconds = []
for _ in range(5):
    for name in [name for name in sys.modules if name.split(".")[0] == "hfq"]:
        del sys.modules[name]
    start = time.perf_counter()
    import hfq
    seconds.append(time.perf_counter() - start)
print(min(seconds))
"""
    assert float(run(program)) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("first", ["hfq", "transformers.quantizers.auto"])
def test_transformers_knows_hfq_whoever_comes_first(first: str) -> None:
    other = "hfq" if first != "hfq" else "transformers.quantizers.auto"
    output = run(f"""
import {first}
import {other}
import transformers.quantizers.auto as auto
print(auto.AUTO_QUANTIZATION_CONFIG_MAPPING["hfq"].__name__, auto.AUTO_QUANTIZER_MAPPING["hfq"].__name__)
""")
    assert output.split() == ["HfqConfig", "HfqQuantizer"]
