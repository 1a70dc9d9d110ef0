"""QuantLinear: equal to `nn.functional.linear` on the dequantized weight, forwards and backwards."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from hfq.core.errors import WeightError
from hfq.core.spec import IntSpec, QuantSpec, SpqrSpec
from hfq.kernels import dense_products, native
from hfq.nn.linear import QuantLinear

# With one group per weight and float32 scales, code 0 of a symmetric grid stands for exactly that weight.
LOSSLESS = IntSpec(bits=4, group_size=1, scale_dtype="float32")

# Relative to the largest output. float16 and bfloat16: the rounding of the result.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def quantized(
    out_features: int,
    in_features: int,
    generator: torch.Generator,
    *,
    format: str = "int",
    spec: QuantSpec = IntSpec(group_size=16),  # noqa: B008  (frozen)
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> QuantLinear:
    linear = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    packed = QuantLinear.from_linear(linear, format=format, spec=spec)
    packed.kernel_mode = "exact"
    return packed


def expected(packed: QuantLinear, x: Tensor) -> Tensor:
    # Not `packed.dequantize()`: that rounds to the dtype of the virtual weight, and x may have another.
    weight = packed.kernel("weight").dequantize(packed.grid("weight"), torch.float32).to(x.dtype)
    return nn.functional.linear(x, weight, None if packed.bias is None else packed.bias.to(x.dtype))


def close(actual: Tensor, wanted: Tensor) -> None:
    assert actual.dtype == wanted.dtype and actual.shape == wanted.shape
    if not wanted.numel():
        return
    error = (actual.double() - wanted.double()).abs().max()
    assert error <= TOLERANCE[wanted.dtype] * max(1.0, wanted.abs().max().item())


# ---- forward and backward


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 13), (33, 130), (48, 64), (17, 300)])
def test_every_format_at_odd_sizes(
    rows: int, columns: int, format_and_spec: tuple[str, QuantSpec], generator: torch.Generator
) -> None:
    format, spec = format_and_spec
    packed = quantized(rows, columns, generator, format=format, spec=spec)
    for tokens in (1, 5, 40):
        x = torch.randn(tokens, columns, generator=generator, requires_grad=True)
        y, wanted = packed(x), expected(packed, x)
        close(y, wanted)
        grad = torch.randn(y.shape, generator=generator)
        close(torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(wanted, x, grad)[0])


def views(columns: int, generator: torch.Generator) -> dict[str, Tensor]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "1-D": randn(columns),
        "2-D": randn(3, columns),
        "3-D": randn(2, 3, columns),
        "4-D": randn(2, 1, 3, columns),
        "no tokens": randn(0, columns),
        "no batch": randn(2, 0, 3, columns),
        "transposed": randn(columns, 5).T,
        "strided columns": randn(4, 2 * columns)[:, ::2],
        "strided rows": randn(8, columns)[::2],
        "expanded": randn(1, 1, columns).expand(2, 3, columns),
        "permuted, many tokens": randn(6, columns, 7).permute(0, 2, 1),
    }


@pytest.mark.parametrize("shape", views(8, torch.Generator()).keys())
@pytest.mark.parametrize("bits", [3, 4, 8])  # 3: no native kernel
def test_shapes_and_strides(shape: str, bits: int, generator: torch.Generator) -> None:
    packed = quantized(24, 40, generator, spec=IntSpec(bits=bits, group_size=8))
    packed.bias.requires_grad_(True)
    x = views(40, generator)[shape].requires_grad_(True)
    y, wanted = packed(x), expected(packed, x)
    close(y, wanted)
    grad = torch.randn(y.shape, generator=generator)
    inputs = (x, packed.bias)
    for actual, reference in zip(
        torch.autograd.grad(y, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True
    ):
        close(actual, reference)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(
    bits: int, dtype: torch.dtype, weight_dtype: torch.dtype, generator: torch.Generator
) -> None:
    """The output has the dtype of x, whatever the dtype of the weight."""
    packed = quantized(
        24, 32, generator, spec=IntSpec(bits=bits, group_size=16), dtype=weight_dtype
    )
    for tokens in (2, 33):
        x = torch.randn(tokens, 32, generator=generator).to(dtype).requires_grad_(True)
        y = packed(x)
        wanted = expected(packed, x.double()).to(dtype)
        close(y, wanted)
        grad = torch.randn(y.shape, generator=generator).to(dtype)
        close(*(torch.autograd.grad(out, x, grad)[0] for out in (y, wanted)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_autocast_computes_and_answers_like_a_float_linear(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    packed = quantized(24, 32, generator, dtype=dtype)
    reference = nn.Linear(32, 24, dtype=dtype)
    x = torch.randn(3, 32, generator=generator).to(dtype).requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, wanted = packed(x), reference(x)
        assert y.dtype == wanted.dtype
        if dtype != torch.float64:
            close(y, expected(packed, x.bfloat16()))
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype
    with torch.autocast("cpu", enabled=False):
        assert packed(x).dtype == dtype


def test_gradients_of_a_linear_without_bias_and_of_a_frozen_input(
    generator: torch.Generator,
) -> None:
    packed = quantized(24, 32, generator, bias=False)
    x = torch.randn(3, 32, generator=generator)
    assert packed.bias is None and not packed(x).requires_grad
    assert not any(parameter.requires_grad for parameter in packed.parameters())


@pytest.mark.parametrize("spec", [LOSSLESS, IntSpec(group_size=16), IntSpec(bits=3, group_size=16)])
def test_first_and_second_derivatives(spec: IntSpec, generator: torch.Generator) -> None:
    """By finite differences in float64; the function is linear, so the second derivative in x is 0."""
    packed = quantized(5, 16, generator, spec=spec)
    packed.bias.data = packed.bias.data.double()
    packed.bias.requires_grad_(True)
    x = torch.randn(3, 16, generator=generator, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(packed, {"bias": bias}, (x,))

    # The kernels compute in float32 on purpose; float64 goes through the reference.
    assert torch.autograd.gradcheck(call, (x, packed.bias), atol=1e-3, eps=1e-2)
    assert torch.autograd.gradgradcheck(call, (x, packed.bias), atol=1e-3, eps=1e-2)


def saved_into(found: list[Tensor]) -> torch.autograd.graph.saved_tensors_hooks:
    """Collects what autograd saves inside the block."""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t)


def test_only_packed_tensors_are_saved_for_backward(
    format_and_spec: tuple[str, QuantSpec], generator: torch.Generator
) -> None:
    format, spec = format_and_spec
    packed = quantized(64, 96, generator, format=format, spec=spec)
    packed.prepare()
    held = {p.untyped_storage().data_ptr() for p in packed.parameters()}
    held |= {
        t.untyped_storage().data_ptr()
        for t in vars(packed.grid("weight")).values()
        if isinstance(t, Tensor)
    }
    for tokens in (3, 40):
        saved: list[Tensor] = []
        x = torch.randn(tokens, 96, generator=generator, requires_grad=True)
        with saved_into(saved):
            y = packed(x)
        assert saved
        assert all(t.untyped_storage().data_ptr() in held for t in saved)
        assert not any(t.is_floating_point() and t.numel() >= 64 * 96 for t in saved)
        y.sum().backward()


def test_new_codes_leave_a_pending_backward_alone(generator: torch.Generator) -> None:
    packed = quantized(24, 32, generator)
    x = torch.randn(3, 32, generator=generator, requires_grad=True)
    y, before = packed(x), packed.dequantize()
    packed.requantize("weight", torch.randn(24, 32, generator=generator))
    y.backward(torch.ones_like(y))
    close(x.grad, torch.ones(3, 24) @ before)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("shape", [(2, 32), (2, 3, 32), (1, 40, 32), (32,)])
def test_outputs_may_be_changed_in_place(
    shape: tuple[int, ...], bits: int, generator: torch.Generator
) -> None:
    """Adapters do that: `result += lora(x)`."""
    packed = quantized(24, 32, generator, spec=IntSpec(bits=bits, group_size=16))
    x = torch.randn(shape, generator=generator, requires_grad=True)
    y = packed(x)
    y += 2 * y.detach()
    y *= 3
    close(torch.autograd.grad(y.sum(), x)[0], (3 * packed.dequantize().sum(0)).expand(shape))


# ---- kernel modes


def test_int8_activations_only_where_asked_or_harmless(generator: torch.Generator) -> None:
    packed = quantized(24, 32, generator)
    packed.kernel_mode = "auto"
    x = torch.randn(2, 32, generator=generator)
    cases = itertools.product(
        (torch.float32, torch.bfloat16, torch.float16, torch.float64), (True, False), (True, False)
    )
    for dtype, training, needs_grad in cases:
        packed.train(training)
        token = x.to(dtype).requires_grad_(needs_grad)
        wanted = dtype in (torch.bfloat16, torch.float16) and not training and not needs_grad
        assert packed.int8_activations(token) == wanted
        with torch.no_grad():
            # Checkpointed blocks of a model in training run without gradients first.
            assert packed.int8_activations(token) == (
                dtype in (torch.bfloat16, torch.float16) and not training
            )
    for mode in ("exact", "int8"):
        packed.kernel_mode = mode
        assert packed.int8_activations(x) == (mode == "int8")


def test_int8_activations_cost_little(generator: torch.Generator) -> None:
    packed = quantized(64, 256, generator, spec=IntSpec(group_size=32))
    x = torch.randn(4, 256, generator=generator)
    exact = packed(x)
    packed.kernel_mode = "int8"
    error = (packed(x) - exact).norm() / exact.norm()
    assert error < 0.02


# ---- making one


def test_from_linear_copies_what_a_linear_has(generator: torch.Generator) -> None:
    linear = nn.Linear(32, 24, dtype=torch.bfloat16).eval()
    packed = QuantLinear.from_linear(linear, format="int", spec=IntSpec(bits=8, group_size=16))
    assert (packed.in_features, packed.out_features, packed.training) == (32, 24, False)
    assert packed.compute_dtype == packed.weight.dtype == torch.bfloat16
    assert torch.equal(packed.bias, linear.bias) and packed.bias is not linear.bias
    error = (packed.dequantize() - linear.weight).abs().max()
    assert error <= linear.weight.abs().max() / 100
    assert "format=int, bits=8, group_size=16" in repr(packed)


def test_lossless_format_is_lossless(generator: torch.Generator) -> None:
    weight = torch.randn(24, 33, generator=generator)
    weight[0, :3] = torch.tensor([0.0, -0.0, 1e-30])
    packed = QuantLinear(33, 24, format="int", spec=LOSSLESS)
    packed.requantize("weight", weight)
    assert torch.equal(packed.dequantize(), weight)


def test_construction_allocates_no_float_weight() -> None:
    class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self.largest = max(self.largest, tensor.untyped_storage().nbytes())
            return out

    with Allocations() as seen:
        packed = QuantLinear(8192, 8192, format="int", spec=IntSpec(group_size=128))
    codes = 8192 * 8192 // 2
    assert seen.largest == codes
    assert sum(p.nbytes for p in packed.parameters()) < 1.1 * codes


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    linear = nn.Linear(32, 24)
    linear.weight.data[3, 4] = value
    with pytest.raises(WeightError, match="finite"):
        QuantLinear.from_linear(linear, format="int", spec=IntSpec(group_size=16))


def test_wrong_shape_is_refused() -> None:
    packed = QuantLinear(32, 24, format="int", spec=IntSpec(group_size=16))
    with pytest.raises(WeightError, match=r"\(24, 32\).*\(32, 24\)"):
        packed.requantize("weight", torch.zeros(32, 24))


def test_new_values_have_groups_of_neighbours(generator: torch.Generator) -> None:
    """Also where the groups of what was there before followed an order, and over several slices of rows."""
    spec = IntSpec(bits=8, group_size=16, static_groups=False)
    linear = nn.Linear(4100, 600, bias=False)
    packed = QuantLinear.from_linear(linear, format="int", spec=spec)
    assert packed.packed_parameters("weight")["weight_g_idx"].tolist() == [
        k // 16 for k in range(4100)
    ]
    usual = QuantLinear.from_linear(linear, format="int", spec=replace(spec, static_groups=True))
    assert torch.equal(packed.dequantize(), usual.dequantize())
    x = torch.randn(3, 4100, generator=generator)
    torch.testing.assert_close(packed(x), x @ usual.dequantize().T, rtol=1e-4, atol=1e-4)


# ---- many tokens


@pytest.mark.parametrize(
    ("format", "spec"),
    [("int", IntSpec(bits=3, group_size=32)), ("spqr", SpqrSpec(bits=3))],
    ids=["int3", "spqr"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_processors_without_16_bit_products_multiply_in_float32(
    dtype: torch.dtype,
    format: str,
    spec: QuantSpec,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed = quantized(48, 64, generator, format=format, spec=spec, dtype=dtype)
    if not packed.kernel("weight").name.startswith("cpu_"):
        pytest.skip("needs the native CPU kernels")
    monkeypatch.setattr(dense_products, "_SLOW_DTYPES", frozenset({dtype}))
    x = torch.randn(40, 64, generator=generator).to(dtype).requires_grad_()
    with native.use_isa("generic"):  # no matrix units
        y = packed(x)
    grad = torch.randn(y.shape, generator=generator).to(dtype)
    y.backward(grad)
    close(y.detach(), expected(packed, x.detach()))
    assert x.grad is not None
    close(x.grad, grad @ packed.dequantize())


def test_without_matrix_units_integer_products_take_any_number_of_tokens(
    generator: torch.Generator,
) -> None:
    packed = quantized(48, 64, generator, bias=False, dtype=torch.bfloat16).eval()
    if not packed.kernel("weight").name.startswith("cpu_"):
        pytest.skip("needs the native CPU kernels")
    packed.kernel_mode = "int8"
    x = torch.randn(300, 64, generator=generator).bfloat16()
    with native.use_isa("generic"), torch.no_grad():
        # Rows do not depend on how many others there are.
        assert torch.equal(packed(x), torch.cat([packed(part) for part in x.split(100)]))
