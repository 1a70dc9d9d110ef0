"""What this machine has: processor features, memory, read bandwidth."""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path

import torch

from ..kernels import huge_pages

__all__ = [
    "available_memory",
    "cpu_count",
    "cpu_features",
    "cpu_name",
    "memory",
    "read_bandwidth",
    "resident_memory",
]

# Features that quantized kernels can use, as torch names them, from x86-64 and Arm.
_FEATURES = (
    "avx2 fma3 f16c avx_vnni avx512_f avx512_bw avx512_vnni avx512_bf16 amx_int8 amx_bf16 "
    "neon dotprod i8mm sve"
)


def cpu_features() -> tuple[str, ...]:
    """Instruction sets of this processor among those that matter here; empty where torch cannot tell."""
    query = getattr(torch.cpu, "get_capabilities", None)
    if query is None:  # torch 2.11
        return (torch.backends.cpu.get_cpu_capability(),)
    found = query()
    return tuple(feature for feature in _FEATURES.split() if found.get(feature))


def cpu_name() -> str:
    """The processor as the system names it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_count() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> tuple[int, int] | None:
    """(total, available) bytes, the limit of a container respected; None where the system cannot tell."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    lines = (line.partition(":") for line in info.read_text().splitlines())
    sizes = {key: int(value.split()[0]) * 1024 for key, _, value in lines}  # kB
    total, available = sizes["MemTotal"], sizes["MemAvailable"]
    limit = _container_limit()
    if limit is None:
        return total, available
    return min(total, limit), min(available, max(0, limit - _container_use()))


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process can still allocate there, its own limits respected; None where nobody can tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    known = memory() if device.type == "cpu" else None
    return None if known is None else min(known[1], *_own_limits())


def _own_limits() -> list[int]:
    """What is left below ``ulimit -d`` (private memory) and ``ulimit -v`` (address space)."""
    import resource  # Unix

    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    sizes = {
        words[0]: int(words[1]) * 1024 for words in lines if words[0] in ("VmData:", "VmSize:")
    }
    left = [sys.maxsize]
    for limit, key in ((resource.RLIMIT_DATA, "VmData:"), (resource.RLIMIT_AS, "VmSize:")):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            left.append(max(0, soft - sizes[key]))
    return left


def resident_memory() -> int:
    """Bytes of this process that are in memory; 0 where the system cannot tell."""
    sizes = Path("/proc/self/statm")
    return int(sizes.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if sizes.is_file() else 0


def read_bandwidth(size: int = 256 << 20) -> float:
    """Bytes per second that all threads together read, the best of 5 sums over `size` bytes in huge pages."""
    data = huge_pages.empty((size // 4,), torch.float32).fill_(1)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - start)
    return size / min(seconds)


def _container_limit() -> int | None:
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return None if text == "max" else int(text)


def _container_use() -> int:
    """Bytes in use inside of the container, without cached files, which make room when asked."""
    folder = Path("/sys/fs/cgroup")
    current, stat = folder / "memory.current", folder / "memory.stat"
    if not current.is_file():
        return 0
    lines = (line.split() for line in stat.read_text().splitlines()) if stat.is_file() else ()
    cached = sum(int(size) for key, size in lines if key in ("inactive_file", "active_file"))
    return max(0, int(current.read_text()) - cached)
