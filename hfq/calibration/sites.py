"""Where a rescaling of activations can hide: found by watching a block, never by names of models.

Dividing a channel of activations by s and multiplying the columns that read it by s changes nothing. The division
costs nothing where a *producer* can take it over: a norm's gain, or the rows of a linear layer whose outputs reach the
*consumer* channel by channel (an up projection behind a gate, values behind an attention's weights).

Norms are found by the identity of tensors: their output is what the consumers read. Linear producers are found by
experiment: their outputs are multiplied by random factors, and if every channel of the consumer's input is multiplied
by one of these factors, for all tokens, the relation is linear and tells which channel is which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Site", "find_sites"]

# Factors that differ by less could be taken for each other.
_LEAST_DIFFERENCE = 1e-5

# Relative deviation up to which a ratio counts as a factor; float32.
_EXACT = 1e-3


@dataclass(frozen=True, kw_only=True)
class Site:
    """One place for a rescaling.

    Attributes:
        producer: name of the module that takes the division over.
        consumers: names of the modules that read the activations.
        channels: int64 `[K]`: which channel of the producer each channel of the consumers' input comes from; several
            for one where heads share values. None: the same one.
    """

    producer: str
    consumers: tuple[str, ...]
    channels: Tensor | None = None


@torch.no_grad()
def find_sites(
    block: nn.Module,
    run: Callable[[], Tensor],
    consumers: Sequence[str],
    sizes: Mapping[str, tuple[int, int]],
) -> list[Site]:
    """The sites of a block.

    Args:
        block: in float32, on few tokens of real activations.
        run: runs it.
        consumers: modules of the block whose weights are to be quantized.
        sizes: `(N, K)` of every linear layer of the block, by name.
    """
    watched = _watch(block, run)
    sites: list[Site] = []
    by_input: dict[int, list[str]] = {}
    for name, tensor in watched.inputs.items():
        by_input.setdefault(id(tensor), []).append(name)
    for readers in by_input.values():
        wanted = [name for name in readers if name in consumers]
        if not wanted:
            continue
        producer = watched.producer_of(readers[0])
        if producer is not None and _is_norm(block.get_submodule(producer), sizes, wanted[0]):
            sites.append(Site(producer=producer, consumers=tuple(readers)))
        elif len(readers) == 1 and (
            found := _linear_producer(block, run, wanted[0], watched, sizes)
        ):
            sites.append(found)
    return sites


@dataclass(frozen=True)
class _Watched:
    """Inputs and outputs of the innermost modules in one run, in the order of calls. Tensors are kept, so ids hold."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    def producer_of(self, name: str) -> str | None:
        read = self.inputs[name]
        return next((each for each, tensor in self.outputs.items() if tensor is read), None)


def _watch(block: nn.Module, run: Callable[[], Tensor]) -> _Watched:
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = []
    for name, module in block.named_modules():
        if not name or not any(True for _ in module.parameters(recurse=False)):
            continue

        def watch(_: nn.Module, args: tuple[object, ...], output: object, name: str = name) -> None:
            if args and isinstance(args[0], Tensor):
                inputs[name] = args[0]
            if isinstance(output, Tensor):
                outputs[name] = output

        handles.append(module.register_forward_hook(watch))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return _Watched(inputs, outputs)


def _is_norm(module: nn.Module, sizes: Mapping[str, tuple[int, int]], consumer: str) -> bool:
    """A gain for each channel, perhaps a shift, and nothing else."""
    parameters = dict(module.named_parameters())
    gain = parameters.get("weight")
    known = parameters.keys() <= {"weight", "bias"}
    return known and gain is not None and gain.shape == (sizes[consumer][1],)


def _linear_producer(
    block: nn.Module,
    run: Callable[[], Tensor],
    consumer: str,
    watched: _Watched,
    sizes: Mapping[str, tuple[int, int]],
) -> Site | None:
    """The linear layer, if any, whose outputs reach `consumer` channel by channel."""
    order = list(watched.outputs)
    before = order[: order.index(consumer)]
    read = watched.inputs[consumer].flatten(0, -2)
    for producer in reversed([name for name in before if name in sizes]):
        rows, columns = sizes[producer][0], sizes[consumer][1]
        if columns % rows:
            continue
        factors = _distinct_factors(rows, read.device)

        def scale(_: nn.Module, __: object, output: Tensor, by: Tensor = factors) -> Tensor:
            return output * by

        handle = block.get_submodule(producer).register_forward_hook(scale)
        try:
            changed = _watch(block, run).inputs[consumer].flatten(0, -2)
        finally:
            handle.remove()
        channels = _channels(read, changed, factors)
        if channels is not None:
            same = torch.arange(rows, device=channels.device)
            equal = rows == columns and torch.equal(channels, same)
            return Site(
                producer=producer, consumers=(consumer,), channels=None if equal else channels
            )
    return None


def _distinct_factors(count: int, device: torch.device) -> Tensor:
    """Factors from 1 to 2, evenly spaced in random order: no two are near each other."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randperm(count, generator=generator).to(device)
    return 1 + (steps + 1) / (count + 1)


def _channels(read: Tensor, changed: Tensor, factors: Tensor) -> Tensor | None:
    """For each column of `changed = read * factor`, float32 `[T, K]`, the index of its factor."""
    # The largest value of each column tells the ratio best.
    largest = read.abs().argmax(0, keepdim=True)
    base = read.gather(0, largest)[0]
    if bool((base == 0).any()):
        return None
    ratios = changed.gather(0, largest)[0] / base
    ordered, index = factors.sort()
    place = torch.bucketize(ratios, (ordered[1:] + ordered[:-1]) / 2)
    nearest = ordered[place]
    gap = max(_LEAST_DIFFERENCE, 0.25 / (len(factors) + 1))
    if not bool(((ratios - nearest).abs() < min(gap, _EXACT)).all()):
        return None
    # One token may agree by chance; all do only where the relation is linear.
    expected = read * nearest
    if not bool(((changed - expected).abs() <= _EXACT * expected.abs().amax(0)).all()):
        return None
    return index[place]
