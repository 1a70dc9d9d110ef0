"""``hqq``: half-quadratic quantization (Badri and Shaji, "Half-Quadratic Quantization of Large Machine
Learning Models", 2023). No data: the zero point of each group minimises a sparsity-promoting norm of the error.

The problem  min_z  sum |w - Q_z(w)|^p, p < 1, is split with an auxiliary error e. With r the rounding error:

    e <- shrink_p(r, beta)              generalised soft threshold
    z <- z - mean over the group of  r - e
    beta <- kappa * beta

All errors are in units of the group's scale, not of the weight as in the paper: the result does not depend on
the size of the weights, and the threshold acts at all (on weights around 0.02 the paper's beta of 10 shrinks
every error to 0). Scales stay those of the range; zero points become fractional, which the ``int`` format stores
as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core import affine
from ..core.errors import ConfigError
from ..core.fit import row_slices
from ..core.spec import IntSpec, QuantSpec
from ..core.statistics import InputStatistics
from ..core.weight import QuantizedWeight
from . import ALGORITHMS

NORM = 0.7
# Best of a sweep over beta 1 to 10 and kappa 1 to 1.1, at 2, 4 and 8 bits in groups of 64, on normal, Laplace and
# Student-t samples and a trained q_proj: the norm falls to 0.961 of rounding to nearest, the squared error to 0.931.
BETA = 3.0
KAPPA = 1.1
# Weights at a time: iterations take 24 bytes for each.
_SLICE = 1 << 22


class HalfQuadratic:
    """Range scales with zero points that minimise the l_0.7 norm of the error."""

    calibrated = False
    orders_columns = False
    defaults: Mapping[str, object] = {"format": "int", "sym": False}
    options: Mapping[str, object] = {"iterations": 20}

    def check(self, spec: QuantSpec, options: Mapping[str, object]) -> None:
        iterations = options["iterations"]
        if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
            raise ConfigError(f"iterations must be a positive integer, got {iterations!r}")
        if not isinstance(spec, IntSpec) or spec.sym:
            raise ConfigError(
                f"method 'hqq' optimises zero points and so needs format 'int' with sym=False, got {spec}; "
                "use method 'rtn' with scale_search=True for symmetric grids and codebooks"
            )

    def quantize(
        self,
        weight: Tensor,
        spec: QuantSpec,
        options: Mapping[str, object],
        statistics: InputStatistics | None = None,
    ) -> QuantizedWeight:
        iterations = options["iterations"]
        assert isinstance(iterations, int)
        weight = weight.float()
        scales, zeros = affine.range_grid(weight, spec)
        _, start = affine.range_grid(weight, spec, integer_zeros=False)
        assert zeros is not None and start is not None
        found = [
            _optimise_zeros(weight[rows], scales[rows], zeros[rows], start[rows], spec, iterations)
            for rows in row_slices(weight, _SLICE)
        ]
        return affine.encode(weight, scales, torch.cat(found), spec)


def _optimise_zeros(
    weight: Tensor, scales: Tensor, zeros: Tensor, start: Tensor, spec: QuantSpec, iterations: int
) -> Tensor:
    """Half-quadratic iterations from `start`, `[N, G]`; each group keeps the best of them and of `zeros`."""
    groups, columns = affine.group_columns(weight, spec.group_size), weight.shape[1]
    scales = affine.stored_scales(scales, spec).float()

    def judge(zeros: Tensor) -> tuple[Tensor, Tensor]:
        residual = affine.residual(groups, scales, zeros, spec)
        return residual, affine.group_mean(residual.abs().pow_(NORM), columns)

    best, (_, best_error) = zeros, judge(zeros)
    zeros = _as_stored(start, spec)
    for i in range(iterations + 1):
        residual, error = judge(zeros)
        better = error < best_error
        best, best_error = torch.where(better, zeros, best), torch.where(better, error, best_error)
        shift = affine.group_mean(residual - _shrink(residual, BETA * KAPPA**i), columns)
        zeros = _as_stored(zeros - shift, spec)
    return best


def _as_stored(zeros: Tensor, spec: QuantSpec) -> Tensor:
    """Rounded to what will be read back, so that a judgement holds."""
    return zeros.to(spec.torch_scale_dtype).float()


def _shrink(x: Tensor, beta: float) -> Tensor:
    """The proximal step of |x|^p: sign(x) * max(0, |x| - |x|^(p-1) / beta)."""
    size = x.abs()
    return x.sign() * (size - size.clamp(min=1e-12).pow_(NORM - 1) / beta).clamp_(min=0)


ALGORITHMS.register("hqq", HalfQuadratic())
