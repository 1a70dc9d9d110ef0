"""Packed modules whose format asks for activations of 8 bits."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from hfq.core.activations import rounded_tokens
from hfq.core.errors import CheckpointError
from hfq.core.spec import Fp8Spec, Int8Spec, activation_dtype
from hfq.diagnose import explain
from hfq.kernels import native
from hfq.nn.linear import QuantLinear
from hfq.nn.packed import KERNEL_MODES

pytestmark = pytest.mark.usefixtures("one_thread")

SCALE = torch.tensor([0.025])

Spec = Int8Spec | Fp8Spec
SPECS: tuple[tuple[str, type[Spec]], ...] = (("int8", Int8Spec), ("fp8", Fp8Spec))


def quantized(
    spec: Spec,
    generator: torch.Generator,
    rows: int = 33,
    columns: int = 70,
    dtype: torch.dtype = torch.float32,
) -> QuantLinear:
    linear = nn.Linear(columns, rows, dtype=dtype)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    packed = QuantLinear.from_linear(linear, format=format_of(spec), spec=spec)
    if spec.activation == "static":
        packed.set_packed(
            "weight", {**packed.neutral_tensors("weight"), "weight_input_scale": SCALE}
        )
    return packed


def format_of(spec: Spec) -> str:
    return next(name for name, kind in SPECS if isinstance(spec, kind))


def expected(packed: QuantLinear, x: Tensor) -> Tensor:
    """The product of the rounded activations with the dequantized weight, in float64."""
    spec = packed.slot.spec
    static = SCALE if spec.activation == "static" else None
    rounded = rounded_tokens(x.reshape(-1, x.shape[-1]), static, activation_dtype(spec))
    rounded = rounded.double().view(x.shape)
    weight = packed.kernel("weight").dequantize(packed.grid("weight"), torch.float32).double()
    return nn.functional.linear(rounded, weight, packed.bias.double())


@pytest.fixture(params=["dynamic", "static"])
def activation(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(params=[kind for _, kind in SPECS], ids=[name for name, _ in SPECS])
def spec(request: pytest.FixtureRequest, activation: str) -> Spec:
    found: Spec = request.param(activation=activation)
    return found


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("spec", [Int8Spec(activation="dynamic"), Fp8Spec(activation="static")])
def test_modules_of_float64(prepared: bool, spec: Spec, generator: torch.Generator) -> None:
    """The bias has their dtype, which native code does not take."""
    packed = quantized(spec, generator, dtype=torch.float64)
    packed.bias.requires_grad_()
    if prepared:
        packed.prepare()
    x = torch.randn(3, 70, dtype=torch.float64, generator=generator).requires_grad_()
    y = packed(x)
    y.sum().backward()
    assert y.dtype == torch.float64 and x.grad is not None and packed.bias.grad is not None
    torch.testing.assert_close(y, expected(packed, x.detach()), rtol=1e-5, atol=1e-5)
    assert torch.equal(packed.bias.grad, torch.full_like(packed.bias, 3.0))


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_and_shape(
    dtype: torch.dtype, prepared: bool, spec: Spec, generator: torch.Generator
) -> None:
    packed = quantized(spec, generator)
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(dtype, 1e-5)
    for shape in ((70,), (3, 70), (2, 3, 70), (0, 70), (300, 70)):
        x = torch.randn(shape, generator=generator).to(dtype)
        for each in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
            row = packed.kernel("weight")
            y = packed(each) if prepared else _as_stored(packed, each)
            wanted = expected(packed, each)
            assert y.dtype == dtype and y.shape == wanted.shape
            largest = wanted.abs().max().item() if wanted.numel() else 1.0
            torch.testing.assert_close(y.double(), wanted, rtol=0, atol=tolerance * largest)
            assert row.name == kernel_of(spec)


def kernel_of(spec: Spec) -> str:
    if isinstance(spec, Fp8Spec):
        return "cpu_fp8" if native.load().cpu else "dequantize_fp8"
    return "cpu_int8" if native.load().cpu else "dequantize"


def _as_stored(packed: QuantLinear, x: Tensor) -> Tensor:
    """What an exported program or an offloaded module computes."""
    operands = packed._as_stored("weight", "asked for by a test")
    return operands.choice.row.linear(x, operands.grid, packed.bias, False)


def test_the_two_layouts_give_the_same_bits(spec: Spec, generator: torch.Generator) -> None:
    packed = quantized(spec, generator)
    packed.bias = None
    x = torch.randn(9, 70, generator=generator)
    operands = packed._as_stored("weight", "asked for by a test")
    stored = operands.choice.row.linear(x, operands.grid, None, False)
    if isinstance(spec, Fp8Spec):  # sums of float32, in another order
        torch.testing.assert_close(packed(x), stored)
    else:
        assert torch.equal(packed(x), stored)


@pytest.mark.parametrize("training", [False, True])
def test_activations_are_rounded_in_every_mode(
    training: bool, spec: Spec, generator: torch.Generator
) -> None:
    packed = quantized(spec, generator).train(training)
    x = torch.randn(4, 70, generator=generator)
    outputs = []
    for mode in KERNEL_MODES:
        packed.kernel_mode = mode
        outputs += [packed(x), packed(x.clone().requires_grad_()).detach()]
    assert all(torch.equal(each, outputs[0]) for each in outputs)
    plain = nn.functional.linear(x, packed.dequantize(), packed.bias)
    assert not torch.allclose(outputs[0], plain, rtol=1e-4)
    torch.testing.assert_close(outputs[0], plain, rtol=0, atol=0.05 * plain.abs().max().item())


def test_gradients_pass_the_rounding(spec: Spec, generator: torch.Generator) -> None:
    packed = quantized(spec, generator)
    x = torch.randn(2, 4, 70, generator=generator, requires_grad=True)
    grad = torch.randn(2, 4, 33, generator=generator)
    packed(x).backward(grad)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, grad @ packed.dequantize())


@pytest.mark.parametrize("prepared", [True, False])
def test_outputs_may_be_changed_in_place(
    prepared: bool, spec: Spec, generator: torch.Generator
) -> None:
    packed = quantized(spec, generator)
    x = torch.randn(2, 4, 70, generator=generator, requires_grad=True)
    y = packed(x) if prepared else _as_stored(packed, x)
    y += 1
    y.sum().backward()
    assert x.grad is not None


def test_autocast(spec: Spec, generator: torch.Generator) -> None:
    packed = quantized(spec, generator)
    x = torch.randn(4, 70, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        y = packed(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, packed(x.bfloat16()))


def test_states_copies_and_pickles(spec: Spec, generator: torch.Generator) -> None:
    packed = quantized(spec, generator)
    x = torch.randn(4, 70, generator=generator)
    y, state = packed(x), packed.state_dict()
    assert ("weight_input_scale" in state) == (spec.activation == "static")
    if spec.activation == "static":
        assert torch.equal(state["weight_input_scale"], SCALE)
    again = QuantLinear(70, 33, format=format_of(spec), spec=spec)
    again.load_state_dict(state)
    # pickle: of a module made here.
    for each in (again, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(each(x), y)
    cast = copy.deepcopy(packed).to(torch.bfloat16).state_dict()
    assert all(torch.equal(cast[name], state[name]) for name in state if name != "bias")
    assert "weight_input_scale" not in dict(packed.to_float().named_parameters())


@pytest.mark.parametrize("kind", [Int8Spec, Fp8Spec])
def test_a_static_scale_survives_new_weights(kind: type[Spec], generator: torch.Generator) -> None:
    packed = quantized(kind(activation="static"), generator)
    with pytest.warns(UserWarning, match="rounded to its format again"):
        packed.weight = torch.randn(33, 70, generator=generator)
    assert torch.equal(packed.state_dict()["weight_input_scale"], SCALE)
    x = torch.randn(4, 70, generator=generator)
    torch.testing.assert_close(packed(x).double(), expected(packed, x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", [Int8Spec, Fp8Spec])
def test_without_its_static_scale_a_module_gives_no_numbers(
    kind: type[Spec], generator: torch.Generator
) -> None:
    spec = kind(activation="static")
    packed = QuantLinear.from_linear(nn.Linear(70, 33), format=format_of(spec), spec=spec)
    assert packed(torch.randn(4, 70, generator=generator)).isnan().all()
    with pytest.raises(CheckpointError, match=r"mlp.up: expected scales of activations above 0"):
        packed.check_packed("mlp.up")


def test_it_says_what_it_is(spec: Spec, generator: torch.Generator) -> None:
    packed = quantized(spec, generator)
    assert f"activation={spec.activation}" in repr(packed)
    table = explain(nn.Sequential(packed)).table()
    assert f"{format_of(spec)} {spec.activation}" in table
    if isinstance(spec, Fp8Spec):
        if native.load().cpu:
            assert table.splitlines()[2].endswith(" cpu_fp8")
        else:
            assert "[1] not cpu_fp8: native CPU kernels are not loaded" in table
            assert "[1] not cuda_fp8: runs on cuda, the weight is on cpu" in table
    elif native.load().cpu:
        assert "cpu_int8 [1]" in table
        assert "[1] not cpu_rows16: takes float activations, this weight asks for int8" in table


def test_compiled(spec: Spec, generator: torch.Generator) -> None:
    packed = quantized(spec, generator)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    for tokens in (1, 5):
        x = torch.randn(tokens, 70, generator=generator)
        torch.testing.assert_close(compiled(x), packed(x))
