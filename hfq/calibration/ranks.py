"""Several processes that calibrate one model together: who does what, sums over all, and failing together.

Each process (a *rank* of torch.distributed) runs a run of neighbouring sequences through each block; the sums of all are
added, so that every process has the same statistics, and each chooses codes for some of the weights. A process that
stops at an error must not leave the others waiting for it. So work and exchange alternate: work stands inside of
`Ranks.together`, which ends with telling all others how it went; exchanges stand outside of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

from torch import Tensor, distributed

from ..core.errors import HfqError

__all__ = ["ALONE", "ProcessError", "Ranks", "process_group"]

T = TypeVar("T")
R = TypeVar("R")

# For all processes to arrive at the first exchange.
_ARRIVAL = timedelta(minutes=10)

# For one to wait for another at any later one. Whoever ends breaks the connection, which is noticed at once.
_PATIENCE = timedelta(days=7)


class ProcessError(HfqError, RuntimeError):
    """Another process of the group failed, ended or never came."""


class Ranks:
    """This process among those that work together.

    Attributes:
        rank: its number.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank, self.size, self._group = rank, size, group

    @property
    def first(self) -> bool:
        """Whether this process writes and talks."""
        return self.rank == 0

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share: neighbours, so that all shares one after the other are the whole."""
        each, more = divmod(len(items), self.size)
        start = self.rank * each + min(self.rank, more)
        return items[start : start + each + (self.rank < more)]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work without any exchange; an exception in one process is raised in all, when all have come to its end.

        Raises:
            HfqError: another process's, with its number; a ProcessError where it was none of hfq's.
        """
        failure: tuple[type[HfqError], str] | None = None
        try:
            yield
        except Exception as error:
            kind = type(error) if isinstance(error, HfqError) else ProcessError
            failure = kind, str(error) if isinstance(error, HfqError) else repr(error)
            with suppress(ProcessError):
                self.gather(failure)
            raise
        for rank, other in enumerate(self.gather(failure)):
            if other is not None:
                kind, message = other
                raise kind(f"process {rank} of {self.size}: {message}")

    # ---- exchanges: every process has to come to each of them

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank. Values are pickled."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _connected():
            distributed.all_gather_object(found, value, group=self._group)
        return found

    def from_rank(self, source: int, value: T) -> T:
        """What process `source` has; the others' values do not matter. Values are pickled."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        with _connected():
            distributed.broadcast_object_list(box, src=source, group=self._group)
        found: T = box[0]
        return found

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes of it."""
        made: Any = None
        with self.together():
            if self.first:
                made = make()
        found: T = self.from_rank(0, made)
        return found

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum over all processes: the same bits everywhere."""
        if self.size == 1:
            return
        total = tensor.cpu().contiguous()
        with _connected():
            distributed.all_reduce(total, group=self._group)
        tensor.copy_(total)

    def divided(self, costs: Sequence[float], work: Callable[[int], R]) -> Iterator[R]:
        """``work(0), work(1), ...``: each process does some of it, balanced by cost, and all get all results.

        Results are pickled: tensors must be on the CPU where there is more than one process.
        """
        if self.size == 1:
            yield from map(work, range(len(costs)))
            return
        owners = _owners(costs, self.size)
        done: dict[int, R] = {}
        with self.together():
            done |= {i: work(i) for i, owner in enumerate(owners) if owner == self.rank}
        for index, owner in enumerate(owners):
            yield self.from_rank(owner, done.pop(index, None))  # type: ignore[misc]


ALONE = Ranks()


@contextmanager
def process_group() -> Iterator[Ranks]:
    """All processes of torch.distributed's initialised group; `ALONE` where there is none.

    Raises:
        ProcessError: not all of them come here.
    """
    ready = distributed.is_available() and distributed.is_initialized()
    if not ready or distributed.get_world_size() == 1:
        yield ALONE
        return
    # Of their own: the caller's backend may move GPU memory only, and may give up after minutes.
    try:
        arrival = distributed.new_group(backend="gloo", timeout=_ARRIVAL)
        distributed.barrier(group=arrival)
        distributed.destroy_process_group(arrival)
    except RuntimeError as error:
        raise ProcessError(
            f"hfq.quantize must be called by all {distributed.get_world_size()} processes of the initialised process "
            f"group, and some did not come within {_ARRIVAL}: call it in all of them, or before "
            "torch.distributed.init_process_group"
        ) from error
    group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    ranks = Ranks(distributed.get_rank(), distributed.get_world_size(), group)
    yield ranks
    # Not where it failed: the others may be gone.
    distributed.destroy_process_group(group)


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(
            "another process of the group ended: its own message says why. Finished blocks are kept: make the same call "
            f"again to go on ({error})"
        ) from error


def _owners(costs: Sequence[float], size: int) -> list[int]:
    """Who does what: the largest first, each to whom has the least."""
    loads, owners = [0.0] * size, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner = min(range(size), key=loads.__getitem__)
        owners[index] = owner
        loads[owner] += costs[index]
    return owners
