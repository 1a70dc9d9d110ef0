"""What weights read: second moments of the inputs of modules, taken while a block runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.errors import CalibrationError
from ..core.statistics import InputStatistics
from ..kernels.moments import SecondMoment
from .ranks import Ranks

__all__ = ["Capture", "EverythingRead", "RowSample", "drawn_for", "recording"]

# Tokens that are kept of what a module reads, where a method asks for them.
_SAMPLE = 256


class _Kept(NamedTuple):
    """What `RowSample` knows.

    Attributes:
        rows: tokens `[S, K]`.
        draws: their random numbers `[S]`, on the CPU.
        extreme: the token with the largest magnitude `[1, K]`; one with NaN counts as larger than all others.
        largest: the largest magnitude of each column, float32 `[K]`.
    """

    rows: Tensor
    draws: Tensor
    extreme: Tensor
    largest: Tensor


class RowSample:
    """Tokens drawn evenly from all that were added, whatever their number; memory of `size` of them.

    Each token has a random number, and those with the least are kept. The token with the largest magnitude of all is
    kept beside them: a range that was found without it would clip what a whole sequence may hang on.
    """

    def __init__(self, size: int = _SAMPLE) -> None:
        self.size = size
        self._generator = torch.Generator().manual_seed(0)
        self._kept: _Kept | None = None

    def add(self, x: Tensor, draws: Tensor | None = None) -> None:
        """Add tokens `[T, K]` with their random numbers `[T]`; None: new ones."""
        if not len(x):
            return
        if draws is None:
            draws = torch.rand(len(x), generator=self._generator)
        new = _Kept(x, draws, _most_extreme(x), x.abs().amax(0).float())
        self._join([new] if self._kept is None else [self._kept, new])

    def sum_over(self, ranks: Ranks, device: torch.device) -> None:
        """Join with the samples of the other processes; all of them come here."""
        mine = None if self._kept is None else _Kept(*(each.cpu() for each in self._kept))
        if seen := [each for each in ranks.gather(mine) if each is not None]:
            self._join(
                [
                    _Kept(e.rows.to(device), e.draws, e.extreme.to(device), e.largest.to(device))
                    for e in seen
                ]
            )

    def _join(self, parts: Sequence[_Kept]) -> None:
        rows, draws, extremes, largest = (list(each) for each in zip(*parts, strict=True))
        drawn = torch.cat(draws)
        kept = drawn.argsort(stable=True)[: self.size].sort().values
        self._kept = _Kept(
            torch.cat(rows)[kept.to(rows[0].device)],
            drawn[kept],
            _most_extreme(torch.cat(extremes)),
            torch.stack(largest).amax(0),
        )

    def rows(self) -> Tensor | None:
        """The sample `[S, K]`, None if nothing was added."""
        return None if self._kept is None else torch.cat([self._kept.rows, self._kept.extreme])

    def largest(self) -> Tensor | None:
        """The largest magnitude of each column, over all that was added: float32 `[K]`."""
        return None if self._kept is None else self._kept.largest


def _most_extreme(x: Tensor) -> Tensor:
    return x[x.abs().amax(-1).argmax()].unsqueeze(0).clone()


class EverythingRead(Exception):
    """What a pass would compute from here on is of no interest; see `Capture`."""


class Capture:
    """Context in which the inputs of some modules are summed up; modules that read the same tensor share one sum.

    Which modules those are is found in the first pass, by the identity of the tensors: q, k and v of an attention,
    gate and up of an MLP.

    Args:
        modules: name -> module `[..., K] -> [..., N]`.
        sampled: keep some of the activations, too.
        cuts: end a pass with `EverythingRead` as soon as all modules have read, so that the last of them need not
            compute. The first pass runs to its end: it shows whether every module reads once.

    Attributes:
        enabled: False while a pass is not to be counted.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], sampled: bool = False, cuts: bool = False
    ) -> None:
        self.modules = dict(modules)
        self.sampled, self.cuts = sampled, cuts
        self.enabled = True
        self.leader: dict[str, str] = {}
        self.tokens: dict[str, int] = {}
        self._beside: Mapping[str, Tensor] | None = None
        self._draws: Tensor | None = None
        self._moments: dict[str, SecondMoment] = {}
        self._drifts: dict[str, SecondMoment] = {}
        self._samples: dict[str, RowSample] = {}
        self._seen: dict[int, tuple[str, Tensor]] = {}
        self._reads: Counter[str] = Counter()
        self._passes = 0
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Capture:
        for name, module in self.modules.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def next_batch(
        self, beside: Mapping[str, Tensor] | None = None, draws: Tensor | None = None
    ) -> None:
        """To be called before each forward.

        Args:
            beside: what the same modules read in the float model over the same tokens (see `recording`).
            draws: a random number for each token `[T]`, for the sample.
        """
        if self._passes and set(self._reads.values()) != {1}:
            self.cuts = False
        self._passes += 1
        self._seen.clear()
        self._reads.clear()
        self._beside, self._draws = beside, draws

    def sum_over(self, ranks: Ranks) -> None:
        """Add what the other processes have seen; all of them come here, with the same modules.

        Raises:
            CalibrationError: they disagree on which modules read the same.
        """
        if ranks.size == 1:
            return
        columns = {name: len(moment.total) for name, moment in self._moments.items()}
        others = ranks.gather((self.leader, self.tokens, columns, set(self._drifts)))
        for leader, _, width, _ in others:
            columns |= width
            for name, first in leader.items():
                if self.leader.setdefault(name, first) != first:
                    raise CalibrationError(
                        f"{name}: it reads the same activations as {first} in one process, and as {self.leader[name]} in "
                        "another"
                    )
        self.tokens = {
            name: sum(tokens.get(name, 0) for _, tokens, _, _ in others) for name in columns
        }
        drifting = set().union(*(drifts for _, _, _, drifts in others))
        for name in (name for name in self.modules if name in columns):
            device = next(self.modules[name].parameters()).device
            if name not in self._moments:
                self._moments[name] = SecondMoment(columns[name], device)
            ranks.sum_(self._moments[name].total)
            if name in drifting:
                if name not in self._drifts:
                    self._drifts[name] = SecondMoment(columns[name], device, symmetric=False)
                ranks.sum_(self._drifts[name].total)
            if self.sampled:
                self._samples.setdefault(name, RowSample()).sum_over(ranks, device)

    def statistics(self) -> dict[str, InputStatistics | None]:
        """By name of the module; the very same object for modules that share. None: it never ran."""
        made = {
            name: InputStatistics(
                tokens=self.tokens[name],
                hessian=moment.mean(self.tokens[name]),
                drift=self._drifts[name].mean(self.tokens[name]) if name in self._drifts else None,
                largest=self._samples[name].largest() if self.sampled else None,
                sample=self._samples[name].rows() if self.sampled else None,
            )
            for name, moment in self._moments.items()
        }
        return {
            name: made[self.leader[name]] if name in self.leader else None for name in self.modules
        }

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self.enabled:
                # Detached tensors are new objects; the one that was handed over tells who reads the same.
                self._read(name, args[0])
                self._reads[name] += 1
                if self.cuts and self._passes > 1 and len(self._reads) == len(self.modules):
                    raise EverythingRead

        return hook

    def _read(self, name: str, x: Tensor) -> None:
        same = self._seen.get(id(x))
        leader = self.leader.setdefault(name, same[0] if same else name)
        if leader != name:
            if same is None or same[0] != leader:
                raise CalibrationError(
                    f"{name}: it read the same activations as {leader} in one pass, and others in another"
                )
            return
        # Holding the tensor keeps its id from being given to another one within this pass.
        self._seen[id(x)] = name, x
        if self.sampled:
            read = x.detach().reshape(-1, x.shape[-1])
            sample = self._samples.setdefault(name, RowSample())
            sample.add(read, drawn_for(read, self._draws))
        tokens = x.detach().reshape(-1, x.shape[-1])
        if name not in self._moments:
            self._moments[name] = SecondMoment(tokens.shape[1], tokens.device)
            self.tokens[name] = 0
        self._moments[name].add(tokens, tokens)
        self.tokens[name] += len(tokens)
        if self._beside is not None:
            if name not in self._drifts:
                self._drifts[name] = SecondMoment(tokens.shape[1], tokens.device, symmetric=False)
            wanted = self._beside[name].reshape(-1, x.shape[-1]).float()
            self._drifts[name].add(wanted - tokens.float(), tokens)


def drawn_for(tokens: Tensor, draws: Tensor | None) -> Tensor | None:
    """The draws of a batch where they belong to these tokens `[T, K]`: a module may read others than the block."""
    return draws if draws is not None and len(draws) == len(tokens) else None


@contextmanager
def recording(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Within, the last input of each module by its name."""
    inputs: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[name] = args[0].detach()

        return module.register_forward_pre_hook(hook)

    handles = [watch(name, module) for name, module in modules.items()]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
