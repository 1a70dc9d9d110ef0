"""How fast this machine does what quantizing a model consists of; about a second for each kind of weight."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..algorithms import ALGORITHMS, TRANSFORMS, find_method
from ..config import Recipe
from ..core.activations import fit_input_scale
from ..core.spec import activation_dtype
from ..core.statistics import InputStatistics
from ..formats import FORMATS
from ..kernels import native
from ..kernels.moments import SecondMoment

__all__ = ["COLUMNS", "Choosing", "Rates", "measure_rates", "recipe_key"]

# Of the products that rates are taken from: smaller ones run at half of the speed of large ones.
_SIZE, _TOKENS = 2048, 2048

# Of the weights that methods are timed on.
COLUMNS = 256
_FEW, _MANY = 64, 320

# Rows that transforms look at; tokens that are kept as a sample.
_LOOKED_AT, _SAMPLE = 128, 256

# Of a file, to see how fast it is read.
_READ_BYTES = 32 << 20

# How long each is repeated: the first turns are slow, and so is any while a neighbour has the processor.
_LEAST_SECONDS, _LEAST_TURNS = 0.15, 3


@dataclass(frozen=True, kw_only=True)
class Choosing:
    """Seconds that a method takes for a weight `[N, K]`: ``column * K + weight * N * K``, and for the factors of its
    transform ``transform * K``, where K is `COLUMNS`. Products that grow with K^2 come on top for larger ones (see
    `hfq.integrations.forecast`).
    """

    column: float
    weight: float
    transform: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What was measured.

    Attributes:
        forward: operations (a multiplication and an addition are two) per second of a product in the model's dtype.
        float32: the same of a product in float32.
        moments: the same of summing up second moments of such activations.
        factor: K^3 per second of a factorisation.
        read: bytes per second of reading a file; of one that the system has in memory already, if it has it.
        choosing: by `recipe_key`.
    """

    forward: float
    float32: float
    moments: float
    factor: float
    read: float
    choosing: Mapping[tuple[object, ...], Choosing]


def recipe_key(recipe: Recipe) -> tuple[object, ...]:
    """What the time of a method depends on."""
    return recipe.method, recipe.format, recipe.spec, tuple(sorted(recipe.options.items()))


@torch.no_grad()
def measure_rates(
    recipes: Collection[Recipe], file: Path, dtype: torch.dtype, device: torch.device
) -> Rates:
    """Time small pieces of the work.

    Args:
        recipes: what weights are quantized with.
        file: one of those that will be read.
        dtype, device: of activations.
    """
    native.load()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TOKENS, _SIZE, generator=generator).to(device)
    weight = torch.randn(_SIZE, _SIZE, generator=generator).to(device)
    products = 2 * _TOKENS * _SIZE * _SIZE
    typed = x.to(dtype), weight.to(dtype)
    sums = SecondMoment(_SIZE, device)
    moment = x.T @ x / _TOKENS
    order = {recipe_key(recipe): recipe for recipe in recipes}
    return Rates(
        forward=products / _seconds(lambda: nn.functional.linear(*typed), device),
        float32=products / _seconds(lambda: x.T @ x, device),
        moments=products / _seconds(lambda: sums.add(typed[0], typed[0]), device),
        factor=_SIZE**3 / _seconds(lambda: _statistics(moment).factor(0.01, False), device),
        read=_read_rate(file),
        choosing={key: _choosing(recipe, x, weight) for key, recipe in order.items()},
    )


def _statistics(moment: Tensor) -> InputStatistics:
    return InputStatistics(tokens=_TOKENS, hessian=moment)


def _choosing(recipe: Recipe, x: Tensor, weight: Tensor) -> Choosing:
    """From two numbers of rows, because a part of the work does not depend on it."""
    method = find_method(recipe.method)
    inputs = x[:, :COLUMNS]
    statistics = InputStatistics(
        tokens=_TOKENS,
        hessian=inputs.T @ inputs / _TOKENS,
        largest=inputs.abs().amax(0),
        sample=inputs[:_SAMPLE],
    )

    def choose(rows: int) -> float:
        # The first call factorises the moment, which is counted on its own.
        def once() -> None:
            algorithm, sample = ALGORITHMS.get(method.algorithm), weight[:rows, :COLUMNS]
            codes = algorithm.quantize(sample.contiguous(), recipe.spec, recipe.options, statistics)
            if recipe.spec.activation == "static":
                dtype = activation_dtype(recipe.spec)
                scale = fit_input_scale(inputs[:_SAMPLE], sample, codes.dequantize(), dtype)
                codes = replace(codes, input_scale=scale)
            FORMATS.get(recipe.format).pack(codes)

        once()
        return _seconds(once, x.device)

    few, many = choose(_FEW), choose(_MANY)
    per_row = max(0.0, many - few) / (_MANY - _FEW)
    transform = 0.0
    if method.transform is not None:
        rescaling, sample = TRANSFORMS.get(method.transform), weight[:_LOOKED_AT, :COLUMNS]
        start = time.perf_counter()
        rescaling.factors([(sample, recipe.spec)], statistics, None, recipe.options)
        transform = (time.perf_counter() - start) / COLUMNS
    return Choosing(
        column=max(0.0, few - per_row * _FEW) / COLUMNS,
        weight=per_row / COLUMNS,
        transform=transform,
    )


def _read_rate(file: Path) -> float:
    start = time.perf_counter()
    with file.open("rb") as stream:
        count = len(stream.read(_READ_BYTES))
    return count / max(time.perf_counter() - start, 1e-9)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The best of some turns: what disturbs only ever takes time."""
    found: list[float] = []
    while len(found) < _LEAST_TURNS or sum(found) < _LEAST_SECONDS:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return max(min(found), 1e-9)
