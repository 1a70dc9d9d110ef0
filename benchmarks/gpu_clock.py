"""Time on a GPU: CUDA events around CUDA graphs; and a stand-in for dry runs on the CPU, whose numbers mean nothing."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = [
    "Clock",
    "CpuClock",
    "CudaClock",
    "Graphed",
    "graph_of",
    "in_turns",
    "ratio",
    "replayable",
    "spread",
]

Work = Callable[[], Any]

# Replays of one measurement, at most.
_MOST_TIMES = 200


class Clock(Protocol):
    """Attributes:
    device: where the work runs.
    cache_bytes: of the last cache before memory.
    enough: seconds that a measurement should last.
    settled: seconds of work before the first of them.
    copy_bytes, square: of the copies, and K, M and N of the products, that ceilings are measured with.
    """

    device: torch.device
    cache_bytes: int
    enough: float
    settled: float
    copy_bytes: int
    square: int

    def captured(self, work: Work) -> Work:
        """The work as a CUDA graph; its tensors stay where they are."""

    def seconds(self, work: Work, times: int = 1) -> float:
        """Of one run of the work on the device."""

    def eager_seconds(self, work: Work, times: int) -> float:
        """Of one run, the time that Python and the launches take included."""

    def peak_bytes(self, work: Work) -> int:
        """Memory that is taken while the work runs, above what was there before."""

    def free_bytes(self) -> int:
        """Memory that is left."""


class CudaClock:
    enough = 1e-3
    # One token took up to 18 % longer where it was timed right after the weight was made, and less and less with each number of tokens after it.
    settled = 0.1
    copy_bytes = 1 << 30
    square = 8192

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.cache_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size

    def captured(self, work: Work) -> Work:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries take their workspaces, the allocator its blocks
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return functools.partial(_replay, graph, work)

    def seconds(self, work: Work, times: int = 1) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / times

    def eager_seconds(self, work: Work, times: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            work()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / times

    def peak_bytes(self, work: Work) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]


def _replay(graph: torch.cuda.CUDAGraph, keeps: Work) -> None:
    """`keeps` holds the tensors that the graph reads: what is freed is unmapped when the next graph is captured."""
    graph.replay()


class CpuClock:
    """All of the program but the GPU."""

    device = torch.device("cpu")
    cache_bytes = 1 << 10
    enough = settled = 0.0
    copy_bytes = 1 << 16
    square = 64

    def captured(self, work: Work) -> Work:
        work()
        return work

    def seconds(self, work: Work, times: int = 1) -> float:
        return self.eager_seconds(work, times)

    def eager_seconds(self, work: Work, times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - start) / times

    def peak_bytes(self, work: Work) -> int:
        work()
        return 0

    def free_bytes(self) -> int:
        return 1 << 34


def replayable(clock: Clock, work: Work) -> tuple[Work, str]:
    """The work as a graph, and an empty string; or the work itself, and why no graph takes it."""
    try:
        return clock.captured(work), ""
    except RuntimeError as error:
        work()  # raises where it is not the graph that is to blame
        return work, str(error).splitlines()[0]


@dataclass(frozen=True, kw_only=True)
class Graphed:
    """Attributes:
    replay: so many `calls`, each with the next copy of the weight.
    no_graph: why they are no graph; empty if they are one.
    """

    replay: Callable[[], Any]
    calls: int
    no_graph: str


def graph_of(clock: Clock, linear: Callable[[Tensor], Tensor], x: Tensor, copies: int) -> Graphed:
    """One call for each copy of the weight that `linear` goes through."""

    def calls() -> None:
        for _ in range(copies):
            linear(x)

    replay, reason = replayable(clock, calls)
    return Graphed(replay=replay, calls=copies, no_graph=reason)


def in_turns(clock: Clock, works: Sequence[Work], rounds: int) -> list[list[float]]:
    """Seconds of each work in each round; a round measures each once, so that all meet the same clocks and neighbours."""
    times = []
    for work in works:
        work()
        once = max(clock.seconds(work), 1e-7)
        times.append(min(_MOST_TIMES, max(1, math.ceil(clock.enough / once))))
    for work, count in zip(works, times, strict=True):
        passed = 0.0
        while passed * len(works) < clock.settled:
            passed += clock.seconds(work, count) * count
    taken: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for work, count, seconds in zip(works, times, taken, strict=True):
            seconds.append(clock.seconds(work, count))
    return taken


def spread(values: Sequence[float]) -> float:
    """Half of the values lie in a range of this share of their median."""
    if len(values) < 2:
        return 0.0
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as fast we are; the median over rounds."""
    return median(a / b for a, b in zip(theirs, ours, strict=True))
