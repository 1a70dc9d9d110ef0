"""The float weight that a packed module does not have.

Code all over PyTorch, Transformers and PEFT reads ``linear.weight``: its shape, dtype or device, its values, or
writes to it (``weight.data += delta``). `VirtualWeight` answers the first for free from metadata, dequantizes for
any operation on values, and requantizes when it is written to. It owns no storage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.errors import WeightError

__all__ = ["VirtualWeight"]

_TENSOR = torch.Tensor
_ATTRIBUTES = (
    "shape dtype device ndim layout requires_grad is_leaf grad grad_fn is_cuda is_cpu is_meta is_xpu is_mps is_sparse "
    "is_quantized itemsize nbytes _backward_hooks _version output_nr names"
)
_METHODS = (
    "size dim ndimension numel nelement element_size is_floating_point is_complex stride __len__ get_device "
    "is_contiguous __hash__ storage_offset"
)
# Questions that metadata answers.
_METADATA: frozenset[Any] = frozenset(
    [getattr(_TENSOR, name).__get__ for name in _ATTRIBUTES.split() if hasattr(_TENSOR, name)]
    + [getattr(_TENSOR, name) for name in _METHODS.split()]
    + [torch.is_floating_point, torch.is_complex, torch.numel]
)
_DATA_GET, _DATA_SET = _TENSOR.data.__get__, _TENSOR.data.__set__  # type: ignore[attr-defined]
_NOT_IN_PLACE = frozenset({"__index__", "__invert__", "__int__", "__iter__"})


class VirtualWeight(torch.Tensor):
    """A float view of packed codes: metadata is free, values are dequantized, writes are quantized.

    Args:
        shape, dtype, device: of the float weight.
        read: gives the float weight.
        write: quantizes a float weight into the module, or raises.
        describe: what stands behind it, for `repr`.
    """

    _read: Callable[[], Tensor]
    _write: Callable[[Tensor], None]
    _description: str

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        read: Callable[[], Tensor],
        write: Callable[[Tensor], None],
        description: str,
    ) -> VirtualWeight:
        self: VirtualWeight = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, dtype=dtype, device=device, requires_grad=False
        )
        self._read, self._write, self._description = read, write, description
        # isinstance(weight, nn.Parameter) must hold: PEFT dequantizes through that question.
        self._is_param = True
        # Transformers initialises weights without this mark, and an init would be quantized.
        self._is_hf_initialized = True
        return self

    def materialize(self) -> Tensor:
        """The float weight as a plain tensor, freshly dequantized."""
        return self._read()

    def _alias(self) -> VirtualWeight:
        """Another view of the same codes. ``.data`` and ``.detach()`` give it, so that writes through them count."""
        return VirtualWeight(
            tuple(self.shape), self.dtype, self.device, self._read, self._write, self._description
        )

    def _assign(self, value: Tensor) -> None:
        # Compare bound methods, not tensors: an alias of this weight carries the same writer.
        if isinstance(value, VirtualWeight) and value._write == self._write:
            return
        self._write(_plain(value))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        target = args[0] if args and isinstance(args[0], VirtualWeight) else None
        if target is not None:
            if func == _DATA_GET or func in (torch.Tensor.detach, torch.detach):
                return target._alias()
            if func == _DATA_SET:
                return target._assign(args[1])
            name = getattr(func, "__name__", "")
            if name == "requires_grad_":
                return target._refuse_gradient(args[1] if len(args) > 1 else kwargs.get("requires_grad", True))
            if _is_in_place(name):
                values = [_plain(value) for value in args]
                func(*values, **{key: _plain(value) for key, value in kwargs.items()})
                target._write(values[0])
                return target
        return func(*(_plain(value) for value in args), **{key: _plain(value) for key, value in kwargs.items()})

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*(_plain(value) for value in args), **{k: _plain(v) for k, v in (kwargs or {}).items()})

    def _refuse_gradient(self, wanted: bool) -> VirtualWeight:
        if wanted:
            raise WeightError(
                "a packed weight cannot require grad: train an adapter on top of it (PEFT), or dequantize the model"
            )
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"VirtualWeight({tuple(self.shape)}, {self.dtype}, {self.device}, {self._description})"

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.materialize().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().__reduce_ex__(protocol)


def _is_in_place(name: str) -> bool:
    if name == "__setitem__":
        return True
    if name.startswith("__i"):
        return name not in _NOT_IN_PLACE
    return name.endswith("_") and not name.endswith("__")


def _plain(value: Any) -> Any:
    """Replace every VirtualWeight in arguments by its float values."""
    if isinstance(value, VirtualWeight):
        return value.materialize()
    if isinstance(value, (list, tuple)):
        plain = [_plain(item) for item in value]
        return type(value)(*plain) if hasattr(value, "_fields") else type(value)(plain)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
