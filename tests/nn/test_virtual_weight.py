"""The float weight that is not there: free metadata, values on demand, writes that are quantized."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hfq.core.errors import WeightError
from hfq.core.spec import IntSpec
from hfq.nn.linear import QuantLinear
from hfq.nn.virtual_weight import VirtualWeight

# With one group per weight and float32 scales, code 0 of a symmetric grid stands for exactly that weight.
LOSSLESS = IntSpec(bits=4, group_size=1, scale_dtype="float32")


class Counted(QuantLinear):
    """Counts how often its weight is dequantized and quantized."""

    reads = writes = 0

    def dequantize(self, base: str = "weight") -> Tensor:
        self.reads += 1
        return super().dequantize(base)

    def _set_weight(self, weight: Tensor) -> None:
        self.writes += 1
        super()._set_weight(weight)


@pytest.fixture
def linear(generator: torch.Generator) -> Counted:
    """A lossless `[6, 10]` Linear."""
    packed = Counted(10, 6, bias=False, format="int", spec=LOSSLESS)
    packed.requantize("weight", torch.randn(6, 10, generator=generator))
    return packed


def test_metadata_is_free(linear: Counted) -> None:
    weight = linear.weight
    assert isinstance(weight, nn.Parameter) and isinstance(weight, VirtualWeight)
    assert weight.shape == weight.size() == (6, 10) and weight.size(1) == 10
    assert (weight.dtype, weight.device.type, weight.ndim, weight.dim()) == (
        torch.float32,
        "cpu",
        2,
        2,
    )
    assert weight.numel() == torch.numel(weight) == weight.nelement() == 60
    assert weight.nbytes == 240 and weight.element_size() == 4 and len(weight) == 6
    assert weight.stride() == (10, 1) and weight.is_contiguous() and weight.storage_offset() == 0
    assert weight.is_floating_point() and not torch.is_complex(weight)
    assert (
        weight.is_leaf
        and not weight.requires_grad
        and weight.grad is None
        and weight.grad_fn is None
    )
    assert not (weight.is_cuda or weight.is_meta or weight.is_sparse or weight.is_quantized)
    assert weight.get_device() == -1 and isinstance(hash(weight), int)
    assert weight.data.shape == weight.detach().shape == (6, 10)
    assert "VirtualWeight((6, 10), torch.float32, cpu, int 4 bits)" in repr(weight)
    assert linear.reads == linear.writes == 0


def test_metadata_follows_the_module(linear: Counted) -> None:
    assert linear.bfloat16().weight.dtype == torch.bfloat16
    assert linear.to("meta").weight.is_meta
    assert linear.reads == 0


READS: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda w: w + 1,
    "radd": lambda w: 2 - w,
    "matmul": lambda w: torch.ones(2, 6) @ w,
    "sum": lambda w: w.sum(),
    "index": lambda w: w[1:3, ::2],
    "view": lambda w: w.view(-1),
    "cast": lambda w: w.to(torch.float64),
    "clone": lambda w: w.clone(),
    "data": lambda w: w.data.abs(),
    "detach": lambda w: w.detach() * 3,
    "cat": lambda w: torch.cat([w, w]),
    "stack": lambda w: torch.stack((w, w)),
    "norm": lambda w: torch.linalg.norm(w, dim=1),
    "svd": lambda w: torch.linalg.svdvals(w),
    "linear": lambda w: nn.functional.linear(torch.ones(2, 10), w),
    "einsum": lambda w: torch.einsum("nk,nk->n", w, w),
    "where": lambda w: torch.where(torch.ones(10) > 0, w, 0.0),
    "keyword": lambda w: torch.mul(input=w, other=w),
    "equal": lambda w: torch.tensor(torch.equal(w, w)),
    "copied into": lambda w: torch.empty(6, 10).copy_(w),
    "added into": lambda w: torch.ones(6, 10).add_(w),
    "numpy": lambda w: torch.from_numpy(w.numpy().copy()),
    "list": lambda w: torch.tensor(w.tolist()),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_operations_see_the_dequantized_values(
    linear: Counted, read: Callable[[Tensor], Tensor]
) -> None:
    wanted = read(linear.dequantize())
    linear.reads = 0
    actual = read(linear.weight)
    assert type(actual) is Tensor
    assert torch.equal(actual, wanted)
    assert linear.reads == 1 and linear.writes == 0


def set_columns(w: Tensor, v: Tensor) -> None:
    w.data[:, 2:4] = v[:, :2]


WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "add_": lambda w, v: w.add_(v),
    "data add_": lambda w, v: w.data.add_(v, alpha=2),
    "detach sub_": lambda w, v: w.detach().sub_(v),
    "copy_": lambda w, v: w.copy_(v),
    "data copy_": lambda w, v: w.data.copy_(v),
    "mul_": lambda w, v: w.mul_(2),
    "zero_": lambda w, v: w.zero_(),
    "fill_": lambda w, v: w.fill_(0.5),
    "item": set_columns,
    "out": lambda w, v: torch.add(w, v, out=w),
    "lerp_": lambda w, v: w.data.lerp_(v, 0.25),
    "addmm_": lambda w, v: w.data.addmm_(v, v.T @ v),
    "index_add_": lambda w, v: w.data.index_add_(0, torch.tensor([1, 3]), v[:2]),
    "init": lambda w, v: nn.init.constant_(w, 0.25),
    "foreach": lambda w, v: torch._foreach_add_([w], [v]),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_writes_are_quantized(
    linear: Counted, write: Callable[[Tensor, Tensor], object], generator: torch.Generator
) -> None:
    value = torch.randn(6, 10, generator=generator)
    wanted = linear.dequantize()
    write(wanted, value)
    write(linear.weight, value)
    assert linear.writes == 1
    assert torch.equal(linear.weight, wanted)
    assert torch.equal(linear(torch.eye(10)).T, wanted)


def test_augmented_assignment_to_attributes(linear: Counted, generator: torch.Generator) -> None:
    value = torch.randn(6, 10, generator=generator)
    wanted = linear.dequantize()
    linear.weight.data += value
    linear.weight.data -= 2 * value
    linear.weight *= 2
    # The assignment that Python makes after the operation is one of the weight to itself.
    assert linear.writes == 3
    assert torch.equal(linear.weight, (wanted + value - 2 * value) * 2)


def test_a_chain_on_the_result_of_a_write(linear: Counted) -> None:
    assert torch.equal(linear.weight.mul_(0).add_(1), torch.ones(6, 10))
    assert torch.equal(linear.weight, torch.ones(6, 10))


@pytest.mark.parametrize(
    "wrap", [nn.Parameter, lambda w: w, lambda w: w.double(), lambda w: w.T.contiguous().T]
)
def test_assignment_of_a_tensor(
    linear: Counted, wrap: Callable[[Tensor], Tensor], generator: torch.Generator
) -> None:
    for assign in (
        lambda w: setattr(linear, "weight", w),
        lambda w: setattr(linear.weight, "data", w),
    ):
        value = torch.randn(6, 10, generator=generator)
        assign(wrap(value))
        assert torch.equal(linear.weight, value)
        assert isinstance(linear.weight, VirtualWeight)


def test_assignment_of_another_packed_weight(linear: Counted, generator: torch.Generator) -> None:
    other = QuantLinear(10, 6, bias=False, format="int", spec=LOSSLESS)
    other.requantize("weight", torch.randn(6, 10, generator=generator))
    linear.weight = other.weight
    assert torch.equal(linear.weight, other.weight)
    assert linear.qweight is not other.qweight


def test_assignment_to_itself_does_nothing(linear: Counted) -> None:
    linear.weight = linear.weight
    linear.weight.data = linear.weight.data
    linear.weight.data = linear.weight.detach()
    assert linear.reads == linear.writes == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_leave_the_module_as_it_was(
    linear: Counted, value: float
) -> None:
    before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    bad = torch.zeros(6, 10)
    bad[5, 9] = value
    for write in (
        lambda: setattr(linear, "weight", bad),
        lambda: setattr(linear.weight, "data", bad),
        lambda: linear.weight.data.add_(bad),
        lambda: linear.weight.copy_(bad),
    ):
        with pytest.raises(WeightError, match="finite"):
            write()
    after = linear.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_wrong_values_are_refused(linear: Counted) -> None:
    with pytest.raises(WeightError, match="shape"):
        linear.weight = torch.zeros(10, 6)
    with pytest.raises(WeightError, match="NoneType"):
        linear.weight = None
    with pytest.raises(AttributeError):
        del linear.weight


def test_it_never_requires_grad(linear: Counted) -> None:
    for ask in (
        lambda: linear.weight.requires_grad_(True),
        lambda: linear.weight.requires_grad_(),
        lambda: linear.weight.requires_grad_(requires_grad=True),
        lambda: setattr(linear.weight, "requires_grad", True),
        lambda: setattr(linear.weight, "grad", torch.zeros(6, 10)),
    ):
        with pytest.raises(WeightError, match="adapter"):
            ask()
    assert linear.weight.requires_grad_(False).shape == (6, 10)
    linear.weight.requires_grad = False
    linear.weight.grad = None
    assert not linear.weight.requires_grad


def test_copies_and_pickles_of_it_are_plain_tensors(linear: Counted) -> None:
    stream = io.BytesIO()
    torch.save(linear.weight, stream)
    stream.seek(0)
    for twin in (
        copy.deepcopy(linear.weight),
        pickle.loads(pickle.dumps(linear.weight)),
        torch.load(stream),
    ):
        assert type(twin) is Tensor and torch.equal(twin, linear.weight)


def test_data_pointers_tell_ties(linear: Counted) -> None:
    other = copy.deepcopy(linear)
    assert linear.weight.data_ptr() == linear.weight.data_ptr() != other.weight.data_ptr()
    other.share_packed(linear)
    assert linear.weight.data_ptr() == other.weight.data_ptr()


def test_writes_with_gradient_history_are_detached(linear: Counted) -> None:
    delta = torch.ones(6, 10, requires_grad=True)
    wanted = linear.dequantize() + 1
    linear.weight.data += delta
    linear.weight.add_(delta * 0)
    assert torch.equal(linear.weight, wanted)
    assert not linear.weight.requires_grad
