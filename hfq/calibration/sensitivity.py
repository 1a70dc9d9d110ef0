"""What rounding each weight to each number of bits costs: predicted KL divergence, block by block with bounded memory.

For a small error e of the hidden states behind a block (a vector for each token), the divergence of the model's
predictions p from those of the float model is, to second order,

    KL = 1/2 e F e^T          F = sum over the vocabulary of  p(y) g(y)^T g(y),   g(y) = gradient of log p(y)

F is Fisher's information. With one label y drawn from p at each token, (g e^T)^2 is an unbiased estimate of e F e^T; errors
of different tokens are taken as independent of each other. So one gradient per block, of the log-likelihood of labels
that the model drew itself, turns any error behind the block into nats per token. On the embedded model the prediction is
within 10 % of the divergence that the whole model shows when only this weight is rounded (benchmarks/NOTES.md).

Three passes: forward on a few tokens, keeping what enters each block; backward, replacing it by the gradient; forward on
all calibration tokens, where the weights that read the same activations are rounded together with their statistics, to
each number of bits in turn, and the block is run with them on the few tokens.

Several processes share the calibration tokens and the choices to be measured. The few tokens run through the blocks in
each of them: that takes much less time than choosing codes, and each choice is measured as one process would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from ..config import Recipe
from ..core.errors import CalibrationError
from ..core.spec import IntSpec
from ..core.statistics import InputStatistics
from ..formats import stored_bytes
from .allocation import Group
from .blocks import forward_after_blocks, forward_block, run_block
from .capture import Capture
from .choose import choose_codes
from .experts import ExpertsCapture
from .run import Calibration, Stream, orientations
from .sequences import MOST_TOKENS

__all__ = ["BACKWARD", "LONGEST", "MEASURED_TOKENS", "Kept", "Sensitivity", "Visit"]

# Tokens that a block is run on with rounded weights.
MEASURED_TOKENS = 4096

# A backward keeps what a forward forgets: so much fewer tokens at a time.
BACKWARD = 4

# Of a sequence, for these: more sequences say more than longer ones.
LONGEST = 512

# Index of a block -> within, its float weights are in memory.
Visit = Callable[[int], AbstractContextManager[None]]


class Kept(Protocol):
    """Tensors by number of the block and batch, in memory (a dict) or on disk."""

    def __getitem__(self, index: int) -> Mapping[str, Tensor]: ...

    def __setitem__(self, index: int, tensors: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class _Weight:
    """A float parameter `[N, K]` or `[K, N]`, or a stack of such, with what it reads (one for each of a stack)."""

    name: str
    parameter: nn.Parameter
    recipe: Recipe
    transposed: bool
    statistics: Sequence[InputStatistics | None]

    @property
    def shape(self) -> tuple[int, ...]:
        """`(N, K)` or `(E, N, K)`."""
        shape = tuple(self.parameter.shape)
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    def with_bits(self, bits: int) -> Recipe:
        assert isinstance(self.recipe.spec, IntSpec)
        return replace(self.recipe, spec=replace(self.recipe.spec, bits=bits))

    def bytes(self, bits: int) -> int:
        """As a checkpoint has them, with scales and zero points."""
        recipe = self.with_bits(bits)
        return stored_bytes(recipe.format, recipe.spec, self.shape)

    def rounded(self, bits: int) -> Tensor:
        """With the codes that this number of bits would get."""
        recipe, stored = self.with_bits(bits), self.parameter.detach()
        out = torch.empty_like(stored)
        pairs = zip(stored, out, strict=True) if stored.dim() == 3 else [(stored, out)]
        for (weight, target), known in zip(pairs, self.statistics, strict=True):
            rows = (weight.T if self.transposed else weight).float()
            quantized, _ = choose_codes(self.name, rows, recipe, known)
            dequantized = quantized.dequantize()
            target.copy_(dequantized.T if self.transposed else dequantized)
        return out


class Sensitivity:
    """One model whose weights are measured.

    Args:
        run: knows the blocks and what is to be quantized in them; none of it is yet.
        sequences: token ids int64 `[T]`, the calibration data.
        candidates: bits to try.
        may_choose: whether the bits of a weight are to be chosen, by its full name.
        visit: brings a block's weights into memory.
        kept: where gradients are kept; full already if the first two passes were run before. Of this process only.
        batch_tokens: how many run through a block at a time, at least one sequence.
    """

    def __init__(
        self,
        run: Calibration,
        sequences: Sequence[Tensor],
        candidates: Sequence[int],
        may_choose: Callable[[str], bool],
        visit: Visit,
        kept: Kept,
        batch_tokens: int = MOST_TOKENS,
    ) -> None:
        self.run, self.candidates, self.may_choose = run, candidates, may_choose
        self.visit, self.kept = visit, kept
        self.streams = run.start(sequences, batch_tokens)
        self.few = run.start(_some(sequences), batch_tokens // BACKWARD, divided=False)
        self.blocks = list(run.blocks.values())
        self.tokens = sum(stream.batch.numel() for stream in self.few)

    @torch.no_grad()
    def gradients(self, seed: int) -> None:
        """Fill `kept` with the gradient behind each block, float like the hidden states, `[B, T, H]` for each batch.

        Args:
            seed: of the labels that the model draws.

        Raises:
            CalibrationError: logits are NaN or infinite.
            SaveError: gradients cannot be kept.
        """
        with self.run.ranks.together():
            self._gradients(seed)

    def _gradients(self, seed: int) -> None:
        first = [stream.hidden for stream in self.few]
        for index, block in enumerate(self.blocks):
            self.kept[index] = {str(n): stream.hidden for n, stream in enumerate(self.few)}
            with self.visit(index):
                for stream in self.few:
                    stream.hidden = run_block(block, stream.hidden, stream.calls[index])
        generator = torch.Generator().manual_seed(seed)
        found = {str(n): self._last(stream, generator) for n, stream in enumerate(self.few)}
        for index in reversed(range(len(self.blocks))):
            entered = self.kept[index]
            self.kept[index] = found
            if index:
                with self.visit(index):
                    found = {
                        str(n): _through(
                            self.blocks[index], entered[str(n)], stream, index, found[str(n)]
                        )
                        for n, stream in enumerate(self.few)
                    }
        for stream, hidden in zip(self.few, first, strict=True):
            stream.hidden = hidden

    @torch.no_grad()
    def block(self, index: int) -> list[Group]:
        """What is to be chosen in a block, with what each choice costs; all streams move past it.

        Raises:
            CalibrationError: activations or gradients are NaN or infinite.
        """
        ranks, (name, block) = self.run.ranks, list(self.run.blocks.items())[index]
        with ExitStack() as stack:
            with ranks.together():
                stack.enter_context(self.visit(index))
                with self.run.captured(self._open_modules(name)) as (capture, routed):
                    for stream in self.streams:
                        capture.next_batch()
                        _move(stream, run_block(block, stream.hidden, stream.calls[index]))
            capture.sum_over(ranks)
            for experts in routed.values():
                experts.sum_over(ranks)
            with ranks.together():
                groups = self._groups(name, capture, routed)
                expected = [run_block(block, each.hidden, each.calls[index]) for each in self.few]
            found = self._measured(index, groups, expected)
        for stream, hidden in zip(self.few, expected, strict=True):
            _move(stream, hidden)
        return found

    def _open_modules(self, block: str) -> list[str]:
        """Modules of a block with a weight whose bits are to be chosen."""
        return [
            name
            for name, recipes in self.run.recipes.items()
            if name.startswith(f"{block}.")
            and any(self.may_choose(_full_name(name, base)) for base in recipes)
        ]

    def _groups(
        self, block: str, capture: Capture, routed: Mapping[str, ExpertsCapture]
    ) -> list[list[_Weight]]:
        """Weights that read the same, and stacks of experts; those that never ran keep their bits."""
        flipped = orientations(self.run.blocks[block])
        shared: dict[str, list[_Weight]] = {}
        for name, statistics in capture.statistics().items():
            if statistics is not None:
                weight = self._weight(name, "weight", flipped[name.removeprefix(f"{block}.")])
                shared.setdefault(capture.leader[name], []).append(
                    replace(weight, statistics=[statistics])
                )
        groups = list(shared.values())
        for name, experts in routed.items():
            for base, known in experts.statistics().items():
                if known is not None and self.may_choose(f"{name}.{base}"):
                    weight = self._weight(name, base, bool(experts.module.is_transposed))
                    groups.append([replace(weight, statistics=known)])
        return groups

    def hidden(self) -> dict[str, Tensor]:
        """Where all streams stand, for `restore`."""
        return {f"{n}": stream.hidden for n, stream in enumerate((*self.streams, *self.few))}

    def restore(self, hidden: Mapping[str, Tensor]) -> None:
        """Go on where another run stood."""
        for n, stream in enumerate((*self.streams, *self.few)):
            _move(stream, hidden[str(n)].to(stream.hidden.device))

    def _weight(self, module: str, base: str, transposed: bool) -> _Weight:
        return _Weight(
            name=_full_name(module, base),
            parameter=self.run.model.get_submodule(module).get_parameter(base),
            recipe=self.run.recipes[module][base],
            transposed=transposed,
            statistics=(),
        )

    def _measured(
        self, index: int, groups: Sequence[Sequence[_Weight]], expected: Sequence[Tensor]
    ) -> list[Group]:
        choices = [(weights, bits) for weights in groups for bits in self.candidates]

        def measure(choice: int) -> float:
            weights, bits = choices[choice]
            with ExitStack() as stack:
                for weight in weights:
                    stack.enter_context(_replaced(weight.parameter, weight.rounded(bits)))
                cost = self._cost(index, expected)
            if not cost < torch.inf:
                raise CalibrationError(
                    f"{weights[0].name}: what rounding it to {bits} bits costs is {cost}: activations or gradients are "
                    "NaN or infinite; load the model in bfloat16 or float32"
                )
            return cost

        work = [sum(w.parameter.numel() * w.shape[-1] for w in weights) for weights, _ in choices]
        costs = iter(list(self.run.ranks.divided([float(each) for each in work], measure)))
        return [
            Group(
                names=tuple(weight.name for weight in weights),
                weights=sum(weight.parameter.numel() for weight in weights),
                bytes={bits: sum(w.bytes(bits) for w in weights) for bits in self.candidates},
                costs={bits: next(costs) for bits in self.candidates},
            )
            for weights in groups
        ]

    def _cost(self, index: int, expected: Sequence[Tensor]) -> float:
        """1/2 (g e^T)^2, nats per token, for the block as it is now."""
        total, gradients = 0.0, self.kept[index]
        for n, (stream, output) in enumerate(zip(self.few, expected, strict=True)):
            moved = run_block(self.blocks[index], stream.hidden, stream.calls[index])
            error = moved.float() - output.float()
            gradient = gradients[str(n)].to(error.device).float()
            total += (error * gradient).sum(-1).square().sum().item()
        return total / 2 / self.tokens

    def _last(self, stream: Stream, generator: torch.Generator) -> Tensor:
        """The gradient behind the last block of the log-likelihood of labels that the model draws."""
        found = []
        # One sequence at a time: logits are large.
        for row, ids in zip(stream.hidden, stream.batch, strict=True):
            with torch.enable_grad():
                hidden = row.detach().unsqueeze(0).requires_grad_()
                logits = forward_after_blocks(self.run.model, self.blocks, ids.unsqueeze(0), hidden)
                likelihoods = logits.flatten(0, 1).float().log_softmax(-1)
                chances = likelihoods.detach().exp().cpu()
                if not bool(torch.isfinite(chances).all()):
                    raise CalibrationError(
                        "the float model gives NaN or infinite logits for the calibration data: load it in bfloat16 or "
                        "float32"
                    )
                labels = torch.multinomial(chances, 1, generator=generator).to(logits.device)
                (gradient,) = torch.autograd.grad(likelihoods.gather(-1, labels).sum(), hidden)
            found.append(gradient)
        return torch.cat(found)


def _through(
    block: nn.Module, entered: Tensor, stream: Stream, index: int, behind: Tensor
) -> Tensor:
    """From the gradient behind a block to the one in front of it. No gradient of a weight is made."""
    with torch.enable_grad():
        hidden = entered.to(stream.hidden).detach().requires_grad_()
        output = forward_block(block, hidden, stream.calls[index])
        (gradient,) = torch.autograd.grad(output, hidden, behind.to(output))
    return gradient


def _full_name(module: str, base: str) -> str:
    return module if base == "weight" else f"{module}.{base}"


def _some(sequences: Sequence[Tensor]) -> list[Tensor]:
    """Up to `MEASURED_TOKENS` tokens, from sequences evenly spread over all."""
    count = max(1, MEASURED_TOKENS // min(LONGEST, max(map(len, sequences))))
    step = max(1, -(-len(sequences) // count))
    return [sequence[:LONGEST] for sequence in sequences[::step]]


def _move(stream: Stream, hidden: Tensor) -> None:
    stream.hidden = stream.wanted = hidden


@contextmanager
def _replaced(parameter: nn.Parameter, value: Tensor) -> Iterator[None]:
    before = parameter.data
    parameter.data = value
    try:
        yield
    finally:
        parameter.data = before
