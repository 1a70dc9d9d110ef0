"""`QuantLinear`: an `nn.Linear` whose weight is packed. The only quantized Linear of hfq."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..core.spec import QuantSpec
from .packed import PackedModule
from .packing import Encode
from .siblings import MOST_TOKENS, shared_output
from .slot import PackedSlot

__all__ = ["QuantLinear", "products"]


class QuantLinear(PackedModule, nn.Linear):
    """``y = x W^T + b`` with W packed. x `[..., K]` of any float dtype gives y `[..., N]` of that dtype.

    It is an `nn.Linear`, so that code which looks for one (PEFT's adapters, Transformers) takes it, yet no float
    weight is ever allocated. ``weight`` is a `VirtualWeight`: reading its shape is free, reading its values
    dequantizes, assigning to it quantizes by rounding to nearest. The gradient of x is exact for the dequantized
    weight.

    Args:
        in_features, out_features: K and N.
        bias: whether there is a bias, a float Parameter without gradient.
        format: registered packed layout.
        spec: what is stored.
        dtype: dtype of the virtual weight and of the bias.
        transposed: this replaces a module that stores its weight as `[K, N]` (Transformers' Conv1D).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: str,
        spec: QuantSpec,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        transposed: bool = False,
    ) -> None:
        # nn.Linear.__init__ would allocate the float weight.
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        slot = PackedSlot(
            base="weight",
            format=format,
            spec=spec,
            out_features=out_features,
            in_features=in_features,
            transposed=transposed,
        )
        self._init_packed({"weight": slot}, dtype, device)
        empty = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter(
            "bias", None if empty is None else nn.Parameter(empty, requires_grad=False)
        )

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, format: str, spec: QuantSpec, encode: Encode | None = None
    ) -> QuantLinear:
        """Quantize a float Linear; by rounding to nearest unless `encode` says otherwise."""
        weight = linear.weight
        new = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            format=format,
            spec=spec,
            dtype=weight.dtype,
            device=weight.device,
        )
        new.requantize("weight", weight.detach(), encode)
        if linear.bias is not None:
            new.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        new.prepare()
        return new.train(linear.training)

    def to_float(self) -> nn.Linear:
        """A float Linear with the dequantized weight, in `compute_dtype`, frozen."""
        new = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        new.weight = nn.Parameter(self.dequantize(), requires_grad=False)
        if self.bias is not None:
            new.bias = nn.Parameter(self.bias.detach().to(self.compute_dtype), requires_grad=False)
        return new.train(self.training)

    @property
    def slot(self) -> PackedSlot:
        return self.slots["weight"]

    # mypy: nn.Linear declares a Parameter; here it is a view.
    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The float weight `[N, K]`, virtual; see the class."""
        return self._virtual_weight()

    @property
    def W_q(self) -> nn.Parameter:
        """The packed codes under the name by which PEFT recognises a module with its own `dequantize`."""
        return self.packed_parameters("weight")["weight"]

    def forward(self, x: Tensor) -> Tensor:
        autocast = torch._C._is_any_autocast_enabled()
        if autocast:
            x = _autocast(x)
        operands = self.operands("weight")
        int8 = self.int8_activations(x)
        if not (autocast or torch.compiler.is_compiling()):
            y = shared_output(self, operands, x, int8)
            if y is not None:
                return y
        # `self.bias` would go through `nn.Module.__getattr__`, which takes a microsecond.
        bias = self._parameters["bias"]
        return operands.choice.row.linear(x, operands.grid, bias, int8)

    def has_hooks(self) -> bool:
        """Whether somebody watches or replaces the calls of this module."""
        return bool(self._forward_hooks or self._forward_pre_hooks or "forward" in self.__dict__)

    def reset_parameters(self) -> None:
        """Nothing to initialise: codes come from a weight."""

    def extra_repr(self) -> str:
        spec = self.slot.spec
        activation = f", activation={spec.activation}" if spec.activation else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.slot.format}, bits={spec.bits}, group_size={spec.group_size}{activation}, "
            f"bits_per_weight={self.slot.bits_per_weight:.2f}"
        )


def products(modules: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """What modules give that all read x; one call of a kernel where they are siblings, and as few calls of Python as can be.

    For code that runs without gradients, autocast and compilers. Outputs are contiguous in their last dimension, and may be parts
    of one tensor.
    """
    # Loops, not generators: this is called a hundred times in a step.
    packed: list[QuantLinear] = []
    for module in modules:
        if type(module) is QuantLinear and not module.has_hooks():
            packed.append(module)
    if len(packed) == len(modules) and not _has_any_global_hook():  # type: ignore[no-untyped-call]
        first = packed[0]
        operands, int8 = first.operands("weight"), first.int8_activations(x)
        if len(packed) == 1:
            row, bias = operands.choice.row, first._parameters["bias"]
            return (row.linear(x, operands.grid, bias, int8),)
        group = operands.siblings.group
        if group is not None and x.numel() <= MOST_TOKENS * first.in_features:
            parts = group.outputs(packed, x, int8)
            if parts is not None:
                return parts
    return [module(x) for module in modules]


def _autocast(x: Tensor) -> Tensor:
    """x in the dtype that `nn.functional.linear` would compute in under autocast."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype not in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ):
        return x
    return x.to(torch.get_autocast_dtype(device))
