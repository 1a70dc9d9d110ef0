"""What the headers of a safetensors checkpoint say, before any tensor is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.errors import CheckpointError
from ..formats import TensorLayout

__all__ = ["file_bytes", "read_headers"]

_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def read_headers(files: Iterable[str | Path]) -> dict[str, TensorLayout]:
    """Name -> shape and dtype of every tensor in the safetensors files.

    Raises:
        CheckpointError: a file is truncated or not safetensors. Nothing else is ever opened: pickles run code.
    """
    found: dict[str, TensorLayout] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                    view = tensors.get_slice(name)
                    dtype = _DTYPES.get(view.get_dtype(), torch.uint8)
                    found[name] = TensorLayout(tuple(view.get_shape()), dtype)
        except (SafetensorError, OSError) as err:
            raise CheckpointError(
                f"{file}: expected a complete safetensors file, got {err}; download or save it again"
            ) from err
    return found


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the safetensors file that these tensors (on meta, too) would be written to, its header included.

    The header is JSON: 8 bytes with its length, then for each tensor name, dtype, shape and place, padded to 8 bytes
    (https://github.com/huggingface/safetensors, "Format").
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    # The library writes wide dtypes first, then by name; places have as many digits as they need.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        places = [position, position + tensor.nbytes]
        shape = list(tensor.shape)
        header[name] = {"dtype": names[tensor.dtype], "shape": shape, "data_offsets": places}
        position = places[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + position
