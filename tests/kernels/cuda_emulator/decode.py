"""What stands between the products of a decode step: norms, rotations, gates, attention."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .launch import BOOL, FLOAT, INT, POINTER, SIZE, Launchers, Params, fields, output


class NormParams(Params):
    """kernels/common/decode.h, like the next three."""

    _fields_ = (
        *fields(SIZE, "rows", "columns"),
        ("dtype", INT),
        *fields(POINTER, "x", "weight", "y"),
        *fields(FLOAT, "eps", "offset"),
        ("round_first", BOOL),
    )


class RotateParams(Params):
    _fields_ = (
        *fields(SIZE, "tokens", "heads", "size"),
        ("dtype", INT),
        ("x", POINTER),
        ("x_stride", SIZE),
        *fields(POINTER, "cos", "sin"),
        ("shared", BOOL),
        ("y", POINTER),
    )


class GateParams(Params):
    _fields_ = (
        *fields(SIZE, "rows", "columns"),
        ("dtype", INT),
        *fields(POINTER, "gate", "up"),
        *fields(SIZE, "gate_stride", "up_stride"),
        ("y", POINTER),
        ("tanh_gelu", BOOL),
    )


class AttendParams(Params):
    _fields_ = (
        *fields(SIZE, "batch", "heads", "kv_heads", "size", "length", "room"),
        ("dtype", INT),
        *fields(POINTER, "q", "k", "v", "mask"),
        *fields(SIZE, "mask_batch", "mask_heads"),
        ("mask_is_bool", BOOL),
        ("scale", FLOAT),
        ("y", POINTER),
    )


def _around(part: Tensor) -> Tensor:
    """The contiguous memory from the first to the last number of a part of the columns of a tensor."""
    if part.is_contiguous():
        return part
    rows = part.numel() // part.shape[-1]
    return part.as_strided(((rows - 1) * part.stride(-2) + part.shape[-1],), (1,))


class Decode(Launchers):
    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, offset: float, round_first: bool
    ) -> Tensor:
        y = output(*x.shape, dtype=x.dtype)
        params = NormParams(
            rows=x.numel() // x.shape[-1],
            columns=x.shape[-1],
            dtype=x.dtype,
            x=x,
            weight=weight,
            y=y,
            eps=eps,
            offset=offset,
            round_first=round_first,
        )
        self.launch("rms_norm", params, y)
        return y

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """`q` and `k` may be parts of the columns of a contiguous tensor."""
        size = cos.shape[-1]
        results = [output(len(x), x.shape[-1] // size, 1, size, dtype=x.dtype) for x in (q, k)]
        each = [
            RotateParams(
                tokens=len(x),
                heads=y.shape[1],
                size=size,
                dtype=x.dtype,
                x=_around(x),
                x_stride=x.stride(0),
                cos=cos,
                sin=sin,
                shared=len(cos) == 1,
                y=y,
            )
            for x, y in zip((q, k), results, strict=True)
        ]
        read = [tensor for params in each for tensor in params.tensors]
        self.call("rotate", read, results, (RotateParams * 2)(*each))
        return results[0], results[1]

    def gate(self, gate: Tensor, up: Tensor, tanh_gelu: bool) -> Tensor:
        """Both contiguous, or parts of the columns of contiguous tensors."""
        y = output(*gate.shape, dtype=gate.dtype)
        columns = gate.shape[-1]
        gate_stride, up_stride = (
            each.stride(-2) if each.dim() > 1 else columns for each in (gate, up)
        )
        params = GateParams(
            rows=gate.numel() // columns,
            columns=columns,
            dtype=gate.dtype,
            gate=_around(gate),
            up=_around(up),
            gate_stride=gate_stride,
            up_stride=up_stride,
            y=y,
            tanh_gelu=tanh_gelu,
        )
        self.launch("gate", params, y)
        return y

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        length: int,
        mask: Tensor | None,
        scale: float,
        multiprocessors: int = 1,
    ) -> Tensor:
        batch, heads, _, size = q.shape
        y = output(batch, 1, heads * size, dtype=q.dtype)
        by_head = mask is not None and mask.shape[1] > 1
        by_batch = mask is not None and mask.shape[0] > 1
        params = AttendParams(
            batch=batch,
            heads=heads,
            kv_heads=k.shape[1],
            size=size,
            length=length,
            room=k.shape[2],
            dtype=q.dtype,
            q=q,
            k=k,
            v=v,
            mask=mask,
            mask_batch=length * (heads if by_head else 1) if by_batch else 0,
            mask_heads=length if by_head else 0,
            mask_is_bool=mask is not None and mask.dtype == torch.bool,
            scale=scale,
            y=y,
        )
        self.set_device(multiprocessors)
        workspace = torch.full((self.ask("attend_workspace", params),), torch.nan)
        where = (ctypes.byref(params), POINTER(workspace.data_ptr()))
        self.call("attend", params.tensors, [y, workspace], *where)
        return y
