"""Operators on CUDA's layouts and their kernel rows, on the CPU: what a GPU computes is in test_cuda.py and test_cuda_spqr.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

import pytest
import spqr_weights
import torch
from torch import Tensor

from hfq.core import affine
from hfq.core.spec import CodebookSpec, Fp8Spec, Int8Spec, IntSpec, QuantSpec
from hfq.core.weight import PackedGrid, SpqrGrid
from hfq.formats import FORMATS
from hfq.kernels import cuda, cuda_int8_ops, cuda_ops, cuda_spqr, cuda_spqr_ops, dispatch, fp8_ops
from hfq.kernels.neutral_spqr import operands, sizes
from hfq.kernels.row import Problem

N, K = 40, 136

WEIGHTS: dict[str, tuple[str, QuantSpec]] = {
    "2 bits, zeros": ("int", IntSpec(bits=2, group_size=32, sym=False)),
    "3 bits": ("int", IntSpec(bits=3, group_size=64)),
    "4 bits, zeros, bfloat16 scales": (
        "int",
        IntSpec(bits=4, group_size=32, sym=False, scale_dtype="bfloat16"),
    ),
    "8 bits, one group": ("int8", Int8Spec()),
    "nf4, double quantization": ("nf4", CodebookSpec(group_size=64, double_quant=True)),
    **{str(spec): ("spqr", spec) for spec in spqr_weights.SPECS},
}
ONE_OF_EACH = [("int", IntSpec(group_size=32)), ("spqr", spqr_weights.SPECS[0])]


class Fragments:
    """Layout fragments, operators ``hfq::cuda_*``."""

    prefix, module, row = "cuda", cuda_ops, cuda.CudaFragments()

    def prepared(self, grid: PackedGrid) -> PackedGrid:
        return replace(
            grid,
            qweight=self.row.prepare(grid.qweight, grid.bits),
            scales=self.row.prepare(grid.scales, grid.bits),
            zeros=None if grid.zeros is None else self.row.prepare(grid.zeros, grid.bits),
        )

    def restored(self, ready: PackedGrid, grid: PackedGrid) -> dict[str, Tensor]:
        """What `prepared` changed, as it is in `grid` again."""
        names = [name for name in ("qweight", "scales", "zeros") if getattr(grid, name) is not None]
        return {
            name: self.row.restore(getattr(ready, name), getattr(grid, name).shape, grid.bits)
            for name in names
        }

    def arguments(self, grid: PackedGrid, *between: object) -> tuple[object, ...]:
        ready = (grid.qweight, grid.scales, grid.zeros, grid.codebook)
        return (*ready, *between, grid.bits, grid.group_size, grid.in_features, grid.out_features)


class Spqr:
    """Layouts of format spqr, operators ``hfq::cuda_spqr_*``."""

    prefix, module, row = "cuda_spqr", cuda_spqr_ops, cuda_spqr.CudaSpqr()

    def prepared(self, grid: SpqrGrid) -> SpqrGrid:
        return spqr_weights.prepared(grid)

    def restored(self, ready: SpqrGrid, grid: SpqrGrid) -> dict[str, Tensor]:
        assert self.row.prepare(grid.stats, grid.bits) is grid.stats
        codes = self.row.restore(ready.qweight, tuple(grid.qweight.shape), grid.bits)
        shape = tuple(grid.stat_codes.shape)
        stats = self.row.restore_stats(ready.stat_codes, shape, grid.stat_bits)
        return {"qweight": codes, "stat_codes": stats}

    def arguments(self, grid: SpqrGrid, *between: object) -> tuple[object, ...]:
        return (*operands(grid), *between, *sizes(grid), grid.out_features)


LAYOUTS: dict[type, Any] = {PackedGrid: Fragments(), SpqrGrid: Spqr()}


def stored(weight: Tensor, format_name: str, spec: QuantSpec) -> Any:
    """A weight in the neutral layout."""
    quantized = affine.encode(weight, *affine.range_grid(weight, spec), spec)
    packed_format = FORMATS.get(format_name)
    return packed_format.grid(packed_format.pack(quantized), spec, *weight.shape)


@pytest.fixture(params=WEIGHTS.values(), ids=WEIGHTS.keys())
def grid(request: pytest.FixtureRequest, random_weight: Callable[..., Tensor]) -> Any:
    return stored(random_weight(N, K), *request.param)


@pytest.fixture
def layout(grid: Any) -> Any:
    return LAYOUTS[type(grid)]


@pytest.fixture
def op(layout: Any) -> Callable[[str], Any]:
    return lambda name: getattr(torch.ops.hfq, f"{layout.prefix}_{name}")


def dense(grid: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return dispatch.rows(type(grid))[-1].dequantize(grid, dtype)


# ---- operators


def test_dequantize_is_that_of_the_stored_weight(grid: Any, layout: Any, op: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = op("dequantize")(*layout.arguments(layout.prepared(grid)), dtype)
        assert torch.equal(weight, dense(grid, dtype))


@pytest.mark.parametrize("chunk", [1, 1 << 30])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_and_their_gradients(
    monkeypatch: pytest.MonkeyPatch,
    generator: torch.Generator,
    grid: Any,
    layout: Any,
    op: Any,
    with_bias: bool,
    chunk: int,
) -> None:
    monkeypatch.setattr(layout.module, "CHUNK", chunk)
    ready, weight = layout.prepared(grid), dense(grid)
    for shape in ((5,), (2, 3), (0,)):
        x = torch.randn(*shape, K, generator=generator, requires_grad=True)
        bias = torch.randn(N, generator=generator, requires_grad=True) if with_bias else None
        leaves = [x, *([] if bias is None else [bias])]
        grad = torch.randn(*shape, N, generator=generator)
        expected = torch.nn.functional.linear(x, weight, bias)
        expected_grads = torch.autograd.grad(expected, leaves, grad)
        for name in ("linear", "linear_dequantized"):
            y = op(name)(x, *layout.arguments(ready, bias))
            torch.testing.assert_close(y, expected)
            for one, other in zip(
                torch.autograd.grad(y, leaves, grad), expected_grads, strict=True
            ):
                torch.testing.assert_close(one, other)


def test_gradients_of_gradients(
    generator: torch.Generator, grid: Any, layout: Any, op: Any
) -> None:
    arguments = layout.arguments(layout.prepared(grid))
    grad = torch.randn(1, N, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda grad: op("linear_gradient")(grad, *arguments), grad)


def test_opcheck(generator: torch.Generator, grid: Any, layout: Any, op: Any) -> None:
    ready = layout.prepared(grid)
    arguments = layout.arguments(ready)
    x = torch.randn(3, K, generator=generator, requires_grad=True)
    bias = torch.randn(N, generator=generator, requires_grad=True)
    grad = torch.randn(3, N, generator=generator, requires_grad=True)
    index = torch.randint(N, (5,), generator=generator)
    for name, inputs in (
        ("dequantize", (*arguments, torch.bfloat16)),
        ("lookup", (index, *arguments, torch.float16)),
        ("linear", (x, *layout.arguments(ready, bias))),
        ("linear_dequantized", (x, *layout.arguments(ready, None))),
        ("linear_gradient", (grad, *arguments)),
    ):
        torch.library.opcheck(op(name).default, inputs)


PRODUCTS = ("dequantize", "lookup", "linear", "linear_dequantized", "linear_gradient")


@pytest.mark.parametrize(
    ("module", "prefix", "names"),
    [
        (cuda_ops, "cuda_", (*PRODUCTS, "experts_linear")),
        (cuda_spqr_ops, "cuda_spqr_", PRODUCTS),
        (cuda_int8_ops, "cuda_", ("quantize_tokens", "scale_sums")),
        (cuda_int8_ops, "cuda_int8_", ("linear", "linear_cublas")),
        (fp8_ops, "fp8_", ("dequantize", "linear", "scaled_linear")),
        (fp8_ops, "cuda_fp8_", ("quantize_tokens", "linear")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_operator_has_a_schema_and_a_line_in_the_docstring(
    module: ModuleType, prefix: str, names: tuple[str, ...]
) -> None:
    assert module.__doc__ is not None
    for name in names:
        schema = getattr(torch.ops.hfq, prefix + name).default._schema
        assert str(schema).startswith(f"hfq::{prefix}{name}(")
        assert f"    {prefix}{name} " in module.__doc__


# ---- kernel rows


def test_row(generator: torch.Generator, grid: Any, layout: Any) -> None:
    row, ready = layout.row, layout.prepared(grid)
    assert torch.equal(row.dequantize(ready, torch.float64), dense(grid, torch.float64))
    index = torch.randint(N, (5,), generator=generator)
    assert torch.equal(row.lookup(ready, index, torch.bfloat16), dense(grid, torch.bfloat16)[index])
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for shape in ((1,), (2, 20), (2, 0), ()):
            x = torch.randn(*shape, K, generator=generator).to(dtype)
            expected = torch.nn.functional.linear(x, dense(grid, dtype))
            y = row.linear(x, ready, None, False)
            assert y.dtype == dtype
            torch.testing.assert_close(y, expected)


def test_row_restores_what_it_prepared(grid: Any, layout: Any) -> None:
    ready = layout.prepared(grid)
    for name, tensor in layout.restored(ready, grid).items():
        neutral = getattr(grid, name)
        assert getattr(ready, name).dim() != neutral.dim()
        assert torch.equal(tensor, neutral)


def experts_of(format_name: str, spec: QuantSpec, random_weight: Any) -> tuple[list[Any], Any]:
    """Three weights as they are stored, and their stack in the kernel's layout."""
    experts = [stored(random_weight(N, K), format_name, spec) for _ in range(3)]
    first = experts[0]
    names = [each.name for each in fields(first) if isinstance(getattr(first, each.name), Tensor)]
    stack = {name: torch.stack([getattr(one, name) for one in experts]) for name in names}
    return experts, LAYOUTS[type(first)].prepared(replace(first, **stack))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("format_name", "spec"), ONE_OF_EACH)
def test_experts(
    generator: torch.Generator,
    random_weight: Callable[..., Tensor],
    format_name: str,
    spec: QuantSpec,
    dtype: torch.dtype,
) -> None:
    experts, stack = experts_of(format_name, spec, random_weight)
    row = LAYOUTS[type(stack)].row
    x = torch.randn(5, K, generator=generator).to(dtype)
    linear = torch.nn.functional.linear
    for bias in (None, torch.randn(3, N, generator=generator).to(dtype)):
        of = [None] * 3 if bias is None else bias
        parts = [
            linear(x[:3], dense(experts[0], dtype), of[0]),
            linear(x[3:], dense(experts[2], dtype), of[2]),
        ]
        y = row.experts(x, torch.tensor([3, 0, 2]), stack, bias, False)
        assert y.dtype == dtype
        torch.testing.assert_close(y, torch.cat(parts))
        few = row.experts(x[:3], torch.tensor([3, 0, 0]), stack, bias, False)
        torch.testing.assert_close(few, parts[0])


def test_experts_whose_counts_nobody_waits_for(
    monkeypatch: pytest.MonkeyPatch,
    generator: torch.Generator,
    random_weight: Callable[..., Tensor],
) -> None:
    experts, stack = experts_of("int", IntSpec(group_size=32), random_weight)
    row = cuda.CudaFragments()
    x = torch.randn(5, K, generator=generator).half()
    for products, most in ((1, cuda.MAX_EXPERT_TOKENS), (300 * N * K, 300)):
        monkeypatch.setattr(cuda, "_EXPERT_PRODUCTS", products)
        assert row.reads_counts_on_device(x, 3 * most, stack)
        assert not row.reads_counts_on_device(x, 3 * most + 1, stack)
    assert not row.reads_counts_on_device(x.float(), 5, stack)
    learning = x.clone().requires_grad_()
    assert not row.reads_counts_on_device(learning, 5, stack)
    with torch.no_grad():
        assert row.reads_counts_on_device(learning, 5, stack)
    counts = torch.tensor([0, 2, 1])
    y = row.experts(x, counts, stack, None, False)
    torch.testing.assert_close(y[:2], x[:2] @ dense(experts[1], torch.float16).T)
    assert not y[3:].any()
    arguments = (x, counts, *LAYOUTS[PackedGrid].arguments(stack, None))
    torch.library.opcheck(torch.ops.hfq.cuda_experts_linear.default, arguments)


def test_stack(random_weight: Callable[..., Tensor]) -> None:
    spec, layout = IntSpec(group_size=32, sym=False), LAYOUTS[PackedGrid]
    grids = [stored(random_weight(rows, K), "int", spec) for rows in (32, 16)]
    row = layout.row
    stacked = row.stack([layout.prepared(grid) for grid in grids])
    assert stacked is not None
    whole, parts = stacked
    weights = [row.dequantize(part, torch.float32) for part in parts]
    assert torch.equal(row.dequantize(whole, torch.float32), torch.cat(weights))
    assert all(torch.equal(w, dense(grid)) for w, grid in zip(weights, grids, strict=True))
    assert parts[0].qweight.data_ptr() == whole.qweight.data_ptr()
    assert row.stack([layout.prepared(stored(random_weight(N, K), "int", spec))] * 2) is None


# Changes of a problem, and words of the reason.
REFUSED: dict[str, tuple[tuple[dict[str, Any], str], ...]] = {
    "int": (
        ({"bits": 5}, "not 5"),
        ({"bits": 3, "has_codebook": True}, "codebooks of 4 bits"),
        ({"has_g_idx": True}, "g_idx"),
        ({"in_features": 100}, "multiples of 8"),
        ({"in_features": 1 << 20}, "below 1048576"),
        ({"group_size": 48}, "multiples of 32, not 48"),
        ({"activation": "dynamic"}, "8-bit ones (dynamic)"),
    ),
    "spqr": (
        ({"bits": 5}, "takes 2, 3 and 4 bits, not 5"),
        ({"in_features": 100}, "multiples of 8"),
        ({"in_features": 1 << 19}, "below 524288"),
        ({"group_size": 8}, "multiples of 16 columns, those of one matrix instruction, not 8"),
        ({"stat_group_size": 8}, "stat_group_size in multiples of 16, not 8"),
    ),
}


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize(
    ("format_name", "spec", "most"),
    [
        ("int", IntSpec(group_size=32), 1536),
        ("int", IntSpec(group_size=32, sym=False), 768),
        ("nf4", CodebookSpec(group_size=32), 1536),
        ("fp8", Fp8Spec(), 1536),
    ],
)
def test_how_many_tokens_read_the_packed_weight(
    monkeypatch: pytest.MonkeyPatch,
    random_weight: Callable[..., Tensor],
    capability: tuple[int, int],
    format_name: str,
    spec: QuantSpec,
    most: int,
) -> None:
    """More where the GPU has pairs of blocks and the weight is large (kernels/cuda/wgmma_pair.h)."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    grid = stored(random_weight(N, K), format_name, spec)
    device, large = torch.device("cuda"), capability == (9, 0)
    for out_features, tokens in ((4096, 192), (4104, most if large else 192)):
        wide = replace(grid, in_features=8192, out_features=out_features)
        assert cuda.max_direct_tokens(wide, device, torch.bfloat16) == tokens
    other = wide.scales.dtype != torch.float16
    through_floats = 768 if large and other else tokens
    assert cuda.max_direct_tokens(wide, device, torch.float16) == through_floats
    cut = replace(wide, in_features=8200)
    assert cuda.max_direct_tokens(cut, device, torch.float16) == 192
    assert cuda.max_direct_tokens(cut, device, torch.bfloat16) == tokens
    monkeypatch.setenv("HFQ_CUDA_WGMMA", "0")
    assert cuda.max_direct_tokens(wide, device, torch.bfloat16) == 192


@pytest.mark.parametrize(("format_name", "spec"), ONE_OF_EACH)
def test_reasons_to_refuse(
    machine: Callable[..., None],
    random_weight: Callable[..., Tensor],
    format_name: str,
    spec: QuantSpec,
) -> None:
    grid = stored(random_weight(N, K), format_name, spec)
    row, problem = LAYOUTS[type(grid)].row, Problem.of(grid)
    assert row.reject(problem) == "runs on cuda, the weight is on cpu"
    problem = replace(problem, device="cuda")
    for changes, words in REFUSED[format_name]:
        reason = row.reject(replace(problem, **changes))
        assert reason is not None and words in reason, changes
    machine((8, 0), kernels=False)
    assert row.reject(problem) == "native CUDA kernels are not loaded: no nvcc"
    machine((9, 5), (7, 5))
    assert row.reject(problem) == "needs GPUs of compute capability 8.0 or later, found 7.5"
    machine((8, 0), (8, 0))
    assert row.reject(problem) is None
    assert row.reject(replace(problem, in_features=40, group_size=40)) is None
