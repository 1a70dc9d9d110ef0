"""The float weight that a packed module does not have.

Code all over PyTorch, Transformers and PEFT reads ``linear.weight``: its shape, dtype or device, its values, or
writes to it (``weight.data += delta``). `VirtualWeight` answers the first for free from metadata, dequantizes for
any operation on values, and requantizes when it is written to. It owns no storage.

Writes through a view of it (``weight.view(-1).add_(1)``, ``weight.T[0] = 0``) reach a temporary float tensor only,
as there is no storage to view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..core.errors import WeightError

__all__ = ["VirtualWeight"]

_TENSOR = torch.Tensor
_ATTRIBUTES = (
    "shape dtype device ndim layout requires_grad is_leaf grad grad_fn is_cuda is_cpu is_meta is_xpu is_mps is_sparse "
    "is_quantized is_nested itemsize nbytes _backward_hooks _version output_nr names"
)
_METHODS = (
    "size dim ndimension numel nelement element_size is_floating_point is_complex stride __len__ get_device "
    "is_contiguous __hash__ storage_offset is_inference"
)
# Questions that metadata answers.
_METADATA: frozenset[Any] = frozenset(
    [getattr(_TENSOR, name).__get__ for name in _ATTRIBUTES.split() if hasattr(_TENSOR, name)]
    + [getattr(_TENSOR, name) for name in _METHODS.split()]
    + [torch.is_floating_point, torch.is_complex, torch.numel]
)
_DATA_GET, _DATA_SET = _TENSOR.data.__get__, _TENSOR.data.__set__  # type: ignore[attr-defined]
_ASK_GRAD = (_TENSOR.requires_grad_, _TENSOR.requires_grad.__set__)  # type: ignore[attr-defined]
_GRAD_SET = _TENSOR.grad.__set__  # type: ignore[union-attr]
_DETACH = (_TENSOR.detach, torch.detach)
_NOT_IN_PLACE = frozenset({"__index__", "__invert__", "__int__", "__iter__"})


class VirtualWeight(torch.Tensor):
    """A float view of packed codes: metadata is free, values are dequantized, writes are quantized.

    Args:
        shape, dtype: of the float weight.
        codes: the packed codes; they give the device, and two views of the same codes are the same weight.
        read: gives the float weight.
        write: quantizes a float weight into the module, or raises.
        description: what stands behind it, for `repr`.
    """

    _codes: Tensor
    _read: Callable[[], Tensor]
    _write: Callable[[Tensor], None]
    _description: str
    # isinstance(weight, nn.Parameter) must hold: PEFT dequantizes through that question.
    _is_param = True
    # Transformers initialises weights without this mark, and an init would be quantized.
    _is_hf_initialized = True

    @staticmethod
    def __new__(
        cls,
        *,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        codes: Tensor,
        read: Callable[[], Tensor],
        write: Callable[[Tensor], None],
        description: str,
    ) -> VirtualWeight:
        self = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=codes.device, requires_grad=False
        )
        assert isinstance(self, VirtualWeight)
        self._codes, self._read, self._write, self._description = codes, read, write, description
        return self

    def __init__(self, **_: Any) -> None:
        """All is done in `__new__`."""

    def materialize(self) -> Tensor:
        """The float weight as a plain tensor, freshly dequantized."""
        return self._read()

    def assign(self, value: Tensor) -> None:
        """Quantize a float tensor into the module; nothing happens for a view of the very same codes.

        Raises:
            WeightError: the value has the wrong shape, NaN or infinite values.
        """
        if isinstance(value, VirtualWeight) and value._codes is self._codes:
            return
        self._write(_plain(value, {}))

    def _alias(self) -> VirtualWeight:
        """Another view of the same codes. ``.data`` and ``.detach()`` give it, so that writes through them count."""
        return VirtualWeight(
            shape=tuple(self.shape),
            dtype=self.dtype,
            codes=self._codes,
            read=self._read,
            write=self._write,
            description=self._description,
        )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if args and isinstance(args[0], VirtualWeight):
            weight = args[0]
            if func == _DATA_GET or func in _DETACH:
                return weight._alias()
            if func == _DATA_SET:
                return weight.assign(args[1])
            if func in _ASK_GRAD:
                return weight._refuse_gradient(*args[1:], **kwargs)
            if func == _GRAD_SET:
                return weight._refuse_gradient(args[1] is not None)
            if func is _TENSOR.data_ptr:
                # Asked only to tell which tensors are tied; there are no floats behind it.
                return weight._codes.data_ptr()
        return _run(func, args, kwargs)

    # mypy: the stub of Tensor declares an instance method.
    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*_plain(args, {}), **_plain(kwargs or {}, {}))

    def _refuse_gradient(self, requires_grad: bool = True) -> VirtualWeight:
        if requires_grad:
            raise WeightError(
                "a packed weight cannot require grad: train an adapter on top of it (PEFT), or dequantize the model"
            )
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return (
            f"VirtualWeight({tuple(self.shape)}, {self.dtype}, {self.device}, {self._description})"
        )

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.materialize()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a PyTorch function on float values and quantize what it wrote to."""
    targets = [kwargs["out"]] if "out" in kwargs else []
    if _is_in_place(getattr(func, "__name__", "")):
        # `torch.nn.init` hands its tensor over by name.
        targets += [*args, *kwargs.values()][:1]
    written = list(_virtual_weights(targets))
    floats: dict[int, tuple[VirtualWeight, Tensor]] = {}
    with torch.set_grad_enabled(torch.is_grad_enabled() and not written):
        result = func(*_plain(args, floats), **_plain(kwargs, floats))
    for weight in written:
        value = floats[id(weight)][1]
        weight._write(value)
        result = weight if result is value else result
    return result


def _is_in_place(name: str) -> bool:
    if name == "__setitem__":
        return True
    if name.startswith("__i"):
        return name not in _NOT_IN_PLACE
    return name.endswith("_") and not name.endswith("__")


def _virtual_weights(value: Any) -> Iterator[VirtualWeight]:
    """Every VirtualWeight in nested lists and tuples."""
    if isinstance(value, VirtualWeight):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _virtual_weights(item)


def _plain(value: Any, floats: dict[int, tuple[VirtualWeight, Tensor]]) -> Any:
    """Replace every VirtualWeight in arguments by its float values, each dequantized once; `floats` collects them."""
    if isinstance(value, VirtualWeight):
        if id(value) not in floats:
            floats[id(value)] = value, value.materialize()
        return floats[id(value)][1]
    if isinstance(value, (list, tuple)):
        plain = [_plain(item, floats) for item in value]
        return type(value)(*plain) if hasattr(value, "_fields") else type(value)(plain)
    if isinstance(value, dict):
        return {key: _plain(item, floats) for key, item in value.items()}
    return value
