"""What calibration knows about the inputs of a weight, and the quadratic form that it makes of a rounding error.

A layer computes ``y = W x``. With codes that stand for Q, the squared error of y, summed over the calibration tokens,
is a quadratic form of the rounding error, the same for every row:

    sum |W x - Q x|^2 = tokens * tr (W - Q) H (W - Q)^T          H = mean of x x^T, [K, K]

Weights that read the same activations (q, k and v; gate and up) share one `InputStatistics` and its factorisations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import CalibrationError

__all__ = ["Factor", "InputStatistics"]

# Damping grows tenfold from the one asked for up to this share of the mean of H's diagonal.
_MOST_DAMPING = 1.0


@dataclass(frozen=True, kw_only=True)
class Factor:
    """``P H P^T + damping = M diag(costs) M^T``, M upper triangular with ones on its diagonal.

    With it the error of the layer falls apart into columns: for e = w - q, row by row,

        e H e^T = sum over k of  costs[k] * (w[k] + sum over j < k of e[j] M[j, k] - q[k])^2

    so that the best code for column k, given the codes before it, is the one nearest to the sum in the brackets.
    This is GPTQ's update (Frantar et al., 2022) read from the left: one factorisation and no inverse, as in LDLQ
    (Chee et al., "QuIP", 2023).

    Attributes:
        order: int64 `[K]`, columns in the order of rounding: row i of P H P^T belongs to column order[i].
        feedback: M, float32 `[K, K]`.
        costs: float32 `[K]`.
        damping: what was added to H's diagonal, as a share of its mean.
    """

    order: Tensor
    feedback: Tensor
    costs: Tensor
    damping: float


@dataclass(kw_only=True)
class InputStatistics:
    """Means over the calibration tokens at the input of one weight, or of several that read the same.

    Attributes:
        tokens: how many.
        hessian: mean of x x^T, float32 `[K, K]`.
        drift: mean of (x' - x) x^T, float32 `[K, K]`, where x' is what the float model reads at the place of x; None
            where the two were not compared.
        largest: largest magnitude of each column, float32 `[K]`.
        sample: some of the tokens, drawn evenly from all, and the one with the largest magnitude: `[S, K]` in their
            dtype. Both are None where no method asked for them.
    """

    tokens: int
    hessian: Tensor
    drift: Tensor | None = None
    largest: Tensor | None = None
    sample: Tensor | None = None
    _factors: dict[tuple[float, bool], Factor] = field(default_factory=dict, repr=False)

    @property
    def importance(self) -> Tensor:
        """Mean squared activation of each column, float32 `[K]`."""
        return self.hessian.diagonal()

    def factor(self, damp_percent: float, by_importance: bool) -> Factor:
        """The factorisation for rounding column by column, computed once.

        Args:
            damp_percent: added to the diagonal, as a share of its mean; more where that does not suffice.
            by_importance: begin with the columns of the largest activations instead of the first.

        Raises:
            CalibrationError: H is not finite.
        """
        key = damp_percent, by_importance
        if key not in self._factors:
            columns = self.hessian.shape[0]
            order = (
                self.importance.argsort(descending=True, stable=True)
                if by_importance
                else torch.arange(columns, device=self.hessian.device)
            )
            self._factors[key] = _factorize(self.hessian, order, damp_percent)
        return self._factors[key]

    @contextmanager
    def damped(self, damping: float) -> Iterator[Tensor]:
        """Within, H itself with that share of the mean of its diagonal added to it.

        It is positive definite where a factorisation has succeeded with that damping.
        """
        diagonal = self.hessian.diagonal()
        before = diagonal.clone()
        _damp(self.hessian, damping)
        try:
            yield self.hessian
        finally:
            diagonal.copy_(before)

    @property
    def damping(self) -> float:
        """The most that a factorisation has added to the diagonal, as a share of its mean; 0 without any."""
        return max((factor.damping for factor in self._factors.values()), default=0.0)

    def check_finite(self) -> None:
        """`CalibrationError` where `largest` is known and tells of NaN or infinite activations."""
        if self.largest is not None and not bool(self.largest.isfinite().all()):
            raise CalibrationError(
                "the activations that this weight reads are NaN or infinite: check the model on the calibration text "
                "in bfloat16 or float32, or keep this module in float"
            )

    def rescaled(self, factors: Tensor) -> InputStatistics:
        """Of the same activations divided by factors, float32 `[K]`."""
        both = factors.unsqueeze(0) * factors.unsqueeze(1)
        return InputStatistics(
            tokens=self.tokens,
            hessian=self.hessian / both,
            drift=None if self.drift is None else self.drift / both,
            largest=None if self.largest is None else self.largest / factors,
            sample=None if self.sample is None else (self.sample / factors).to(self.sample.dtype),
        )

    def error(self, difference: Tensor) -> float:
        """Mean squared error of the layer's output, summed over its rows, for a weight difference `[N, K]`."""
        return float(((difference @ self.hessian) * difference).sum())


def _damp(hessian: Tensor, damping: float) -> None:
    """Put the mean of H's diagonal in place of zeros there, and add a share of it.

    Columns that never carry anything must not be corrected by others, nor correct them.
    """
    diagonal = hessian.diagonal()
    # Where nothing ever arrives all roundings are as good as each other.
    mean = diagonal.float().mean().item() or 1.0
    diagonal.masked_fill_(diagonal == 0, mean).add_(damping * mean)


def _all_finite(matrix: Tensor) -> bool:
    """Whether no value of a second moment or a Cholesky factor is NaN or infinite.

    Its diagonal tells: there each row's squares are summed up.
    """
    return bool(matrix.diagonal().isfinite().all())


def _factorize(hessian: Tensor, order: Tensor, damp_percent: float) -> Factor:
    if not _all_finite(hessian):
        raise CalibrationError(
            "the activations that this weight reads are NaN, infinite or too large to square in float32: check the "
            "model on the calibration text in bfloat16 or float32, or keep this module in float"
        )
    # Cholesky goes from the first column on; M goes from the last.
    backwards = order.flip(0)
    damping = max(damp_percent, torch.finfo(torch.float32).eps)
    while True:
        for dtype in (torch.float32, torch.float64):
            # As few matrices of this size at a time as can be: they are the largest that calibration meets.
            damped = hessian[backwards.unsqueeze(1), backwards].to(dtype)
            _damp(damped, damping)
            lower, info = torch.linalg.cholesky_ex(damped)
            del damped
            if info.item() == 0 and _all_finite(lower):
                roots = lower.diagonal().clone()
                lower /= roots
                lower = lower.float()
                return Factor(
                    order=order,
                    feedback=lower.flip(0, 1),
                    costs=roots.flip(0).square().float(),
                    damping=damping,
                )
            del lower
        if damping >= _MOST_DAMPING:
            raise CalibrationError(
                "the second moment of the activations cannot be factorised even when fully damped: the activations "
                "are NaN or infinite, or H was damaged"
            )
        damping = min(10 * damping, _MOST_DAMPING)
