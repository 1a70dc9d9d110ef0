"""Fused experts of Transformers, packed: equal to the float module with the dequantized weights."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.integrations.moe import use_experts_implementation
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hfq.core import affine
from hfq.core.errors import WeightError
from hfq.core.spec import CodebookSpec, IntSpec, QuantSpec
from hfq.core.weight import PackedGrid, QuantizedWeight
from hfq.formats import FORMATS
from hfq.kernels import cuda, dispatch
from hfq.kernels.row import Problem
from hfq.nn.experts import (
    QuantExperts,
    expert_weights,
    is_fused_experts,
    pack_experts_,
    unpack_experts_,
)
from hfq.nn.packing import pack_weight

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 64, 40, 6, 2

# Neither size is a multiple of 24 or 20, and 20 is no multiple of a kernel's unit.
SPECS: dict[str, tuple[str, QuantSpec]] = {
    **{f"{name} default": (name, FORMATS.get(name).spec({})) for name in FORMATS.names()},
    "int 4 bits, groups of 24": ("int", IntSpec(bits=4, group_size=24)),
    "int 4 bits, groups of 20, zeros": ("int", IntSpec(bits=4, group_size=20, sym=False)),
    "int 3 bits, one group": ("int", IntSpec(bits=3, group_size=-1)),
    "int 8 bits, groups of 32, zeros": ("int", IntSpec(bits=8, group_size=32, sym=False)),
    "nf4, double quantization": (
        "nf4",
        CodebookSpec(codebook="nf4", group_size=16, double_quant=True),
    ),
}
FOUR_BITS: tuple[str, QuantSpec] = ("int", IntSpec(bits=4, group_size=24))


def mixtral() -> nn.Module:
    return MixtralExperts(
        MixtralConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS)
    )


def qwen3_moe() -> nn.Module:
    return Qwen3MoeExperts(
        Qwen3MoeConfig(hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS)
    )


def gpt_oss() -> nn.Module:
    return GptOssExperts(
        GptOssConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS)
    )


class PlainExperts(nn.Module):
    """The float stacks of experts without a gate; the decorator brings the rest."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.up_proj = nn.Parameter(torch.empty(EXPERTS, INTERMEDIATE, HIDDEN))
        self.down_proj = nn.Parameter(torch.empty(EXPERTS, HIDDEN, INTERMEDIATE))
        self.act_fn = nn.GELU()
        self.post_expert_norm = nn.LayerNorm(HIDDEN)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        raise NotImplementedError("tests run Transformers' batched_mm")


UngatedExperts = use_experts_implementation(has_gate=False)(
    type("UngatedExperts", (PlainExperts,), {})
)


def ungated() -> nn.Module:
    return UngatedExperts(MixtralConfig())


FAMILIES: list[Callable[[], nn.Module]] = [mixtral, qwen3_moe, gpt_oss, ungated]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1234)


@pytest.fixture(params=FAMILIES, ids=lambda make: make.__name__)
def experts(request: pytest.FixtureRequest, generator: torch.Generator) -> nn.Module:
    return randomized(request.param(), generator)


def randomized(module: nn.Module, generator: torch.Generator) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3, generator=generator)
    # Independent of the loops that models write themselves, and the same in all releases.
    module.config._experts_implementation = "batched_mm"
    return module


def quantized(
    module: nn.Module, plan: tuple[str, QuantSpec] = FOUR_BITS, dtype: torch.dtype = torch.float32
) -> QuantExperts:
    """A packed copy of `module`, rounded to nearest."""
    weights = {base: getattr(module, base).detach() for base in expert_weights(module)}
    packed = pack_experts_(copy.deepcopy(module), dict.fromkeys(weights, plan), dtype)
    for base, weight in weights.items():
        packed.requantize(base, weight.transpose(1, 2) if module.is_transposed else weight)
    return packed


def dequantized(packed: QuantExperts, module: nn.Module) -> nn.Module:
    """A copy of the float `module` with the weights behind the codes of `packed`."""
    reference = copy.deepcopy(module)
    for base in packed.slots:
        weight = packed.dequantize(base)
        weight = weight.transpose(1, 2) if module.is_transposed else weight
        setattr(reference, base, nn.Parameter(weight.contiguous()))
    return reference


def routing(
    tokens: int, generator: torch.Generator, experts: int = EXPERTS
) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(tokens, HIDDEN, generator=generator)
    scores = torch.rand(tokens, experts, generator=generator)
    weights, index = scores.softmax(-1).topk(TOP_K, dim=-1)
    return x, index, weights


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    """Within `tolerance` of the largest expected value."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


# ---- which modules are taken


def test_experts_are_recognised(experts: nn.Module) -> None:
    assert is_fused_experts(experts)
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    rows = 2 * INTERMEDIATE if experts.has_gate else INTERMEDIATE
    assert expert_weights(experts) == {
        up: (EXPERTS, rows, HIDDEN),
        "down_proj": (EXPERTS, HIDDEN, INTERMEDIATE),
    }


def test_other_modules_are_not_taken(experts: nn.Module) -> None:
    undecorated = PlainExperts(MixtralConfig())
    for module in (nn.Linear(8, 8), nn.Conv1d(8, 8, 3), undecorated, quantized(experts)):
        assert not is_fused_experts(module)
        with pytest.raises(WeightError, match="of which it has none"):
            pack_experts_(module, {"down_proj": FOUR_BITS}, torch.float32)


def test_unknown_stack_is_refused_before_anything_changes(experts: nn.Module) -> None:
    before = type(experts)
    with pytest.raises(WeightError, match="got gate_proj"):
        pack_experts_(experts, {"gate_proj": FOUR_BITS, "down_proj": FOUR_BITS}, torch.float32)
    with pytest.raises(WeightError, match="got nothing"):
        pack_experts_(experts, {}, torch.float32)
    assert type(experts) is before
    assert is_fused_experts(experts)


# ---- what they compute


@pytest.mark.parametrize("plan", SPECS.values(), ids=SPECS.keys())
def test_output_is_that_of_the_dequantized_weights(
    experts: nn.Module, plan: tuple[str, QuantSpec], generator: torch.Generator
) -> None:
    packed = quantized(experts, plan)
    reference = dequantized(packed, experts)
    # 1: the kernels for few tokens; 40: an expert with more tokens than those take.
    for tokens in (1, 40):
        x, index, weights = routing(tokens, generator)
        with torch.no_grad():
            close(packed(x, index, weights), reference(x, index, weights))


def test_quantization_error_is_small(experts: nn.Module, generator: torch.Generator) -> None:
    packed = quantized(experts, ("int", IntSpec(bits=8, group_size=32)))
    x, index, weights = routing(9, generator)
    with torch.no_grad():
        close(packed(x, index, weights), experts(x, index, weights), tolerance=0.05)


@pytest.mark.parametrize("make", [mixtral, qwen3_moe, gpt_oss], ids=lambda make: make.__name__)
def test_output_is_that_of_the_models_own_loop(
    make: Callable[[], nn.Module], generator: torch.Generator
) -> None:
    experts = randomized(make(), generator)
    packed = quantized(experts)
    reference = dequantized(packed, experts)
    reference.config._experts_implementation = "eager"
    x, index, weights = routing(7, generator)
    close(packed(x, index, weights), reference(x, index, weights))


def test_gradients(experts: nn.Module, generator: torch.Generator) -> None:
    packed = quantized(experts)
    reference = dequantized(packed, experts)
    for tokens in (1, 40):
        x, index, weights = routing(tokens, generator)
        target = torch.randn(tokens, HIDDEN, generator=generator)
        gradients = []
        for module in (packed, reference):
            leaves = (x.clone().requires_grad_(), weights.clone().requires_grad_())
            (module(leaves[0], index, leaves[1]) * target).sum().backward()
            gradients.append([leaf.grad for leaf in leaves])
        for actual, expected in zip(*gradients, strict=True):
            close(actual, expected, tolerance=1e-5)


def test_packed_tensors_need_no_gradient(experts: nn.Module) -> None:
    packed = quantized(experts)
    trainable = {name for name, parameter in packed.named_parameters() if parameter.requires_grad}
    assert trainable == {
        name for name, _ in experts.named_parameters() if "post_expert_norm" in name
    }


def test_experts_that_are_elsewhere_add_nothing(
    experts: nn.Module, generator: torch.Generator
) -> None:
    packed = quantized(experts)
    x, index, weights = routing(5, generator)
    index[1, 0], index[3, :] = EXPERTS, EXPERTS + 1
    here = index < EXPERTS
    reference = dequantized(packed, experts)
    with torch.no_grad():
        expected = reference(x, index.where(here, 0), weights.where(here, 0.0))
        close(packed(x, index, weights), expected)
        assert not packed(x, torch.full_like(index, EXPERTS), weights).any()


def test_no_tokens(experts: nn.Module, generator: torch.Generator) -> None:
    x, index, weights = routing(0, generator)
    assert quantized(experts)(x, index, weights).shape == (0, HIDDEN)


@pytest.mark.parametrize("router_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bfloat16(
    experts: nn.Module, router_dtype: torch.dtype, generator: torch.Generator
) -> None:
    packed = quantized(experts).to(torch.bfloat16)
    reference = dequantized(packed.float(), experts)
    packed.to(torch.bfloat16)
    for tokens in (1, 40):
        x, index, weights = routing(tokens, generator)
        y = packed(x.bfloat16(), index, weights.to(router_dtype))
        assert y.dtype == torch.bfloat16
        close(y.float(), reference(x, index, weights), tolerance=0.02)


def test_int8_activations_are_close(experts: nn.Module, generator: torch.Generator) -> None:
    packed = quantized(experts, ("int", IntSpec(bits=4, group_size=32)))
    packed.kernel_mode = "int8"
    x, index, weights = routing(3, generator)
    with torch.no_grad():
        expected = dequantized(packed, experts)(x, index, weights)
        close(packed(x, index, weights), expected, tolerance=0.03)


def test_post_expert_norm(generator: torch.Generator) -> None:
    if "has_post_expert_norm" not in inspect.signature(use_experts_implementation).parameters:
        pytest.skip("this release of Transformers has no norm behind the experts")
    marked = use_experts_implementation(has_gate=False, has_post_expert_norm=True)
    experts = randomized(
        marked(type("NormedExperts", (PlainExperts,), {}))(MixtralConfig()), generator
    )
    packed = quantized(experts)
    x, index, weights = routing(7, generator)
    close(packed(x, index, weights), dequantized(packed, experts)(x, index, weights))


def test_a_stack_left_out_stays_float(experts: nn.Module, generator: torch.Generator) -> None:
    up, down = expert_weights(experts)
    packed = pack_experts_(copy.deepcopy(experts), {down: FOUR_BITS}, torch.float32)
    weight = getattr(experts, down).detach()
    packed.requantize(down, weight.transpose(1, 2) if experts.is_transposed else weight)
    assert torch.equal(getattr(packed, up), getattr(experts, up))
    x, index, weights = routing(7, generator)
    close(packed(x, index, weights), dequantized(packed, experts)(x, index, weights))


def test_compiled_module_breaks_the_graph_and_agrees(generator: torch.Generator) -> None:
    packed = quantized(randomized(mixtral(), generator))
    compiled = torch.compile(packed, backend="eager")
    for tokens in (1, 5, 7):
        arguments = routing(tokens, generator)
        with torch.no_grad():
            assert torch.equal(compiled(*arguments), packed(*arguments))


# ---- without waiting for the device


class CudaOnCpu(cuda.CudaFragments):
    """The row of CUDA as if the CPU were a GPU; its operators have references in PyTorch."""

    def reject(self, problem: Problem) -> str | None:
        return None


@pytest.fixture
def cuda_row(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaOnCpu]:
    """The only one for grids of groups."""
    row = CudaOnCpu()
    monkeypatch.setitem(dispatch._ROWS, PackedGrid, (row, dispatch.rows()[-1]))
    dispatch.select.cache_clear()
    yield row
    monkeypatch.undo()
    dispatch.select.cache_clear()


class NothingWaits(TorchDispatchMode):
    """Refuses operators whose caller has to know values, or sizes that follow from values; not inside of kernels of ours."""

    WAITING = frozenset(
        {
            *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "bincount"),
            *("histc", "nonzero", "masked_select", "repeat_interleave", "one_hot"),
            *("unique_dim", "_unique", "_unique2", "unique_consecutive"),
        }
    )

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.in_kernel = False
        tolist = Tensor.tolist

        def guarded(tensor: Tensor) -> object:
            assert self.in_kernel, "tolist waits"
            return tolist(tensor)

        # A list of a CPU tensor's values is made without an operator.
        monkeypatch.setattr(Tensor, "tolist", guarded)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = func._schema.name.split("::")[1]
        assert name not in self.WAITING, f"{name} waits"
        for mask in args[1] if name in ("index", "index_put", "index_put_") else ():
            assert mask is None or mask.dtype != torch.bool, "a mask is counted"
        self.calls.append(name)
        self.in_kernel = func.namespace == "hfq"
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.in_kernel = False


GROUPS_OF_32: tuple[str, QuantSpec] = ("int", IntSpec(bits=4, group_size=32, sym=False))


def test_nothing_waits_for_the_routing(
    experts: nn.Module,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    cuda_row: CudaOnCpu,
) -> None:
    packed = quantized(experts, GROUPS_OF_32).to(torch.bfloat16)
    reference = dequantized(packed.float(), experts)
    packed.to(torch.bfloat16)
    packed.prepare()
    assert all(packed.kernel_choice(base).row is cuda_row for base in packed.slots)
    for tokens in (1, 2, 40):
        x, index, weights = routing(tokens, generator)
        index[0, 0] = EXPERTS + 3  # is elsewhere
        here = index < EXPERTS
        with monkeypatch.context() as patch, torch.no_grad(), NothingWaits(patch) as seen:
            y = packed(x.bfloat16(), index, weights)
        assert seen.calls.count("cuda_experts_linear") == 2
        expected = reference(x, index.where(here, 0), weights.where(here, 0.0))
        close(y.float(), expected, tolerance=0.02)
        with torch.no_grad():
            assert not packed(x.bfloat16(), torch.full_like(index, EXPERTS), weights).any()


def test_norms_make_nothing_of_experts_that_are_elsewhere(
    generator: torch.Generator, cuda_row: CudaOnCpu
) -> None:
    experts = randomized(ungated(), generator)
    packed = quantized(experts, GROUPS_OF_32).to(torch.bfloat16)
    packed.has_post_expert_norm = True
    assert packed.post_expert_norm.bias.any()
    x, index, weights = routing(3, generator)
    with torch.no_grad():
        y = packed(x.bfloat16(), index.where(index < 0, EXPERTS), weights)
    assert not y.any()


def test_what_the_kernel_does_not_take_goes_expert_by_expert(
    experts: nn.Module,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    cuda_row: CudaOnCpu,
) -> None:
    monkeypatch.setattr(cuda, "MAX_EXPERT_TOKENS", 2)
    monkeypatch.setattr(cuda, "_EXPERT_PRODUCTS", 1)
    packed = quantized(experts, GROUPS_OF_32)
    reference = dequantized(packed, experts)
    x, index, weights = routing(7, generator)  # 14 choices of 6 experts
    index[2, 1] = EXPERTS
    here = index < EXPERTS
    expected = reference(x, index.where(here, 0), weights.where(here, 0.0))
    with torch.no_grad():
        close(packed(x, index, weights), expected)
        packed.to(torch.bfloat16)
        close(packed(x.bfloat16(), index, weights).float(), expected, tolerance=0.02)
    leaf = x[:2].bfloat16().requires_grad_()
    packed(leaf, index[:2], weights[:2]).sum().backward()
    wide = x[:2].clone().requires_grad_()
    reference(wide, index[:2], weights[:2]).sum().backward()
    assert leaf.grad is not None and wide.grad is not None
    close(leaf.grad.float(), wide.grad, tolerance=0.02)
    with (
        monkeypatch.context() as patch,
        pytest.raises(AssertionError, match="waits"),
        NothingWaits(patch),
    ):
        packed(leaf, index[:2], weights[:2])


# ---- what they store


def test_dequantized_stack(experts: nn.Module) -> None:
    packed = quantized(experts, ("int", IntSpec(bits=8, group_size=-1)))
    for base, shape in expert_weights(experts).items():
        weight = packed.dequantize(base)
        assert weight.shape == shape
        original = getattr(experts, base).detach()
        close(
            weight, original.transpose(1, 2) if experts.is_transposed else original, tolerance=0.01
        )


@pytest.mark.parametrize("experts", [gpt_oss], indirect=True)
@pytest.mark.parametrize("plan", SPECS.values(), ids=SPECS.keys())
def test_kernel_layout_is_undone_bit_by_bit(
    experts: nn.Module, plan: tuple[str, QuantSpec]
) -> None:
    packed = quantized(experts, plan)
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    packed.prepare()
    assert equal_states(packed.state_dict(), before)
    packed.restore()
    for name, parameter in packed.named_parameters():
        # Scales are held as integers of the same bits.
        assert torch.equal(parameter.view(before[name].dtype), before[name])


def equal_states(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(
        actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor)
        for name, tensor in expected.items()
        if "post_expert_norm" not in name and not name.endswith("_bias")
    )


@pytest.mark.parametrize("experts", [gpt_oss], indirect=True)
@pytest.mark.parametrize("plan", SPECS.values(), ids=SPECS.keys())
def test_state_dict_round_trip(
    experts: nn.Module, plan: tuple[str, QuantSpec], generator: torch.Generator
) -> None:
    packed = quantized(experts, plan)
    arguments = routing(3, generator)
    expected = packed(*arguments)
    state = packed.state_dict()
    for base, slot in packed.slots.items():
        for key, entry in slot.layout().items():
            stored = state[base + key.removeprefix("weight")]
            assert (tuple(stored.shape), stored.dtype) == (entry.shape, entry.dtype)
    other = pack_experts_(copy.deepcopy(experts), dict.fromkeys(packed.slots, plan), torch.float32)
    other.load_state_dict(state)
    assert torch.equal(other(*arguments), expected)


def test_copies_and_pickles(experts: nn.Module, generator: torch.Generator) -> None:
    packed = quantized(experts)
    arguments = routing(3, generator)
    expected = packed(*arguments)
    saved = io.BytesIO()
    torch.save(packed, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(packed),
        pickle.loads(pickle.dumps(packed)),
        torch.load(saved, weights_only=False),
    ):
        assert type(other) is type(packed)
        assert torch.equal(other(*arguments), expected)
        other.requantize("down_proj", torch.zeros(EXPERTS, HIDDEN, INTERMEDIATE))
        assert torch.equal(packed(*arguments), expected)


def test_class_is_readable_and_made_once(experts: nn.Module) -> None:
    packed, other = quantized(experts), quantized(experts)
    assert type(packed) is type(other)
    assert type(packed).__name__ == f"Quant{type(experts).__name__}"
    assert isinstance(packed, type(experts))
    assert "down_proj: (6, 64, 40), format=int, bits=4, group_size=24" in repr(packed)


def test_casts_leave_packed_tensors_alone(experts: nn.Module) -> None:
    packed = quantized(experts)
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    packed.to(torch.bfloat16)
    assert packed.dequantize("down_proj").dtype == torch.bfloat16
    assert equal_states(packed.state_dict(), before)
    for base in packed.slots if packed.has_bias else ():
        assert getattr(packed, f"{base}_bias").dtype == torch.bfloat16


def test_unpacking_gives_the_float_module_back(
    experts: nn.Module, generator: torch.Generator
) -> None:
    packed = quantized(experts)
    reference = dequantized(packed, experts)
    module = unpack_experts_(packed, torch.float32)
    assert module is packed
    assert type(module) is type(experts)
    assert module.state_dict().keys() == experts.state_dict().keys()
    for name, parameter in reference.named_parameters():
        assert torch.equal(module.get_parameter(name), parameter)
        assert module.get_parameter(name).requires_grad
    arguments = routing(3, generator)
    assert torch.equal(module(*arguments), reference(*arguments))
    assert set(module.__dict__) == {*experts.__dict__, "_is_hf_initialized"}
    assert is_fused_experts(module)


def test_unpacking_casts(experts: nn.Module) -> None:
    module = unpack_experts_(quantized(experts), torch.bfloat16)
    assert {parameter.dtype for parameter in module.parameters(recurse=False)} == {torch.bfloat16}


# ---- while a checkpoint is quantized on the fly


def test_placeholders_keep_the_names_until_the_codes_come(
    experts: nn.Module, generator: torch.Generator
) -> None:
    skeleton = copy.deepcopy(experts).to("meta")
    plan = dict.fromkeys(expert_weights(experts), FOUR_BITS)
    packed = pack_experts_(skeleton, plan, torch.float32, keep_placeholders=True)
    state = packed.state_dict()
    for base in plan:
        held = state[base]
        assert held.is_meta
        assert held.dtype == torch.float32
        assert held.shape == getattr(experts, base).shape
        assert state[f"{base}_scale"].is_meta
    packed.to(torch.float32)
    biases = {name: p for name, p in experts.named_parameters() if name not in plan}
    packed.load_state_dict(biases, strict=False, assign=True)
    expected = quantized(experts)
    for base in plan:
        packed.set_packed(base, expected.neutral_tensors(base))
    assert not any(parameter.is_meta for parameter in packed.parameters())
    arguments = routing(3, generator)
    assert torch.equal(packed(*arguments), expected(*arguments))


def round_to_nearest(rows: Tensor) -> QuantizedWeight:
    return affine.encode(rows, *affine.range_grid(rows, FOUR_BITS[1]), FOUR_BITS[1])


def test_packed_tensors_replace_a_placeholder_as_attributes(
    experts: nn.Module, generator: torch.Generator
) -> None:
    """The loader of Transformers sets what a quantization operation returns with setattr."""
    expected = quantized(experts)
    plan = dict.fromkeys(expected.slots, FOUR_BITS)
    packed = pack_experts_(copy.deepcopy(experts), plan, torch.float32, keep_placeholders=True)
    for base, slot in expected.slots.items():
        weight = getattr(experts, base).detach()
        weight = weight.transpose(1, 2) if slot.transposed else weight

        for key, tensor in pack_weight(weight, slot, round_to_nearest).items():
            setattr(packed, slot.attribute(key), nn.Parameter(tensor, requires_grad=False))
    arguments = routing(3, generator)
    assert torch.equal(packed(*arguments), expected(*arguments))


def test_initialisation_of_a_model_passes_packed_experts_by(generator: torch.Generator) -> None:
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=31,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_local_experts=EXPERTS,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()
    experts = next(module for module in model.modules() if is_fused_experts(module))
    floats = {base: getattr(experts, base).detach() for base in expert_weights(experts)}
    pack_experts_(experts, dict.fromkeys(floats, FOUR_BITS), torch.float32)
    for base, weight in floats.items():
        experts.requantize(base, weight)
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    model.initialize_weights()
    assert equal_states(experts.state_dict(), before)
    ids = torch.randint(0, 31, (2, 5), generator=generator)
    with torch.no_grad():
        packed_logits = model(ids).logits
        unpack_experts_(experts, torch.float32)
        close(packed_logits, model(ids).logits, tolerance=1e-5)
