"""Operators ``hfq::dequantize`` and ``hfq::linear``: schema, shapes, gradients, compilation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hfq.core import affine
from hfq.core.spec import QuantSpec
from hfq.core.weight import PackedGrid
from hfq.formats import FORMATS
from hfq.kernels import ops, reference

N, K = 24, 37

SETTINGS: dict[str, tuple[str, dict[str, object]]] = {
    "4 bits": ("int", {"group_size": 8}),
    "3 bits, zeros, bfloat16 scales": (
        "int",
        {"bits": 3, "group_size": 8, "sym": False, "scale_dtype": "bfloat16"},
    ),
    "8 bits, one group": ("int8", {}),
    "nf4, double quantization": ("nf4", {"group_size": 8, "double_quant": True}),
}


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS.keys())
def grid(request: pytest.FixtureRequest, random_weight: Callable[..., Tensor]) -> PackedGrid:
    """A packed weight `[N, K]`."""
    format_name, settings = request.param
    return packed(random_weight(N, K), format_name, FORMATS.get(format_name).spec(settings))


@pytest.fixture
def int4(random_weight: Callable[..., Tensor]) -> PackedGrid:
    return packed(random_weight(N, K), "int", FORMATS.get("int").spec({"group_size": 8}))


def packed(weight: Tensor, format_name: str, spec: QuantSpec) -> PackedGrid:
    quantized = affine.encode(weight, *affine.range_grid(weight, spec), spec)
    packed_format = FORMATS.get(format_name)
    return packed_format.grid(packed_format.pack(quantized), spec, *weight.shape)


def operands(grid: PackedGrid) -> tuple[Tensor | None, ...]:
    return (grid.qweight, grid.scales, grid.zeros, grid.codebook, grid.g_idx)


def sizes(grid: PackedGrid) -> tuple[int, int, int]:
    return (grid.bits, grid.group_size, grid.in_features)


def dequantize(grid: PackedGrid, dtype: torch.dtype) -> Tensor:
    weight: Tensor = torch.ops.hfq.dequantize(*operands(grid), *sizes(grid), dtype)
    return weight


def linear(x: Tensor, grid: PackedGrid, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.hfq.linear(x, *operands(grid), bias, *sizes(grid))
    return y


def inputs(generator: torch.Generator) -> dict[str, Tensor]:
    """Activations `[..., K]` of every kind of shape."""
    return {
        "2-D": torch.randn(3, K, generator=generator),
        "3-D": torch.randn(2, 3, K, generator=generator),
        "one token": torch.randn(1, K, generator=generator),
        "1-D": torch.randn(K, generator=generator),
        "empty": torch.randn(0, K, generator=generator),
        "empty, 3-D": torch.randn(2, 0, K, generator=generator),
        "transposed": torch.randn(K, 5, generator=generator).T,
        "every other row": torch.randn(6, 2, K, generator=generator)[::2],
        "part of the columns": torch.randn(4, K + 3, generator=generator)[:, 2:-1],
        "broadcast": torch.randn(1, K, generator=generator).expand(4, K),
    }


# ---- values


def test_dequantize_is_the_reference(grid: PackedGrid) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = reference.dequantize(*operands(grid), *sizes(grid), dtype)  # type: ignore[arg-type]
        assert torch.equal(dequantize(grid, dtype), expected)


@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_is_the_product_with_the_dequantized_weight(
    with_bias: bool, grid: PackedGrid, generator: torch.Generator
) -> None:
    bias = torch.randn(N, generator=generator) if with_bias else None
    weight = dequantize(grid, torch.float32)
    for kind, x in inputs(generator).items():
        y = linear(x, grid, bias)
        assert y.shape == (*x.shape[:-1], N), kind
        torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias), msg=kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_result_has_the_dtype_of_x(
    dtype: torch.dtype, int4: PackedGrid, generator: torch.Generator
) -> None:
    x = torch.randn(3, K, generator=generator).to(dtype)
    bias = torch.randn(N, generator=generator)
    expected = torch.nn.functional.linear(x, dequantize(int4, dtype), bias.to(dtype))
    torch.testing.assert_close(linear(x, int4, bias), expected)


def test_autocast_leaves_the_dtype_of_x(int4: PackedGrid, generator: torch.Generator) -> None:
    """Who wants another one casts x: the fake cannot know what autocast does inside."""
    x = torch.randn(3, K, generator=generator, requires_grad=True)
    expected = linear(x, int4, None)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, int4, None)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


# ---- gradients


@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_are_those_of_the_dequantized_weight(
    with_bias: bool, grid: PackedGrid, generator: torch.Generator
) -> None:
    weight = dequantize(grid, torch.float32)
    for kind, x in inputs(generator).items():
        bias = torch.randn(N, generator=generator) if with_bias else None
        grad = torch.randn(*x.shape[:-1], N, generator=generator)
        ours = gradients(lambda x, bias: linear(x, grid, bias), x, bias, grad)
        expected = gradients(
            lambda x, bias: torch.nn.functional.linear(x, weight, bias), x, bias, grad
        )
        assert len(ours) == 1 + with_bias
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other, msg=kind)


def gradients(
    function: Callable[[Tensor, Tensor | None], Tensor],
    x: Tensor,
    bias: Tensor | None,
    grad: Tensor,
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_()]
    if bias is not None:
        leaves.append(bias.detach().requires_grad_())
    y = function(leaves[0], leaves[1] if bias is not None else None)
    return list(torch.autograd.grad(y, leaves, grad))


def test_gradients_of_16_bit_activations_with_a_float32_bias(
    int4: PackedGrid, generator: torch.Generator
) -> None:
    x = torch.randn(3, K, generator=generator).bfloat16().requires_grad_()
    bias = torch.randn(N, generator=generator, requires_grad=True)
    grad = torch.randn(3, N, generator=generator).bfloat16()
    linear(x, int4, bias).backward(grad)
    assert x.grad is not None and bias.grad is not None
    assert x.grad.dtype == torch.bfloat16 and bias.grad.dtype == torch.float32
    # bfloat16 rounds the weight and the result, or the result alone where float32 products are faster.
    expected = grad.double() @ dequantize(int4, torch.float64)
    assert (x.grad - expected).norm() < 2**-8 * expected.norm()
    torch.testing.assert_close(bias.grad, grad.float().sum(0), atol=0.02, rtol=0.02)


def test_only_the_bias_is_trained(int4: PackedGrid, generator: torch.Generator) -> None:
    x = torch.randn(3, K, generator=generator)
    bias = torch.randn(N, generator=generator, requires_grad=True)
    linear(x, int4, bias).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((N,), 3.0))


def test_training_keeps_no_float_copy_of_the_weight(
    grid: PackedGrid, generator: torch.Generator
) -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(3, K, generator=generator, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear(x, grid, None)
    assert {id(tensor) for tensor in kept} == {id(t) for t in operands(grid) if t is not None}


# ---- as operators of PyTorch


def test_opcheck_dequantize(grid: PackedGrid) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (*operands(grid), *sizes(grid), dtype)
        torch.library.opcheck(torch.ops.hfq.dequantize.default, arguments)
        torch.library.opcheck(torch.ops.hfq.cuda_dequantize_neutral.default, arguments)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("2-D", torch.bfloat16),
        ("3-D", torch.float32),
        ("empty", torch.float32),
        ("transposed", torch.float32),
    ],
)
def test_opcheck_linear(
    kind: str, dtype: torch.dtype, grid: PackedGrid, generator: torch.Generator
) -> None:
    x = inputs(generator)[kind].to(dtype).requires_grad_()
    bias = torch.randn(N, generator=generator, requires_grad=True)
    arguments = (x, *operands(grid), bias, *sizes(grid))
    torch.library.opcheck(torch.ops.hfq.linear.default, arguments)


def test_one_graph_for_all_batch_sizes(int4: PackedGrid, generator: torch.Generator) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def compiled(x: Tensor) -> Tensor:
        return linear(x * 2, int4, None) + 1

    for tokens in (2, 5, 17):
        x = torch.randn(tokens, K, generator=generator)
        torch.testing.assert_close(compiled(x), linear(x * 2, int4, None) + 1)
    assert len(graphs) == 1


def test_compiled_gradients(int4: PackedGrid, generator: torch.Generator) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, int4, bias)

    x = torch.randn(3, K, generator=generator)
    bias, grad = torch.randn(N, generator=generator), torch.randn(3, N, generator=generator)
    ours = gradients(compiled, x, bias, grad)
    expected = gradients(lambda x, bias: linear(x, int4, bias), x, bias, grad)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_shapes_are_known_without_values(int4: PackedGrid) -> None:
    meta = [None if tensor is None else tensor.to("meta") for tensor in operands(int4)]
    x = torch.empty(2, 3, K, device="meta", dtype=torch.bfloat16)
    y = torch.ops.hfq.linear(x, *meta, None, *sizes(int4))
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, N), torch.bfloat16, "meta")
    weight = torch.ops.hfq.dequantize(*meta, *sizes(int4), torch.float16)
    assert (weight.shape, weight.dtype) == ((N, K), torch.float16)


def test_every_operator_has_a_schema_and_a_line_in_the_docstring() -> None:
    assert ops.__doc__ is not None
    for name in (
        "dequantize",
        "cuda_dequantize_neutral",
        "linear",
        "cpu_dequantize",
        "cpu_linear",
        "cpu_linear_dequantized",
        "int8_linear",
        "cpu_int8_linear",
    ):
        assert str(getattr(torch.ops.hfq, name).default._schema).startswith(f"hfq::{name}(")
        assert f"    {name} " in ops.__doc__
