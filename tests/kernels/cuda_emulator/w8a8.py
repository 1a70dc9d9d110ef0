"""Activations of 8 bits: int8, and E4M3 of format ``fp8``."""

from __future__ import annotations

import torch
from torch import Tensor

from hfq.core.float8 import E4M3

from .launch import BOOL, INT, MANY, POINTER, SIZE, Launchers, Params, fields, output


class TokensParams(Params):
    """kernels/cuda/w8a8.h, like the next two."""

    _fields_ = (
        *fields(POINTER, "x", "input_scale", "codes", "scales"),
        *fields(SIZE, "tokens", "in_features"),
        *fields(INT, "x_dtype", "code_type"),
    )


class W8A8Params(Params):
    _fields_ = (
        *fields(POINTER, "qweight", "scales", "x", "input_scale", "codes"),
        *fields(POINTER, "token_scales", "bias", "y"),
        *fields(SIZE, "tokens", "out_features", "in_features"),
        *fields(INT, "scale_dtype", "x_dtype", "bias_dtype", "token_blocks"),
    )


class ScaleSumsParams(Params):
    _fields_ = (
        *fields(POINTER, "sums", "token_scales", "scales", "bias", "y"),
        *fields(SIZE, "tokens", "out_features"),
        *fields(INT, "scale_dtype", "bias_dtype", "y_dtype"),
        ("in_fours", BOOL),
    )


class UnpackBytesParams(Params):
    _fields_ = (
        *fields(POINTER, "qweight", "scales", "y"),
        *fields(SIZE, "rows", "in_features"),
        *fields(INT, "scale_dtype", "y_dtype", "code_type"),
    )


class W8A8(Launchers):
    def quantize_tokens(
        self, x: Tensor, input_scale: Tensor | None, dtype: torch.dtype = torch.int8
    ) -> tuple[Tensor, Tensor]:
        """Codes `[M, K]` of `dtype`, int8 or E4M3, and scales `[M, 1]`."""
        tokens, in_features = x.shape
        # One memory, as results are one tensor here.
        memory = torch.full((tokens, in_features + 4), 85, dtype=torch.int8)
        codes = memory.view(-1)[: tokens * in_features].view(tokens, in_features)
        scales = memory.view(-1)[tokens * in_features :].view(torch.float32).view(tokens, 1)
        params = TokensParams(
            x=x,
            input_scale=input_scale,
            codes=codes,
            scales=scales,
            tokens=tokens,
            in_features=in_features,
            code_type=int(dtype == E4M3),
        )
        self.launch("quantize_tokens", params, memory)
        return codes.view(dtype), scales

    def linear_w8a8(
        self,
        x: Tensor,
        qweight: Tensor,
        scales: Tensor,
        input_scale: Tensor | None,
        bias: Tensor | None,
        multiprocessors: int = MANY,
        dtype: torch.dtype = torch.int8,
        capability: int = 90,
    ) -> Tensor:
        """`qweight`: uint8 `[N, K]`, two's complement or bytes of E4M3, as `dtype` says. Quantizes apart where the operator does.

        `capability`: 80 for 8.0; from 89 on GPUs convert E4M3.
        """
        tokens, in_features = x.shape
        kind, sizes = INT(dtype == E4M3), (SIZE(tokens), SIZE(in_features))
        inside = bool(self._library.quantizes_inside(kind, *sizes))
        codes = token_scales = None
        if not inside:
            codes, token_scales = self.quantize_tokens(x, input_scale, dtype)
        y = output(tokens, len(qweight), dtype=x.dtype)
        params = W8A8Params(
            qweight=qweight,
            scales=scales,
            x=x if inside else None,
            input_scale=input_scale if inside else None,
            codes=codes,
            token_scales=token_scales,
            bias=bias,
            y=y,
            tokens=tokens,
            out_features=len(qweight),
            in_features=in_features,
            scale_dtype=scales.dtype,
            x_dtype=x.dtype,
        )
        self.set_device(multiprocessors)
        self._library.set_compute_capability(capability)
        self.launch("linear_fp8" if dtype == E4M3 else "linear_w8a8", params, y)
        return y

    def unpack_bytes(
        self, qweight: Tensor, scales: Tensor, dtype: torch.dtype, codes: torch.dtype
    ) -> Tensor:
        """`[rows, K]` of `dtype` from uint8 `[rows, K]`, two's complement or bytes of E4M3, as `codes` says."""
        y = output(*qweight.shape, dtype=dtype)
        params = UnpackBytesParams(
            qweight=qweight,
            scales=scales,
            y=y,
            rows=len(qweight),
            in_features=qweight.shape[1],
            scale_dtype=scales.dtype,
            code_type=int(codes == E4M3),
        )
        self.launch("unpack_bytes", params, y)
        return y

    def scale_sums(
        self,
        out: Tensor,
        sums: Tensor,
        token_scales: Tensor,
        scales: Tensor,
        bias: Tensor | None,
    ) -> None:
        """Into `out`."""
        params = ScaleSumsParams(
            sums=sums,
            token_scales=token_scales,
            scales=scales,
            bias=bias,
            y=out,
            tokens=len(sums),
            out_features=sums.shape[1],
            scale_dtype=scales.dtype,
        )
        self.launch("scale_sums", params, out)
