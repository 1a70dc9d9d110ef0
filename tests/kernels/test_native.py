"""Loading the native libraries, choosing instruction sets, huge pages and the layout rows16."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch._subclasses.fake_tensor import FakeTensorMode

import hfq
from hfq.core.errors import KernelError
from hfq.kernels import cuda, gpu_code, huge_pages, native, ops, rows16

assert ops.LIBRARY is not None  # defines torch.ops.hfq
TORCH_LIBRARIES = Path(torch.__file__).parent / "lib"


# Runs pieces of code in processes of their own, forked from one that has imported torch, which takes seconds, and nothing
# of hfq.
_FORKS = """
import json, os, sys, traceback
import torch
for line in sys.stdin:
    code, environment, files = json.loads(line)
    child = os.fork()
    if child == 0:
        os.environ.update(environment)
        for stream, file in zip((1, 2), files):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
        failed = "hfq" in sys.modules
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            failed = True
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(failed)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("forks")
    words = [sys.executable, "-c", _FORKS]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(words, env=environment, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None

        def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
            files = [folder / name for name in ("stdout", "stderr")]
            for file in files:
                file.unlink(missing_ok=True)
            words = code, environment, [str(file) for file in files]
            print(json.dumps(words), file=process.stdin, flush=True)
            returncode = int(process.stdout.readline())
            said = [file.read_text() for file in files]
            return subprocess.CompletedProcess([], returncode, *said)

        yield run
        process.stdin.close()


@pytest.fixture
def library() -> Path:
    status = native.load()
    if not status.cpu:
        pytest.skip(f"no native CPU kernels: {status.cpu_reason}")
    return next(p for f in hfq.__path__ if (p := Path(f) / "lib" / "libhfq_cpu.so").is_file())


def test_status_is_complete() -> None:
    status = native.load()
    assert native.load() is status
    assert status.cpu == (not status.cpu_reason)
    assert status.cuda == (not status.cuda_reason)
    if status.cpu:
        assert status.isa in status.isas
        assert status.isas[-1] == "generic"
        assert set(status.isas) <= set(status.build["cpu"]["isas"])


def test_every_symbol_exists_in_this_pytorch(library: Path) -> None:
    """Our header declares PyTorch's C ABI by itself; a symbol that is gone would fail only when it is called."""
    header = Path(__file__).parents[2] / "kernels/torch-ext/torch_shim.h"
    text = re.sub(r"//.*", "", header.read_text())
    symbols = set(re.findall(r"\b((?:aoti_torch|torch)_\w+)\s*\(", text))
    assert len(symbols) > 15
    torch_cpu = ctypes.CDLL(str(TORCH_LIBRARIES / "libtorch_cpu.so"))
    since_213 = {"torch_delete_stable_ivalue", "torch_exception_get_what_without_backtrace"}
    missing = {
        s for s in symbols if "cuda" not in s or "device_type" in s if not hasattr(torch_cpu, s)
    }
    assert missing <= since_213
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    assert version < (2, 13) or not missing


def test_library_needs_pytorch_and_not_python(library: Path) -> None:
    content = library.read_bytes()
    assert b"libtorch_cpu.so" in content
    assert b"libpython" not in content
    assert b"libc10" not in content  # no C++ interface of PyTorch


def test_out_of_memory_is_said_in_pytorchs_words(library: Path, run_code: Run) -> None:
    """Programs that try again with less look for them."""
    code = """
import resource, torch
from hfq.core.bits import pack
from hfq.kernels import native, ops, rows16
native.load()
codes = rows16.to_rows16(pack(torch.zeros(16, 1024, dtype=torch.uint8), 4).unsqueeze(-1))
scales = rows16.to_rows16(torch.ones(16, 8))
index = torch.zeros(1 << 22, dtype=torch.int64)
resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
torch.ops.hfq.cpu_lookup(index, codes, scales, None, None, 4, 128, 1024, 16, torch.float32)
"""
    run = run_code(code)
    assert (
        run.returncode and "RuntimeError: hfq: no memory for a tensor of 4294967296" in run.stderr
    )
    if Version(torch.__version__).release >= (2, 13):
        assert (
            "DefaultCPUAllocator: can't allocate memory" in run.stderr.rsplit("RuntimeError", 1)[1]
        )


def test_use_isa_selects_and_restores(library: Path) -> None:
    for name in native.load().isas:
        with native.use_isa(name):
            assert ctypes.CDLL(str(library)).hfq_cpu_registered()
    with (
        pytest.raises(KernelError, match="'sse9'; this build and processor support auto, "),
        native.use_isa("sse9"),
    ):
        pass


@pytest.mark.parametrize("name", ["generic", "auto", ""])
def test_environment_variable_forces_an_isa(library: Path, name: str, run_code: Run) -> None:
    code = "from hfq.kernels import native; print(native.load().isa)"
    run = run_code(code, HFQ_CPU_ISA=name)
    assert run.stdout.strip() == ("generic" if name == "generic" else native.load().isas[0]), (
        run.stderr
    )


def test_unknown_isa_in_the_environment_is_refused(library: Path, run_code: Run) -> None:
    run = run_code("from hfq.kernels import native; native.load()", HFQ_CPU_ISA="avx1024")
    assert run.returncode != 0
    assert (
        "KernelError: the environment variable HFQ_CPU_ISA asks for the instruction set 'avx1024'"
        in run.stderr
    )


def test_cuda_kernels_can_be_left_out(library: Path, run_code: Run) -> None:
    code = "from hfq.kernels import native; print(native.load().cuda_reason)"
    run = run_code(code, HFQ_CUDA_KERNELS="off")
    assert run.stdout.strip() == "HFQ_CUDA_KERNELS=off leaves them out", run.stderr
    run = run_code(code, HFQ_CUDA_KERNELS="no")
    assert "HFQ_CUDA_KERNELS has to be auto or off, not 'no'" in run.stderr and run.returncode


@pytest.mark.parametrize("wanted", ["auto", "off"])
def test_a_gpu_without_kernels_is_told_unless_they_are_left_out(
    monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    absent = native.NativeStatus(cpu=True, cuda=False, cuda_reason="no nvcc was found")
    monkeypatch.setattr(native, "load", lambda: absent)
    monkeypatch.setenv("HFQ_CUDA_KERNELS", wanted)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert cuda.no_native_code() == "native CUDA kernels are not loaded: no nvcc was found"
    told = [str(each.message) for each in caught]
    expected = "hfq runs without its CUDA kernels, on slower PyTorch code: native CUDA kernels are not loaded: no nvcc was found"
    assert told == ([] if wanted == "off" else [f"{expected}; see hfq doctor"])


def test_native_code_on_cuda_only_where_it_runs(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's rows ask the library, too, once it is loaded; on an older GPU it launches nothing."""
    referred: list[torch.device] = []
    monkeypatch.setattr(
        ops.reference, "dequantize", lambda codes, *_: referred.append(codes.device)
    )
    for gpus, kernels, natively in (
        ([(8, 0)], True, True),
        ([(7, 5)], True, False),
        ([(9, 0), (7, 5)], True, False),
        ([], True, False),
        ([(8, 0)], False, False),
    ):
        machine(*gpus, kernels=kernels)
        with FakeTensorMode():
            codes = torch.empty(4, 8, 1, dtype=torch.uint8, device="cuda")
            scales = torch.empty(4, 1, device="cuda")
            y = ops._dequantize(codes, scales, None, None, None, 4, 16, 16, torch.bfloat16)
        assert (y is not None) == natively and len(referred) == (not natively)
        referred.clear()


def test_a_library_that_this_machine_cannot_run() -> None:
    built = ("80-real", "89-real", "90a-real", "90-virtual")
    assert gpu_code.driver_problem(13000, 12040) is not None
    for versions in ((13000, 13000), (12080, 12040), (12080, 13000), (13000, 0)):
        assert gpu_code.driver_problem(*versions) is None
    for capability in ((8, 0), (8, 6), (9, 0)):
        assert gpu_code.gpu_problem(built, capability, 12080, 12040) is None
    assert gpu_code.gpu_problem(built, (12, 0), 12080, 12080) is None
    older = gpu_code.gpu_problem(built, (12, 0), 12090, 12080)
    assert older is not None and "ARCHITECTURES=120-real" in older and "CUDA 12.8" in older
    for archs, capability in (
        (["120-real"], (9, 0)),
        (["90a-real"], (10, 0)),
        (["90a-virtual"], (12, 0)),
        (["100a-real"], (10, 3)),
        (["120-virtual"], (10, 0)),
        (built, (8, 7)),
    ):
        problem = gpu_code.gpu_problem(archs, capability, 13000, 13000)
        assert problem is not None and archs[0] in problem
    for archs in ([], ["native"], ["100f-real"], ["103"], ["100-virtual"]):
        assert gpu_code.gpu_problem(archs, (10, 3), 13000, 13000) is None


def test_import_loads_no_library(run_code: Run) -> None:
    run = run_code(
        "import hfq; from hfq.kernels import native; print('libhfq' in open('/proc/self/maps').read())"
    )
    assert run.stdout.strip() == "False", run.stderr


def test_missing_libraries_warn_once_and_say_why(run_code: Run) -> None:
    code = """
import warnings
from hfq.kernels import native
native._library_folder = lambda: None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    status = native.load(), native.load()
assert status[0] is status[1] and not status[0].cpu and not status[0].cuda
print(len(caught), caught[0].category.__name__, caught[0].message)
try:
    with native.use_isa("generic"):
        pass
except native.KernelError as error:
    print(error)
"""
    run = run_code(code)
    assert run.returncode == 0, run.stderr
    assert "1 RuntimeWarning hfq runs without its native CPU kernels" in run.stdout
    assert "install a C++ compiler" in run.stdout
    assert "cannot select the instruction set 'generic'" in run.stdout


def test_first_load_is_thread_safe(library: Path, run_code: Run) -> None:
    code = """
import threading
from hfq.kernels import native
found = []
threads = [threading.Thread(target=lambda: found.append(native.load())) for _ in range(8)]
[t.start() for t in threads], [t.join() for t in threads]
print(len(found), len(set(map(id, found))))
"""
    assert run_code(code).stdout.split() == ["8", "1"]


@pytest.mark.gpu
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (33, 130, 64), (3, 5, 257, 100), (64, 512, 128)], ids=str
)
def test_cuda_dequantize_agrees_with_the_reference(
    cuda: torch.device, generator: torch.Generator, bits: int, shape: tuple[int, ...]
) -> None:
    status = native.load()
    if not status.cuda:
        pytest.skip(f"no native CUDA kernels: {status.cuda_reason}")
    *lead, columns, group_size = shape
    groups, size = -(-columns // group_size), -(-columns * bits // 8)
    codes = torch.randint(0, 256, (*lead, size, 1), generator=generator, dtype=torch.uint8)
    g_idx = (
        torch.randperm(columns, generator=generator).div(group_size, rounding_mode="floor").int()
    )
    table = torch.randn(1 << bits, generator=generator)
    for scale_dtype in (torch.float16, torch.bfloat16, torch.float32):
        scales = torch.rand(*lead, groups, generator=generator).to(scale_dtype)
        zeros = (torch.rand(*lead, groups, generator=generator) * ((1 << bits) - 1)).to(scale_dtype)
        for extra in (
            (None, None, None),
            (zeros, None, None),
            (None, table, None),
            (zeros, None, g_idx),
        ):
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                sizes = (bits, group_size, columns, dtype)
                expected = torch.ops.hfq.dequantize(codes, scales, *extra, *sizes)
                on_gpu = [None if t is None else t.to(cuda) for t in (codes, scales, *extra)]
                y = torch.ops.hfq.cuda_dequantize_neutral(*on_gpu, *sizes)
                torch.testing.assert_close(y.cpu(), expected, rtol=0, atol=0)


@pytest.mark.gpu
def test_cuda_dequantize_refuses_bad_arguments(cuda: torch.device) -> None:
    if not native.load().cuda:
        pytest.skip(f"no native CUDA kernels: {native.load().cuda_reason}")
    codes = torch.zeros(4, 32, 1, dtype=torch.uint8, device=cuda)
    scales = torch.ones(4, 2, device=cuda)

    def run(codes: torch.Tensor, scales: torch.Tensor, *sizes: object) -> None:
        torch.ops.hfq.cuda_dequantize_neutral(
            codes, scales, None, None, None, *sizes, torch.float16
        )

    run(codes, scales, 4, 32, 64)
    with pytest.raises(RuntimeError, match="bits must be 1 to 8"):
        run(codes, scales, 9, 32, 64)
    with pytest.raises(RuntimeError, match="qweight must be uint8 of shape"):
        run(codes, scales, 4, 32, 66)
    with pytest.raises(RuntimeError, match="groups per row"):
        run(codes, scales, 4, 16, 64)
    with pytest.raises(RuntimeError, match="scales must be on the device"):
        run(codes, scales.cpu(), 4, 32, 64)
    g_idx, table = torch.zeros(64, dtype=torch.int32), torch.zeros(16)
    for name, extra in (("codebook", (table, None)), ("g_idx", (None, g_idx))):
        with pytest.raises(RuntimeError, match=f"{name} must be on the device of qweight"):
            torch.ops.hfq.cuda_dequantize_neutral(
                codes, scales, None, *extra, 4, 32, 64, torch.float16
            )


# ---- huge pages


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32])
def test_huge_page_tensors(dtype: torch.dtype) -> None:
    large = huge_pages.empty((3, huge_pages.HUGE_PAGE), dtype)
    assert large.shape == (3, huge_pages.HUGE_PAGE)
    assert large.dtype == dtype
    assert large.is_contiguous()
    if huge_pages.available()[0]:
        assert large.data_ptr() % huge_pages.HUGE_PAGE == 0
    large.fill_(1)
    assert large.sum(dtype=torch.float64) == large.numel()


def test_huge_pages_are_really_there() -> None:
    available, reason = huge_pages.available()
    smaps = Path("/proc/self/smaps")
    if not available or not smaps.exists():
        pytest.skip(reason or "no /proc/self/smaps")
    tensor = huge_pages.empty((64 << 20,), torch.uint8).fill_(1)
    inside, huge = False, 0
    for line in smaps.read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = _inside(line, tensor.data_ptr())
        elif inside and line.startswith("AnonHugePages:"):
            huge += int(line.split()[1])
    # In kB. Not all: memory may be in pieces.
    assert huge >= 2048


def test_small_and_empty_tensors_are_ordinary() -> None:
    assert huge_pages.empty((0, 4), torch.uint8).shape == (0, 4)
    assert huge_pages.empty((), torch.float32).shape == ()
    assert huge_pages.empty((5, 7), torch.float16).shape == (5, 7)


def test_memory_is_returned_with_the_tensor() -> None:
    available, reason = huge_pages.available()
    if not available:
        pytest.skip(reason)
    maps = Path("/proc/self/maps")
    tensor = huge_pages.empty((64 << 20,), torch.uint8)
    view, address = tensor[10:20], f"{tensor.data_ptr():x}"
    start = next(line for line in maps.read_text().splitlines() if _inside(line, tensor.data_ptr()))
    del tensor
    view.fill_(3)  # a view keeps the memory alive
    assert view.sum() == 30
    del view
    assert start.split()[0] not in maps.read_text(), address


def _inside(line: str, address: int) -> bool:
    low, high = (int(part, 16) for part in line.split()[0].split("-"))
    return low <= address < high


# ---- layout rows16


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize(
    ("rows", "size", "groups"), [(1, 1, 1), (16, 8, 2), (17, 9, 3), (33, 130, 5)]
)
def test_rows16_round_trip(
    generator: torch.Generator, lead: tuple[int, ...], rows: int, size: int, groups: int
) -> None:
    codes = torch.randint(0, 256, (*lead, rows, size, 1), generator=generator, dtype=torch.uint8)
    lines = rows16.to_rows16(codes)
    blocks, words = -(-rows // 16), -(-size // 4)
    assert lines.shape == (*lead, blocks, words, 16, 4)
    assert lines.is_contiguous()
    assert torch.equal(rows16.from_rows16(lines, codes.shape), codes)
    assert lines.sum(dtype=torch.int64) == codes.sum(dtype=torch.int64)  # padding is zero
    n, byte = rows - 1, size - 1
    assert torch.equal(lines[..., n // 16, byte // 4, n % 16, byte % 4], codes[..., n, byte, 0])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        scales = torch.randn(*lead, rows, groups, generator=generator).to(dtype)
        lanes = rows16.to_rows16(scales)
        assert lanes.shape == (*lead, blocks, groups, 16)
        assert lanes.is_contiguous()
        assert torch.equal(rows16.from_rows16(lanes, scales.shape), scales)


def test_rows16_of_unaligned_codes(generator: torch.Generator) -> None:
    storage = torch.randint(0, 256, (32 * 8 + 1,), generator=generator, dtype=torch.uint8)
    codes = storage[1:].view(32, 8, 1)
    assert torch.equal(rows16.from_rows16(rows16.to_rows16(codes), codes.shape), codes)


def test_rows16_on_the_meta_device() -> None:
    assert rows16.to_rows16(torch.empty(17, 9, 1, dtype=torch.uint8, device="meta")).shape == (
        2,
        3,
        16,
        4,
    )
