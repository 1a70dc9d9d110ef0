"""The CUDA kernels of a decode step, run on the CPU: what test_decode.py, which has them among others, does not ask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_emulator import check_operators

from hfq.kernels import decode


def normal(*shape: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(*shape, generator=generator).to(dtype)


@pytest.mark.parametrize("columns", [4096, 20000])
def test_rows_longer_than_a_thread_block_keeps(
    emulator: Any, generator: torch.Generator, columns: int
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(2, 3, columns, generator=generator).to(dtype)[:, 0]
        found = emulator.rms_norm(x[None], weight, 1e-5, 0.0, False)
        reference = decode.rms_norm(x[None], weight, 1e-5, 0.0, False)
        torch.testing.assert_close(found, reference)


def test_rows_that_begin_anywhere(emulator: Any, generator: torch.Generator) -> None:
    """One number at a time, in place of 16 bytes."""
    memory = torch.randn(1 + 4 * 128, generator=generator).bfloat16()
    x, weight = memory[1:].view(4, 128), torch.randn(128, generator=generator).bfloat16()
    found = emulator.rms_norm(x, weight, 1e-6, 0.0, True)
    torch.testing.assert_close(found, decode.rms_norm(x, weight, 1e-6, 0.0, True))
    found = emulator.gate(x, x, False)
    torch.testing.assert_close(found, decode.gate(x, x, False))


@pytest.mark.parametrize("multiprocessors", [1, 100])
def test_what_a_mask_hides_is_not_read(
    emulator: Any, generator: torch.Generator, multiprocessors: int
) -> None:
    """By one thread block for each head of keys, and by several."""
    for length, group in ((200, 2), (300, 9)):
        q = torch.randn(2, 2 * group, 1, 64, generator=generator).bfloat16()
        k, v = torch.randn(2, 2, 2, length, 64, generator=generator).bfloat16()
        seen = torch.randn(2, 1, 1, length, generator=generator) > 0
        seen[0] = False
        k[~seen.expand(2, 2, 1, length).squeeze(2)] = torch.nan
        v[~seen.expand(2, 2, 1, length).squeeze(2)] = torch.nan
        found = emulator.attend(q, k, v, length, seen, 0.1, multiprocessors)
        assert not found[0].any()
        wide = [each.double().nan_to_num() for each in (q, k, v)]
        exact = decode.attend(*wide, length, seen, 0.1)
        torch.testing.assert_close(found[1].double(), exact[1], rtol=1e-2, atol=1e-2)


def test_operators(emulator: Any) -> None:
    """The binding: on CPU tensors, in a process whose CPU is the emulated GPU."""
    check_operators(emulator.folder, "check_decode.py")
