"""Writes the golden checkpoints beside this file: run it only for a case that is new.

    python tests/golden/make.py NAME...

Every file holds one packed weight as format version 1 stores it, its codes, and the float32 values that they stand
for. The values are computed here from the description of the format in plain Python, not by hfq: a mistake of hfq
cannot agree with itself. `golden.json` says what each file is.

A file that exists is never written again: what it holds was published.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from hfq.core import affine
from hfq.core.codebooks import CODEBOOKS
from hfq.core.spec import SpqrSpec
from hfq.formats import FORMAT_VERSION, FORMATS

FOLDER = Path(__file__).parent
INDEX = FOLDER / "golden.json"

# Name -> format, settings, N, K. Groups of 8 leave a short last group of 5.
CASES: dict[str, tuple[str, dict[str, object], int, int]] = {
    **{
        f"int{bits}_{'sym' if sym else 'asym'}": (
            "int",
            {"bits": bits, "group_size": 8, "sym": sym, "scale_dtype": scale_dtype},
            5,
            37,
        )
        for bits, scale_dtype in (
            (2, "float16"),
            (3, "float16"),
            (4, "float16"),
            (5, "bfloat16"),
            (8, "float32"),
        )
        for sym in (True, False)
    },
    "nf4": ("nf4", {"group_size": 8}, 5, 37),
    "fp4": ("fp4", {"group_size": 8}, 5, 37),
    # 320 scales: more than one block of 256.
    "nf4_double_quant": ("nf4", {"group_size": 4, "double_quant": True}, 40, 29),
    "int8": ("int8", {}, 5, 37),
    "int8_static": ("int8", {"activation": "static"}, 5, 37),
    "fp8": ("fp8", {}, 5, 37),
    "fp8_static": ("fp8", {"activation": "static"}, 5, 37),
    # Two blocks of rows that share stats; codes of scales and zero points across bytes.
    "spqr": ("spqr", {"group_size": 8, "stat_group_size": 4, "outliers": 0.05}, 5, 37),
    "spqr4_bfloat16": (
        "spqr",
        {
            "bits": 4,
            "group_size": -1,
            "stat_bits": 5,
            "outliers": 0.02,
            "scale_dtype": "bfloat16",
        },
        5,
        37,
    ),
}


def main(names: list[str]) -> None:
    index = json.loads(INDEX.read_text()) if INDEX.exists() else {}
    for name in names or [name for name in CASES if name not in index]:
        if name in index:
            sys.exit(f"{name} exists; give the new case a new name")
        format_name, settings, rows, columns = CASES[name]
        save_file(make(name), FOLDER / f"{name}.safetensors")
        index[name] = {
            "format_version": FORMAT_VERSION,
            "format": format_name,
            "settings": settings,
            "out_features": rows,
            "in_features": columns,
        }
    INDEX.write_text(json.dumps(index, indent=2) + "\n")


def make(name: str) -> dict[str, Tensor]:
    """The tensors of one file: those of the checkpoint, "codes" and "values"."""
    format_name, settings, rows, columns = CASES[name]
    generator = torch.Generator().manual_seed(len(name) + rows * columns)
    weight = torch.randn(rows, columns, generator=generator)
    packed_format = FORMATS.get(format_name)
    spec = packed_format.spec(settings)
    quantized = affine.encode(weight, *affine.range_grid(weight, spec), spec)
    if spec.activation == "static":
        quantized = replace(quantized, input_scale=torch.tensor([0.0371]))
    tensors = packed_format.pack(quantized)
    group_size = columns if spec.group_size == -1 else spec.group_size
    code_of = read_codes(tensors["weight"], spec.bits)
    if isinstance(spec, SpqrSpec):
        value_of = read_bilevel_values(tensors, spec)
    else:
        value_of = read_values(tensors, format_name, spec.bits, spec.scale_dtype)
    codes = [[code_of(n, k) for k in range(columns)] for n in range(rows)]
    values = [
        [value_of(codes[n][k], n, k // group_size) for k in range(columns)] for n in range(rows)
    ]
    if isinstance(spec, SpqrSpec):
        add_outliers(values, tensors)
    return {
        **tensors,
        "codes": torch.tensor(codes, dtype=torch.uint8),
        "values": torch.tensor(values, dtype=torch.float64).float(),
    }


def read_codes(packed: Tensor, bits: int) -> Callable[[int, int], int]:
    """(n, k) -> code: bits [k * bits, (k + 1) * bits) of row n, little-endian."""
    streams = [int.from_bytes(bytes(row), "little") for row in packed.squeeze(-1).tolist()]
    return lambda n, k: streams[n] >> (k * bits) & ((1 << bits) - 1)


def read_values(
    tensors: dict[str, Tensor], format_name: str, bits: int, scale_dtype: str
) -> Callable[[int, int, int], float]:
    """(code, n, g) -> value. A product of two float32 is exact in Python's floats and rounded once at the end."""
    scales = tensors["weight_scale"].tolist()
    zeros = tensors["weight_zero"].tolist() if "weight_zero" in tensors else None

    def scale(n: int, g: int) -> float:
        if "weight_scale_step" not in tensors:
            return float(scales[n][g])
        block = (n * len(scales[0]) + g) // 256
        step = tensors["weight_scale_step"][block].item()
        offset = tensors["weight_scale_offset"][block].item()
        total = as_float32(offset + as_float32(scales[n][g] * step))
        assert scale_dtype == "float16"
        return float(struct.unpack("e", struct.pack("e", total))[0])

    def unit(code: int, n: int, g: int) -> float:
        if format_name in CODEBOOKS:
            return as_float32(CODEBOOKS[format_name][code])
        if format_name == "fp8":
            return e4m3_value(code)
        return float(code - (zeros[n][g] if zeros else 2 ** (bits - 1)))

    return lambda code, n, g: unit(code, n, g) * scale(n, g)


def e4m3_value(code: int) -> float:
    """OCP 8-bit Floating Point Specification 1.0, section 5: 4 bits of exponent with bias 7, 3 of mantissa."""
    exponent, mantissa = code >> 3 & 15, code & 7
    size = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if code >> 7 else size


def read_bilevel_values(
    tensors: dict[str, Tensor], spec: SpqrSpec
) -> Callable[[int, int, int], float]:
    """(code, n, g) -> value without outliers, rounded to float32 after each step."""
    stat_code_of = read_codes(tensors["weight_scale"], spec.stat_bits)
    stats = tensors["weight_scale_stat"].tolist()

    def decoded(n: int, g: int, level: int) -> float:
        step, offset = stats[n // spec.stat_group_size][g][2 * level : 2 * level + 2]
        return as_float32(offset + stat_code_of(n, 2 * g + level) * step)

    return lambda code, n, g: as_float32(as_float32(code - decoded(n, g, 1)) * decoded(n, g, 0))


def add_outliers(values: list[list[float]], tensors: dict[str, Tensor]) -> None:
    places = iter(
        zip(
            tensors["weight_outlier_column"].tolist(),
            tensors["weight_outlier"].tolist(),
            strict=True,
        )
    )
    for n, count in enumerate(tensors["weight_outlier_count"].tolist()):
        for _ in range(count):
            k, difference = next(places)
            values[n][k] = as_float32(values[n][k] + difference)


def as_float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


if __name__ == "__main__":
    main(sys.argv[1:])
