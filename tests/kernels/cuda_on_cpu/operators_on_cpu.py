"""For check_*.py: operators and kernel rows of CUDA on the CPU, emulated. Importing it registers the operators.

The script's argument is the library of operators; cuda_emulator.check_operators runs it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hfq.core.spec import QuantSpec
from hfq.kernels import cuda_ops, dispatch, native
from hfq.kernels.row import Problem
from hfq.nn.embedding import QuantEmbedding
from hfq.nn.linear import QuantLinear

assert cuda_ops.fragments_weight is not None  # defines the operators
native.load()  # operators that both libraries have are those of the one that is loaded later
torch.ops.load_library(sys.argv[1])
emulated = ctypes.CDLL(sys.argv[1])
assert emulated.operators_registered()
torch.manual_seed(0)

HALF = torch.bfloat16


def on_cpu(row: type[Any]) -> Any:
    """A kernel row of this class as if the CPU were a GPU."""

    def reject(self: object, problem: Problem) -> str | None:
        return None

    return type(f"{row.__name__}OnCpu", (row,), {"reject": reject})()


def use_row(grid: type[Any], row: Any) -> None:
    """For weights of this class: `row`, or else the PyTorch reference."""
    dispatch._ROWS[grid] = (row, *dispatch._ROWS[grid][-1:])
    dispatch.select.cache_clear()


def refused(words: str, call: Callable[..., object], *arguments: Any, **others: Any) -> None:
    try:
        call(*arguments, **others)
    except RuntimeError as error:
        assert re.search(words, str(error)), error
        return
    raise AssertionError(f"not refused: {words}")


def strided(tensor: Tensor) -> Tensor:
    """The same numbers, every other one of a larger tensor."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def moved(tensor: Tensor, numbers: int) -> Tensor:
    """The same numbers, contiguous, so many behind the beginning of an allocation."""
    storage = tensor.new_zeros(tensor.numel() + numbers)
    return storage[numbers:].view(tensor.shape).copy_(tensor)


@contextlib.contextmanager
def given_before(tensor: Tensor) -> Iterator[None]:
    """Kernels that start early have to wait for this tensor, which the one in front gives."""
    emulated.set_given(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes))
    yield
    emulated.set_given(None, ctypes.c_size_t(0))


def linear_module(
    rows: int, columns: int, format: str, spec: QuantSpec, bias: bool = True
) -> QuantLinear:
    linear = nn.Linear(columns, rows, bias=bias, dtype=HALF)
    return QuantLinear.from_linear(linear, format=format, spec=spec)


def prepare(module: QuantLinear, row: Any) -> Any:
    """The module's weight, in the layout of `row`."""
    use_row(type(module.grid("weight")), row)
    module.restore()
    module.prepare()
    assert module.kernel_choice("weight").row is row and module.kernel("weight") is row
    return module.grid("weight")


def check_module(
    module: QuantLinear,
    row: Any,
    tokens: Sequence[int],
    dtypes: Sequence[torch.dtype],
    expected: Callable[[Tensor], Tensor],
    bound: Callable[[torch.dtype], float],
) -> None:
    """Outputs with and without gradients, gradients, and tensors that stay as they were."""
    saved = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    dense = module.dequantize()
    prepare(module, row)
    assert torch.equal(module.dequantize(), dense)
    for dtype, count in itertools.product(dtypes, tokens):
        # In memory behind other tokens.
        x = torch.randn(2, count, module.in_features).to(dtype)[1].requires_grad_()
        y = module(x)
        assert y.dtype == dtype
        close = {"rtol": bound(dtype), "atol": bound(dtype)}
        torch.testing.assert_close(y.double(), expected(x.detach()).double(), **close)
        with torch.no_grad():
            assert torch.equal(module(x), y)
        grad = torch.randn(y.shape).to(dtype)
        y.backward(grad)
        assert x.grad is not None
        wanted = grad.double() @ dense.double()
        torch.testing.assert_close(x.grad.double(), wanted, rtol=1e-2, atol=1e-2)
    for _ in ("prepared", "restored"):
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, saved[name]), name
        module.restore()


def check_modules(
    rows: int, columns: int, row: Any, specs: Sequence[tuple[str, QuantSpec]], many: int
) -> None:
    """Modules with activations as they are; `many`: more tokens than kernels take."""
    for format, spec in specs:
        module = linear_module(rows, columns, format, spec)
        weight, bias = module.dequantize().double(), module.bias
        assert bias is not None

        def expected(x: Tensor, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
            return x.double() @ weight.T + bias.double()

        check_module(module, row, (0, 1, 3, 9, many), (HALF,), expected, lambda dtype: 1e-2)
        with torch.no_grad():
            x = torch.randn(1, columns)
            torch.testing.assert_close(module(x).double(), expected(x), rtol=1e-2, atol=1e-2)


def check_table(rows: int, columns: int, format: str, spec: QuantSpec) -> None:
    embedding = nn.Embedding(rows, columns, dtype=HALF)
    table = QuantEmbedding.from_embedding(embedding, format=format, spec=spec)
    ids = torch.randint(rows, (2, 5))
    assert torch.equal(table(ids), table.dequantize()[ids])
