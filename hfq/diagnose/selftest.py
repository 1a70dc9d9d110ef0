"""The self-test of `hfq.doctor`: the kernels that this machine would use, format by format, against the PyTorch reference.

Whoever has a GPU or a processor that nobody has run hfq on sees here whether its results can be trusted. Sizes are small and
odd, so that it takes a second. A GPU takes other kernels for weights as large as those of models: it gets one of that size, too.
tests/kernels asks far more.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from ..algorithms import ALGORITHMS
from ..core.errors import HfqError
from ..core.spec import CodebookSpec, Fp8Spec, Int8Spec, IntSpec, QuantSpec, SpqrSpec
from ..core.weight import Grid, QuantizedWeight
from ..kernels import dispatch
from ..kernels.row import KernelRow, Problem
from ..nn.layout import neutral_grid, to_kernel
from ..nn.packing import Encode, pack_weight
from ..nn.slot import PackedSlot

__all__ = ["LARGE", "LARGE_BYTES", "SMALL", "WEIGHTS", "Size", "Verdict", "self_test"]

# (format, spec): each code path of the kernels once.
WEIGHTS: tuple[tuple[str, QuantSpec], ...] = (
    ("int", IntSpec(bits=2)),
    ("int", IntSpec(bits=3)),
    ("int", IntSpec(bits=4)),
    ("int", IntSpec(bits=4, sym=False)),
    ("int", IntSpec(bits=8)),
    ("nf4", CodebookSpec()),
    ("fp4", CodebookSpec(codebook="fp4")),
    ("spqr", SpqrSpec(bits=2)),
    ("spqr", SpqrSpec(bits=3)),
    ("spqr", SpqrSpec(bits=4)),
    ("int8", Int8Spec()),
    ("int8", Int8Spec(activation="dynamic")),
    ("fp8", Fp8Spec()),
    ("fp8", Fp8Spec(activation="dynamic")),
)

_HALVES = (torch.bfloat16, torch.float16)

# Largest differences in proportion to the largest value that is right: float32 sums of products; roundings of results, weights and
# codebooks to 16 bits; activations of 8 bits where the reference has floats.
_EXACT, _ROUNDED, _INT8 = 1e-5, 1e-2, 3e-2
# Errors of weights that a device has packed, beside those of the same packed on the CPU: sums in another order turn some codes over.
_PACKED = 1.01


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is multiplied.

    Attributes:
        rows, columns: N and K of a weight.
        experts: how many are in a stack; None: a weight by itself.
        tokens: numbers of them.
        on_cpu: whether the CPU packs the weight and computes what is right, which is independent of the device, and slow.
    """

    rows: int
    columns: int
    experts: int | None
    tokens: tuple[int, ...]
    on_cpu: bool


# Rows: an odd number of tiles of 16. Columns: the last groups of 128 and 64 are shorter. Each number of tokens takes another way
# through some kernel: one, few, tensor cores, several blocks, the matrix library.
SMALL = Size(rows=240, columns=1040, experts=3, tokens=(1, 5, 16, 50, 300), on_cpu=True)

# A few more than 2^25 numbers, from where on all kernels for large weights are taken (kernels/cuda/wide.cu, wgmma.cu).
LARGE = Size(
    rows=4112,
    columns=8192,
    experts=None,
    tokens=(1, 3, 8, 13, 16, 27, 50, 64, 100, 200, 1100, 2000),
    on_cpu=False,
)
# Of the device's memory, at most.
LARGE_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of one weight on one device.

    Attributes:
        weight: format, bits and what else tells it from the others.
        kernel: the kernel that was chosen.
        count: results that were compared.
        faults: what was wrong, in words; a kernel that raised ends its weight's test.
    """

    weight: str
    kernel: str
    count: int
    faults: tuple[str, ...]


@dataclass
class _Comparison:
    count: int = 0
    faults: list[str] = field(default_factory=list)

    def check(self, what: str, found: Tensor, expected: Tensor, bound: float) -> None:
        """Both of one shape; NaN is a fault."""
        self.count += 1
        found = found.detach().to(expected.device).float()
        if found.shape != expected.shape:
            self.faults.append(f"{what}: shape {tuple(found.shape)}, not {tuple(expected.shape)}")
            return
        error = ((found - expected).abs().amax() / expected.abs().amax()).item()
        if not error <= bound:
            self.faults.append(f"{what}: off by {error:.1e} of the largest value")

    def check_packed(self, there: Tensor, here: Tensor, exact: Tensor) -> None:
        """Weights that the device and the CPU have packed, and what both were to hold."""
        self.count += 1
        found, least = ((packed - exact).norm().item() for packed in (there, here))
        if not found <= _PACKED * least:
            self.faults.append(f"packed there: an error of {found:.3g}, on the CPU {least:.3g}")


def self_test(
    device: torch.device, weights: Sequence[tuple[str, QuantSpec]] = WEIGHTS, size: Size = SMALL
) -> Iterator[Verdict]:
    """Each of the weights (format, spec) with the kernel that would be chosen on the device, one after the other.

    A terminal shows which one is at work: a kernel that does not end cannot be told in the table.
    """
    bar = tqdm(weights, desc=f"self-test, {device}", unit="kind", leave=False, disable=None)
    for format_name, spec in bar:
        bar.set_postfix_str(_named(format_name, spec))
        with _one_thread():
            tested = _test(format_name, spec, size, device)
        yield tested


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """On a busy machine threads would wait for each other a hundred times longer than they work on sizes like these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _test(format_name: str, spec: QuantSpec, size: Size, device: torch.device) -> Verdict:
    comparison, kernel = _Comparison(), "none"
    try:
        weight = _Weight.random(format_name, spec, size, device)
        kernel = weight.row.name
        weight.compare_products(comparison)
        weight.compare_others(comparison)
        if size.experts is not None:
            weight.compare_experts(comparison)
        if size.on_cpu:
            weight.compare_packed(comparison)
    except (RuntimeError, HfqError) as failure:  # what native kernels, PyTorch and we raise
        comparison.faults.append(" ".join(str(failure).split()))
    return Verdict(
        weight=_named(format_name, spec),
        kernel=kernel,
        count=comparison.count,
        faults=tuple(comparison.faults),
    )


@dataclass(frozen=True)
class _Weight:
    """A random weight, or a stack of them.

    Attributes:
        exact: before it is packed; on the device that computes what is right, as is `stored`.
        stored: packed there, so that each fault has one cause.
        ready: as the kernel of the device that is tested reads it.
        pack: quantizes a slice of rows.
    """

    size: Size
    exact: Tensor
    slot: PackedSlot
    pack: Encode
    stored: Grid
    ready: Any
    row: KernelRow[Any]
    device: torch.device
    generator: torch.Generator

    @classmethod
    def random(cls, format_name: str, spec: QuantSpec, size: Size, device: torch.device) -> _Weight:
        generator = torch.Generator("cpu" if size.on_cpu else device).manual_seed(0)
        slot = PackedSlot(
            base="weight",
            format=format_name,
            spec=spec,
            out_features=size.rows,
            in_features=size.columns,
            experts=size.experts,
        )
        # In 16 bits, as most are: what kernels of a GPU pack.
        weight = _draw(generator, *slot.float_shape, dtype=torch.bfloat16) * 0.02
        method = ALGORITHMS.get("rtn")

        def round_to_nearest(rows: Tensor) -> QuantizedWeight:
            return method.quantize(rows, spec, method.options)

        packed = pack_weight(weight, slot, round_to_nearest)
        stored = neutral_grid(slot, packed)
        there = {key: tensor.to(device) for key, tensor in packed.items()}
        grid = neutral_grid(slot, there)
        row = dispatch.select(Problem.of(grid)).row
        ready, _ = to_kernel(grid, there, row)
        return cls(size, weight, slot, round_to_nearest, stored, ready, row, device, generator)

    @property
    def reference(self) -> KernelRow[Any]:
        """Dequantizes in PyTorch (or with a GPU's kernel for that alone) and multiplies."""
        return dispatch.rows(type(self.stored))[-1]

    def expected(self, x: Tensor, expert: int, bias: Tensor | None = None) -> Tensor:
        return self.reference.linear(x.float(), self.one(self.stored, expert), bias, False)

    def one(self, stack: Any, expert: int) -> Any:
        """One of a stack, or the one that there is."""
        return stack if self.size.experts is None else stack.expert(expert)

    def draw(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return _draw(self.generator, *shape, dtype=dtype)

    @torch.no_grad()
    def compare_products(self, comparison: _Comparison) -> None:
        """Any number of tokens, in 16 bits; what rounds float activations to 8 bits on its own, as well."""
        one = self.one(self.ready, 0)
        bias = self.draw(self.size.rows, dtype=torch.bfloat16).float()
        modes = [(False, _ROUNDED)]
        if self.device.type == "cpu":  # kernels elsewhere do not look at it
            modes.append((True, _INT8))
        for tokens in self.size.tokens:
            # Numbers that both have.
            x = self.draw(tokens, self.size.columns, dtype=torch.bfloat16)
            expected = self.expected(x, 0, bias)
            for dtype, (int8, bound) in itertools.product(_HALVES, modes):
                y = self.row.linear(
                    x.to(self.device, dtype), one, bias.to(self.device, dtype), int8
                )
                how = " in int8" if int8 else ""
                name = str(dtype).removeprefix("torch.")
                comparison.check(f"{tokens} tokens of {name}{how}", y, expected, bound)

    def compare_others(self, comparison: _Comparison) -> None:
        """The weight itself, some of its rows, gradients."""
        one, dtype = self.one(self.ready, 1), torch.bfloat16
        exact = self.reference.dequantize(self.one(self.stored, 1), torch.float32)
        with torch.no_grad():
            found = self.row.dequantize(one, torch.float32)
            comparison.check("dequantized", found, exact, _EXACT)
            index = torch.randint(
                self.size.rows, (9,), generator=self.generator, device=exact.device
            )
            found = self.row.lookup(one, index.to(self.device), torch.float32)
            comparison.check("rows looked up", found, exact[index], _EXACT)

        x = self.draw(6, self.size.columns, dtype=dtype).to(self.device).requires_grad_()
        gradient = self.draw(6, self.size.rows, dtype=dtype)
        y = self.row.linear(x, one, None, False)
        (found,) = torch.autograd.grad(y, x, gradient.to(self.device))
        comparison.check("gradient", found, gradient.float() @ exact, _ROUNDED)

    @torch.no_grad()
    def compare_experts(self, comparison: _Comparison) -> None:
        """Tokens of each, and none of one."""
        counts = torch.tensor((7, 0, 13))
        x = self.draw(int(counts.sum()), self.size.columns, dtype=torch.bfloat16)
        parts = x.split_with_sizes(counts.tolist())
        expected = torch.cat([self.expected(part, e) for e, part in enumerate(parts)])
        there = (x.to(self.device), counts.to(self.device))
        found = self.row.experts(*there, self.ready, None, False)
        comparison.check("experts", found, expected, _ROUNDED)

    def compare_packed(self, comparison: _Comparison) -> None:
        """What the device makes of the weight."""
        packed = pack_weight(self.exact.to(self.device), self.slot, self.pack)
        back = neutral_grid(self.slot, {key: tensor.cpu() for key, tensor in packed.items()})
        there, here = (
            self.reference.dequantize(self.one(grid, 1), torch.float32)
            for grid in (back, self.stored)
        )
        exact = self.exact if self.size.experts is None else self.exact[1]
        comparison.check_packed(there, here, exact.float())


def _draw(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)


def _named(format_name: str, spec: QuantSpec) -> str:
    """Such as "int 4 bits asymmetric", "int8 dynamic", "nf4"."""
    parts = [format_name]
    if format_name in ("int", "spqr"):
        parts.append(f"{spec.bits} bits")
    if format_name == "int" and not spec.sym:
        parts.append("asymmetric")
    return " ".join([*parts, *([spec.activation] if spec.activation else [])])
