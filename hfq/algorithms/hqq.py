"""``hqq``: half-quadratic quantization (Badri and Shaji, "Half-Quadratic Quantization of Large Machine
Learning Models", 2023). No data: the zero point of each group minimises a sparsity-promoting norm of the error.

The problem  min_z  sum |w - Q_z(w)|^p, p < 1, is split with an auxiliary error e:

    e <- shrink_p(w - w_q, beta)                        generalised soft threshold
    z <- mean over the group of  code - (w - e) / scale
    beta <- kappa * beta

Scales stay those of the range; zero points become fractional, which the ``int`` format stores as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core import affine
from ..core.errors import ConfigError
from ..core.spec import IntSpec, QuantSpec
from ..core.weight import QuantizedWeight
from . import ALGORITHMS

NORM = 0.7
BETA = 10.0
KAPPA = 1.01


class HalfQuadratic:
    """Range scales with zero points that minimise the l_0.7 norm of the error."""

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

    def quantize(self, weight: Tensor, spec: QuantSpec, options: Mapping[str, object]) -> QuantizedWeight:
        iterations = options["iterations"]
        assert isinstance(iterations, int)
        scales, zeros = affine.range_grid(weight, spec)
        assert zeros is not None
        zeros = _optimise_zeros(weight, scales, zeros, spec, iterations)
        return affine.encode(weight, scales, zeros, spec)


def _optimise_zeros(weight: Tensor, scales: Tensor, zeros: Tensor, spec: QuantSpec, iterations: int) -> Tensor:
    """Half-quadratic iterations on `[N, G]` zero points; each group keeps the best that it met."""
    groups = affine.group_columns(weight, spec.group_size)
    scale = torch.where(scales == 0, torch.ones_like(scales), scales).unsqueeze(-1)
    scaled = groups / scale
    best, best_error = zeros, torch.full_like(zeros, float("inf"))
    beta = BETA
    for _ in range(iterations):
        codes = (scaled + zeros.unsqueeze(-1)).round_().clamp_(0, spec.levels - 1)
        residual = groups - (codes - zeros.unsqueeze(-1)) * scale
        error = residual.abs().pow(NORM).mean(-1)
        better = error < best_error
        best, best_error = torch.where(better, zeros, best), torch.where(better, error, best_error)
        shrunk = _shrink(residual, beta)
        zeros = (codes - (groups - shrunk) / scale).mean(-1)
        beta *= KAPPA
    return best


def _shrink(x: Tensor, beta: float) -> Tensor:
    """The proximal step of |x|^p: sign(x) * max(0, |x| - |x|^(p-1) / beta)."""
    size = x.abs()
    return x.sign() * (size - size.clamp(min=1e-12).pow(NORM - 1) / beta).clamp_(min=0)


ALGORITHMS.register("hqq", HalfQuadratic())
