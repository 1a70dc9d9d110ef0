"""`hfq.doctor`: what this installation has, what is missing or broken, and the remedy."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from packaging.version import Version

from .._version import __version__
from ..core.errors import KernelError
from ..kernels import cuda_machine, gpu_code, huge_pages, native
from ..table import format_bytes, format_table, wrapped
from . import machine
from .selftest import LARGE, LARGE_BYTES, SMALL, Size, self_test

__all__ = ["Check", "Diagnosis", "doctor"]

# Oldest releases that the code is written for; None: any.
_REQUIRED = {"torch": "2.11", "transformers": "5.17", "safetensors": None, "huggingface_hub": None}
_OPTIONAL = {"accelerate": "device_map and offloading", "peft": "adapters and QLoRA"}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of a diagnosis.

    Attributes:
        name: what was looked at.
        status: "ok"; "missing" for what works without, only slower or less; "broken" for what should work.
        found: what there is, or why there is nothing.
        remedy: what to do about it; empty where nothing is wrong.
    """

    name: str
    status: str
    found: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The checks in the order in which to read them."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is broken; what is merely missing is no fault."""
        return all(check.status != "broken" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: ``{"ok": ..., "checks": [...]}``."""
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks]}

    def table(self) -> str:
        """The checks as text, remedies below."""
        rows = [[check.name, check.status, check.found] for check in self.checks]
        remedies = [
            wrapped(f"{check.name}: {check.remedy}") for check in self.checks if check.remedy
        ]
        return "\n".join([format_table(["", "status", "found"], rows), *remedies])

    def __str__(self) -> str:
        return self.table()


def doctor(*, bandwidth: bool = False) -> Diagnosis:
    """Look at versions, processor, memory, kernels and GPUs, and multiply with packed weights on each device.

    Args:
        bandwidth: also measure how fast memory is read (takes 256 MiB and a second).
    """
    return Diagnosis(
        checks=(*_versions(), *_cpu(), *_memory(bandwidth), *_native(), *_cuda(), *_self_tests())
    )


def _versions() -> Iterator[Check]:
    yield Check(name="hfq", status="ok", found=f"{__version__}, Python {platform.python_version()}")
    for name, oldest in _REQUIRED.items():
        found = _version(name)
        if found is None:
            yield Check(name=name, status="broken", found="missing", remedy=f"pip install {name}")
        elif oldest is not None and Version(found).release < Version(oldest).release:
            remedy = f"hfq needs {oldest} or later: pip install -U {name}"
            yield Check(name=name, status="broken", found=found, remedy=remedy)
        else:
            yield Check(name=name, status="ok", found=found)
    for name, purpose in _OPTIONAL.items():
        found = _version(name)
        if found is None:
            remedy = f"needed for {purpose}: pip install {name}"
            yield Check(name=name, status="missing", found="not installed", remedy=remedy)
        else:
            yield Check(name=name, status="ok", found=found)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> Iterator[Check]:
    features = " ".join(machine.cpu_features())
    yield Check(name="processor", status="ok", found=f"{machine.cpu_name()}: {features}")
    threads, count = torch.get_num_threads(), machine.cpu_count()
    if threads < count:
        remedy = "set OMP_NUM_THREADS, or call torch.set_num_threads, to use the others"
    elif threads > count:
        remedy = f"more threads than processors slow each other down: set OMP_NUM_THREADS={count}"
    else:
        remedy = ""
    found = f"{threads} on {count} processors"
    yield Check(name="threads", status="ok", found=found, remedy=remedy)


def _memory(bandwidth: bool) -> Iterator[Check]:
    sizes = machine.memory()
    if sizes is not None:
        found = f"{format_bytes(sizes[0])}, {format_bytes(sizes[1])} available"
        yield Check(name="memory", status="ok", found=found)
    available, reason = huge_pages.available()
    if available:
        yield Check(name="huge pages", status="ok", found="available")
    else:
        remedy = "decoding works without, at about two thirds of the speed"
        yield Check(name="huge pages", status="missing", found=reason, remedy=remedy)
    if bandwidth:
        rate = machine.read_bandwidth() / 1e9
        yield Check(name="read bandwidth", status="ok", found=f"{rate:.1f} GB/s")


def _native() -> Iterator[Check]:
    status = _native_status()
    if isinstance(status, KernelError):
        remedy = f"unset {native.ISA_VARIABLE} and {native.CUDA_VARIABLE}, or set them to auto"
        yield Check(name="CPU kernels", status="broken", found=str(status), remedy=remedy)
    elif status.cpu:
        compiler = status.build.get("cpu", {}).get("compiler", "an unknown compiler")
        found = f"{status.isa} (of {', '.join(status.isas)}), built by {compiler}"
        yield Check(name="CPU kernels", status="ok", found=found)
    else:
        # A library that was built and does not load is a fault; one that was never built is only slow.
        built = status.build.get("cpu", {}).get("built", False)
        remedy = (
            "reinstall hfq for this PyTorch"
            if built
            else "the PyTorch reference runs instead, slowly"
        )
        state = "broken" if built else "missing"
        yield Check(name="CPU kernels", status=state, found=status.cpu_reason, remedy=remedy)


def _native_status() -> native.NativeStatus | KernelError:
    with _quietly():
        try:
            return native.load()
        except KernelError as error:
            return error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """What kernels warn about is said in the table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _cuda() -> Iterator[Check]:
    available, said = _cuda_is_available()
    if not available:
        why = "no CUDA device" if torch.version.cuda else f"PyTorch {torch.__version__} has no CUDA"
        found = "; ".join([why, *said, "models run on the CPU"])
        yield Check(name="CUDA", status="missing", found=found)
        return
    capabilities = set()
    for index in range(torch.cuda.device_count()):
        name, (major, minor) = (
            torch.cuda.get_device_name(index),
            torch.cuda.get_device_capability(index),
        )
        found = f"{name}, sm_{major}{minor}, CUDA {torch.version.cuda}"
        yield Check(name=f"CUDA device {index}", status="ok", found=found)
        capabilities.add((major, minor))
    status = _native_status()
    if isinstance(status, KernelError):
        return
    built = status.build.get("cuda", {})
    why_not = cuda_machine.reason() if status.cuda else None
    if why_not is not None:
        remedy = "the PyTorch reference runs instead, slowly"
        if len(capabilities) > 1:
            remedy += "; CUDA_VISIBLE_DEVICES hides GPUs from a program"
        yield Check(name="CUDA kernels", status="missing", found=why_not, remedy=remedy)
    elif status.cuda:
        archs = built.get("archs", ())
        found = "loaded; hfq's build did not leave what they were built for"
        if archs:
            found = f"built for {', '.join(archs)} by {built.get('compiler', '?')}"
        yield Check(
            name="CUDA kernels", status="ok", found=found, remedy=_late(archs, capabilities)
        )
    elif native.cuda_is_off():
        remedy = f"unset {native.CUDA_VARIABLE} to use them; the PyTorch reference is slow"
        yield Check(name="CUDA kernels", status="missing", found=status.cuda_reason, remedy=remedy)
    else:
        remedy = "the PyTorch reference runs instead, slowly"
        if built.get("built"):
            remedy = "reinstall hfq for this PyTorch and this driver"
        elif "was found" in status.cuda_reason:
            remedy += "; put nvcc on the PATH and reinstall hfq"
        state = "broken" if built.get("built") else "missing"
        yield Check(name="CUDA kernels", status=state, found=status.cuda_reason, remedy=remedy)


def _cuda_is_available() -> tuple[bool, list[str]]:
    """And what PyTorch warns of meanwhile: a driver that is too old for it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    return available, [" ".join(str(each.message).split()) for each in caught]


def _late(archs: Iterable[str], capabilities: Iterable[tuple[int, int]]) -> str:
    """What to know where the driver has to compile the kernels for a GPU; empty if it does not."""
    here = sorted(capabilities)
    late = [f"sm_{gpu[0]}{gpu[1]}" for gpu in here if not gpu_code.has_code(archs, gpu)]
    if not late:
        return ""
    # All that are here: a build for some runs on no other.
    wanted = ";".join(f"{gpu_code.architecture(gpu)}-real" for gpu in here)
    return (
        f"the driver compiles them for {', '.join(late)} when they are first used, which takes minutes once; "
        f"to spare that, reinstall hfq with CMAKE_ARGS='-DCMAKE_CUDA_ARCHITECTURES={wanted}'"
    )


def _self_tests() -> Iterator[Check]:
    """One line for each device and size, and one for each weight whose products are wrong there."""
    yield from _self_test("cpu", "cpu", SMALL)
    gpus = torch.cuda.device_count() if _cuda_is_available()[0] else 0
    for device in (f"cuda:{index}" for index in range(gpus)):
        small = list(_self_test(device, device, SMALL))
        yield from small
        if any(check.status == "broken" for check in small) or cuda_machine.reason() is not None:
            continue  # after some faults a GPU answers nothing any more; without our kernels there are no others
        name, free = f"{device}, large", torch.cuda.mem_get_info(device)[0]
        if free < LARGE_BYTES:
            found = f"not run: {format_bytes(free)} are free on the GPU, {format_bytes(LARGE_BYTES)} are needed"
            remedy = "stop what else uses the GPU, and run hfq doctor again"
            yield Check(name=f"self-test, {name}", status="missing", found=found, remedy=remedy)
            continue
        yield from _self_test(device, name, LARGE)


def _self_test(device: str, name: str, size: Size) -> Iterator[Check]:
    name, start = f"self-test, {name}", time.perf_counter()
    with _quietly():
        tested = list(self_test(torch.device(device), size=size))
    wrong = [weight for weight in tested if weight.faults]
    for weight in wrong:
        more = f" (and {len(weight.faults) - 1} more)" if len(weight.faults) > 1 else ""
        found = f"{weight.kernel}: {weight.faults[0]}{more}"
        yield Check(name=f"{name}, {weight.weight}", status="broken", found=found)
    kernels = ", ".join(dict.fromkeys(weight.kernel for weight in tested))
    found = (
        f"{len(tested) - len(wrong)} of {len(tested)} kinds of weights right "
        f"({sum(weight.count for weight in tested)} results in {time.perf_counter() - start:.1f} s; {kernels})"
    )
    status, remedy = ("broken", _wrong_results(device)) if wrong else ("ok", "")
    yield Check(name=name, status=status, found=found, remedy=remedy)


def _wrong_results(device: str) -> str:
    if device == "cpu":
        return _wrong(f"{native.ISA_VARIABLE}=generic")
    remedy = _wrong(f"{native.CUDA_VARIABLE}=off")
    if torch.cuda.get_device_capability(device) == (9, 0):
        remedy += "; HFQ_CUDA_WGMMA=0 and HFQ_CUDA_WIDE=0 leave out what was written for 9.0 alone: say whether all is right with them"
    return remedy


def _wrong(setting: str) -> str:
    return (
        f"do not use this device for quantized models, or set {setting}; report it with this table"
    )
