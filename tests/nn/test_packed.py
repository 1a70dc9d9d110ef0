"""Moving, casting, copying, saving and loading packed modules; tied weights; preparation for a kernel."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hfq.core.errors import CheckpointError, KernelError, WeightError
from hfq.core.spec import CodebookSpec, IntSpec, QuantSpec
from hfq.nn import layout, parameters
from hfq.nn.embedding import QuantEmbedding
from hfq.nn.linear import QuantLinear

FOUR_BITS = IntSpec(group_size=16)


def quantized(
    generator: torch.Generator,
    *,
    format: str = "int",
    spec: QuantSpec = FOUR_BITS,
    rows: int = 24,
    columns: int = 32,
) -> QuantLinear:
    packed = QuantLinear(columns, rows, format=format, spec=spec)
    packed.requantize("weight", torch.randn(rows, columns, generator=generator))
    packed.bias.data.copy_(torch.randn(rows, generator=generator))
    packed.kernel_mode = "exact"
    return packed.eval()


def tied(generator: torch.Generator, spec: QuantSpec = FOUR_BITS) -> nn.ModuleDict:
    """An output head and the embedding that shares its table."""
    head = QuantLinear(32, 40, bias=False, format="int", spec=spec)
    head.requantize("weight", torch.randn(40, 32, generator=generator))
    table = QuantEmbedding(40, 32, format="int", spec=spec)
    table.share_packed(head)
    return nn.ModuleDict({"table": table, "head": head}).eval()


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


# ---- preparation


def test_prepare_and_restore_are_exact(
    format_and_spec: tuple[str, QuantSpec], generator: torch.Generator
) -> None:
    format, spec = format_and_spec
    packed = quantized(generator, format=format, spec=spec, rows=37, columns=70)
    x = torch.randn(3, 70, generator=generator)
    before, weight = snapshot(packed), packed.dequantize()
    packed.restore()
    layout = packed.slot.layout()
    for key, parameter in packed.packed_parameters("weight").items():
        assert parameter.shape == layout[key].shape and not parameter.is_floating_point()
    y = packed(x)
    for _ in range(2):
        packed.prepare()
        assert equal(snapshot(packed), before) and torch.equal(packed.dequantize(), weight)
        assert torch.equal(packed(x), y)
    packed.restore()
    packed.restore()
    assert equal(snapshot(packed), before)


def test_one_copy_in_memory(generator: torch.Generator) -> None:
    """What a kernel reads are the Parameters themselves, in its layout."""
    packed = quantized(generator)
    packed.prepare()
    operands = packed.grid("weight")
    held = {p.untyped_storage().data_ptr() for p in packed.packed_parameters("weight").values()}
    for tensor in (operands.qweight, operands.scales):
        assert tensor.untyped_storage().data_ptr() in held


def test_threads_may_meet_in_the_first_forward(generator: torch.Generator) -> None:
    x = torch.randn(2, 32, generator=generator)
    reference = quantized(generator)
    wanted = reference(x)
    for _ in range(20):
        results = from_threads(copy.deepcopy(reference), x, 4)
        assert len(results) == 4 and all(torch.equal(y, wanted) for y in results)


def from_threads(module: nn.Module, x: Tensor, count: int) -> list[Tensor]:
    """Outputs of `count` threads that call the module at the same moment."""
    start, results = threading.Barrier(count), []

    def call() -> None:
        start.wait()
        results.append(module(x))

    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_a_graph_is_no_place_to_prepare(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, x = quantized(generator), torch.randn(2, 32, generator=generator)
    with monkeypatch.context() as capturing:
        capturing.setattr(parameters, "is_capturing", lambda weight: True)
        with pytest.raises(KernelError, match="run the model once before"):
            packed(x)
        packed.restore()
    wanted = packed(x)
    monkeypatch.setattr(parameters, "is_capturing", lambda weight: True)
    assert torch.equal(packed(x), wanted)


def test_streams_are_waited_for_before_memory_is_given_away(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = quantized(generator)
    addresses: list[int] = []
    monkeypatch.setattr(
        parameters, "wait_for_streams", lambda weight: addresses.append(weight.data_ptr())
    )
    neutral = packed.W_q.data_ptr()
    packed.prepare()
    prepared = packed.W_q.data_ptr()
    packed.prepare()
    if prepared == neutral:
        pytest.skip("no native kernels: layouts are the same")
    packed.restore()
    packed.restore()
    assert addresses == [neutral, prepared]


@pytest.mark.gpu
def test_prepared_in_one_stream_and_read_in_another(
    generator: torch.Generator, cuda: torch.device
) -> None:
    packed = quantized(generator, rows=4096, columns=4096).to(cuda)
    x = torch.randn(2, 4096, generator=generator).to(cuda, torch.bfloat16)
    wanted, side = packed(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(10):
        packed.restore()
        with torch.cuda.stream(side):
            found = packed(x)
        # What the neutral weight was in may be anybody's now.
        torch.full((4096 * 2048,), 255, dtype=torch.uint8, device=cuda)
        torch.cuda.synchronize()
        assert torch.equal(found, wanted)


def test_prepared_in_inference_mode_and_trained_later(generator: torch.Generator) -> None:
    packed = quantized(generator)
    x = torch.randn(3, 32, generator=generator)
    with torch.inference_mode():
        packed(x)
        packed.restore()
        packed(x)
        packed.weight = packed.dequantize()
        packed(x)
    x.requires_grad_(True)
    packed(x).sum().backward()
    torch.testing.assert_close(x.grad, packed.dequantize().sum(0).expand(3, 32))


def test_data_parallel_is_refused_in_words(generator: torch.Generator) -> None:
    for module in (quantized(generator), tied(generator)["table"]):
        with pytest.raises(KernelError, match=r"torchrun.*CUDA_VISIBLE_DEVICES"):
            module._replicate_for_data_parallel()


def test_replaced_parameters_are_used(generator: torch.Generator) -> None:
    """Loaders and sharding put other Parameters in place, some of them behind the module's back."""
    packed, other = quantized(generator), quantized(generator)
    x = torch.randn(2, 32, generator=generator)
    packed(x)
    wanted = other(x) - other.bias + packed.bias
    other.restore()
    for name in ("qweight", "weight_scale"):
        packed._parameters[name] = nn.Parameter(
            other._parameters[name].clone(), requires_grad=False
        )
    torch.testing.assert_close(packed(x), wanted)
    packed = quantized(generator)
    packed(x)
    for name, tensor in other.neutral_tensors("weight").items():
        setattr(
            packed, packed.slot.attribute(name), nn.Parameter(tensor.clone(), requires_grad=False)
        )
    torch.testing.assert_close(packed(x), other(x) - other.bias + packed.bias)
    assert not any(p.is_floating_point() for p in packed.packed_parameters("weight").values())


@pytest.mark.parametrize("prepared", [True, False])
def test_functional_call(prepared: bool, generator: torch.Generator) -> None:
    packed, other = quantized(generator), quantized(generator)
    x = torch.randn(2, 32, generator=generator, requires_grad=True)
    y = packed(x)
    if prepared:
        other.prepare()
    else:
        packed.restore()
    for state in (other.state_dict(), dict(other.named_parameters())):
        out = torch.func.functional_call(packed, state, (x,))
        torch.testing.assert_close(out, other(x))
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), x)[0], other.dequantize().sum(0).expand(2, 32)
        )
    assert torch.equal(packed(x), y)


# ---- moving and casting

CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "bfloat16": lambda m: m.bfloat16(),
    "type": lambda m: m.type(torch.float16),
    "to device and dtype": lambda m: m.to("cpu", torch.float16),
    "to tensor": lambda m: m.to(torch.zeros(1, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_casts_reach_the_dtype_but_no_packed_tensor(
    cast: Callable[[nn.Module], nn.Module],
    prepared: bool,
    format_and_spec: tuple[str, QuantSpec],
    generator: torch.Generator,
) -> None:
    format, spec = format_and_spec
    packed = quantized(generator, format=format, spec=spec)
    before = snapshot(packed)
    if prepared:
        packed.prepare()
    dtype = cast(nn.Linear(1, 1)).weight.dtype
    assert cast(packed) is packed
    assert packed.compute_dtype == packed.weight.dtype == packed.bias.dtype == dtype
    assert packed.dequantize().dtype == dtype
    packed.float()
    after = snapshot(packed)
    assert torch.equal(before.pop("bias").to(dtype).float(), after.pop("bias"))
    assert equal(after, before)


def test_an_upcast_of_all_parameters_reaches_no_packed_tensor(generator: torch.Generator) -> None:
    """What `peft.prepare_model_for_kbit_training` does to a model."""
    packed = quantized(generator)
    x = torch.randn(2, 32, generator=generator)
    y, before = packed(x), snapshot(packed)
    for parameter in packed.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.to(torch.float32)
    assert torch.equal(packed(x), y) and equal(snapshot(packed), before)


def test_meta_and_back(format_and_spec: tuple[str, QuantSpec], generator: torch.Generator) -> None:
    format, spec = format_and_spec
    packed = quantized(generator, format=format, spec=spec)
    x = torch.randn(2, 32, generator=generator)
    y, before = packed(x), snapshot(packed)
    packed.to("meta")
    assert all(p.is_meta for p in packed.parameters()) and packed.weight.is_meta
    packed.to_empty(device="cpu")
    packed.load_state_dict(before)
    assert torch.equal(packed(x), y) and equal(snapshot(packed), before)


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("cast", [None, torch.bfloat16])
def test_made_on_meta(assign: bool, cast: torch.dtype | None, generator: torch.Generator) -> None:
    packed = quantized(generator)
    x = torch.randn(2, 32, generator=generator)
    y, before = packed(x), snapshot(packed)
    with torch.device("meta"):
        skeleton = QuantLinear(32, 24, format="int", spec=FOUR_BITS)
    if cast:
        skeleton.to(cast)
    if not assign:
        skeleton.to_empty(device="cpu")
    skeleton.load_state_dict(before, assign=assign)
    skeleton.kernel_mode = "exact"
    skeleton.float()
    if cast and not assign:
        skeleton.bias.data.copy_(before["bias"])
    assert torch.equal(skeleton(x), y) and equal(snapshot(skeleton), before)


def test_share_memory(generator: torch.Generator) -> None:
    packed = quantized(generator)
    x = torch.randn(2, 32, generator=generator)
    y = packed(x)
    assert packed.share_memory() is packed
    assert all(p.is_shared() for p in packed.parameters())
    assert torch.equal(packed(x), y)
    packed.restore()
    packed.share_memory()
    assert torch.equal(packed(x), y)
    assert all(p.is_shared() for p in packed.parameters())


# ---- copies

COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: torch.load(io.BytesIO(saved(m)), weights_only=False),
}


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES.keys())
def test_copies_are_equal_neutral_and_independent(
    duplicate: Callable[[nn.Module], nn.Module],
    prepared: bool,
    format_and_spec: tuple[str, QuantSpec],
    generator: torch.Generator,
) -> None:
    format, spec = format_and_spec
    packed = quantized(generator, format=format, spec=spec)
    x = torch.randn(2, 32, generator=generator)
    y, before = packed(x), snapshot(packed)
    if not prepared:
        packed.restore()
    twin = duplicate(packed)
    layout = packed.slot.layout()
    assert all(p.shape == layout[k].shape for k, p in twin.packed_parameters("weight").items())
    assert equal(snapshot(twin), before) and torch.equal(twin(x), y)
    twin.weight = torch.zeros(24, 32)
    assert equal(snapshot(packed), before) and torch.equal(packed(x), y)


# ---- state dicts


@pytest.mark.parametrize("prepared", [True, False])
def test_state_dicts_are_neutral_and_load_again(
    prepared: bool, format_and_spec: tuple[str, QuantSpec], generator: torch.Generator
) -> None:
    format, spec = format_and_spec
    packed, other = (quantized(generator, format=format, spec=spec) for _ in range(2))
    x = torch.randn(2, 32, generator=generator)
    y = packed(x)
    for module in (packed, other):
        module.prepare() if prepared else module.restore()
    state = packed.state_dict()
    layout = {packed.slot.attribute(key): entry for key, entry in packed.slot.layout().items()}
    assert state.keys() == {*layout, "bias"}
    for name, entry in layout.items():
        assert state[name].shape == entry.shape and state[name].dtype == entry.dtype
    state = torch.load(io.BytesIO(saved(state)))
    for assign in (True, False):
        twin = copy.deepcopy(other)
        if prepared:
            twin.prepare()
        twin.load_state_dict(state, assign=assign)
        assert torch.equal(twin(x), y) and equal(snapshot(twin), snapshot(packed))


def test_a_state_dict_is_a_snapshot_of_a_prepared_module(generator: torch.Generator) -> None:
    packed = quantized(generator)
    packed.prepare()
    state, before = packed.state_dict(), snapshot(packed)
    packed.weight = torch.zeros(24, 32)
    assert equal(dict(state), before)
    assert not equal(snapshot(packed), before)


def test_damaged_state_dicts_are_refused(generator: torch.Generator) -> None:
    packed = quantized(generator)
    before = snapshot(packed)
    damaged: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
        ("weight_scale", lambda t: t.float(), "torch.float16"),
        ("weight_scale", lambda t: t.bfloat16(), "torch.float16"),
        ("qweight", lambda t: t.int(), "torch.uint8"),
        ("qweight", lambda t: t[..., 0], "size mismatch"),
        ("weight_scale", lambda t: t.T, "size mismatch"),
    ]
    for name, change, message in damaged:
        with pytest.raises(RuntimeError, match=message):
            packed.load_state_dict({**before, name: change(before[name])})
        assert equal(snapshot(packed), before)
    with pytest.raises(RuntimeError, match="weight_scale"):
        packed.load_state_dict({k: v for k, v in before.items() if k != "weight_scale"})
    with pytest.raises(RuntimeError, match="Unexpected"):
        packed.load_state_dict({**before, "weight": packed.dequantize()})


def test_set_packed_checks_what_it_gets(generator: torch.Generator) -> None:
    packed = quantized(generator)
    tensors, before = packed.neutral_tensors("weight"), snapshot(packed)
    for bad in (
        {"weight": tensors["weight"]},
        {**tensors, "weight_scale": tensors["weight_scale"].float()},
        {**tensors, "weight": tensors["weight"][1:]},
    ):
        with pytest.raises(CheckpointError):
            packed.set_packed("weight", bad)
        assert equal(snapshot(packed), before)


# ---- tied weights


def check_tied(model: nn.ModuleDict, weight: Tensor) -> None:
    table, head = model["table"], model["head"]
    table(torch.tensor(0))
    assert table.qweight is head.qweight and table.weight_scale is head.weight_scale
    assert len(list(model.parameters())) == 2
    ids, x = torch.tensor([[0, 39], [17, 0]]), torch.eye(32, dtype=weight.dtype)
    assert torch.equal(table(ids), weight[ids])
    torch.testing.assert_close(head(x).T, weight)
    assert table.kernel("weight") is head.kernel("weight")


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_tied_weights_stay_tied(bits: int, generator: torch.Generator) -> None:
    model = tied(generator, IntSpec(bits=bits, group_size=16))
    weight = model["head"].dequantize()
    check_tied(model, weight)
    for duplicate in COPIES.values():
        check_tied(duplicate(model), weight)
    for module in (model, model["table"], model["head"]):
        module.to("cpu").double().float()
        check_tied(model, weight)
    model.share_memory()
    check_tied(model, weight)


@pytest.mark.parametrize("order", [("table", "head"), ("head", "table")])
def test_tied_weights_survive_meta(order: tuple[str, str], generator: torch.Generator) -> None:
    model = tied(generator)
    weight, state = model["head"].dequantize(), snapshot(model)
    model = nn.ModuleDict({name: model[name] for name in order})
    model.to("meta").to_empty(device="cpu")
    model.load_state_dict(state)
    check_tied(model, weight)
    model.to("meta")
    model.load_state_dict(state, assign=True)
    check_tied(model, weight)


@pytest.mark.parametrize("prepared", [True, False])
def test_tied_weights_are_saved_once(prepared: bool, generator: torch.Generator) -> None:
    model = tied(generator)
    model["head"].prepare() if prepared else model["head"].restore()
    state = model.state_dict()
    for name in ("qweight", "weight_scale"):
        pointers = {
            state[f"{module}.{name}"].untyped_storage().data_ptr() for module in ("table", "head")
        }
        assert len(pointers) == 1
    twin = tied(generator)
    twin.load_state_dict(torch.load(io.BytesIO(saved(state))))
    check_tied(twin, model["head"].dequantize())


@pytest.mark.parametrize("name", ["table", "head"])
def test_writing_to_either_of_tied_weights_writes_to_both(
    name: str, generator: torch.Generator
) -> None:
    model = tied(generator, IntSpec(group_size=1, scale_dtype="float32"))
    value = torch.randn(40, 32, generator=generator)
    model[name].weight = value
    check_tied(model, value)
    model[name].weight.data += 1
    check_tied(model, value + 1)
    model["table"].weight = model["head"].weight
    check_tied(model, value + 1)


def test_unequal_slots_are_not_shared() -> None:
    head = QuantLinear(32, 40, format="int", spec=IntSpec(group_size=16))
    for other in (
        QuantEmbedding(40, 32, format="int", spec=IntSpec(group_size=32)),
        QuantEmbedding(41, 32, format="int", spec=IntSpec(group_size=16)),
        QuantEmbedding(40, 32, format="nf4", spec=CodebookSpec(group_size=16)),
    ):
        with pytest.raises(WeightError, match="equal slots"):
            other.share_packed(head)


# ---- training plumbing


def test_packed_tensors_do_not_train(generator: torch.Generator) -> None:
    model = nn.Sequential(quantized(generator), nn.Linear(24, 3))
    before = snapshot(model[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 32, generator=generator)).sum().backward()
    assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 0
    optimizer.step()
    assert equal(snapshot(model[0]), before)
    trainable = [p for p in model.parameters() if p.requires_grad]
    vector = nn.utils.parameters_to_vector(trainable)
    nn.utils.vector_to_parameters(vector * 2, trainable)
    assert torch.equal(nn.utils.parameters_to_vector(trainable), vector * 2)
    with pytest.raises(RuntimeError, match="floating point"):
        model[0].requires_grad_(True)


def test_offloaded_weights_are_used_as_they_are_stored(generator: torch.Generator) -> None:
    class Hook:
        offload = True

    packed = quantized(generator)
    x = torch.randn(2, 32, generator=generator)
    y = packed(x)
    packed.restore()
    packed._hf_hook = Hook()
    layout = packed.slot.layout()
    torch.testing.assert_close(packed(x), y)
    assert all(p.shape == layout[k].shape for k, p in packed.packed_parameters("weight").items())
    assert packed.kernel("weight").name == "dequantize"
    assert all("offloaded" in reason for _, reason in packed.kernel_choice("weight").refused)


class _Operators(TorchDispatchMode):
    """Notes names of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_kernel_lies_between_a_new_weight_and_the_first_product(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Tensor] = []
    monkeypatch.setattr(layout, "show_to_kernels", shown.append)
    quantized(generator).prepare()
    assert shown
    monkeypatch.undo()
    for device, kernels in (("cuda", 1), ("cpu", 0)):
        with FakeTensorMode(), _Operators() as operators:
            layout.show_to_kernels(torch.empty(4, device=device))
        assert operators.names.count("aten.new_ones.default") == kernels
