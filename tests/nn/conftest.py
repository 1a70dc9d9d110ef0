"""What tests of packed modules ask for: every format; no gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hfq.core.spec import CodebookSpec, IntSpec, QuantSpec
from hfq.formats import FORMATS

# Every registered format as it comes, and corners of the two that have settings. Group sizes of 20 and 24 do not
# divide the sizes that the tests use; groups of 20 suit no native kernel.
SPECS: dict[str, tuple[str, QuantSpec]] = {
    **{f"{name} default": (name, FORMATS.get(name).spec({})) for name in FORMATS.names()},
    **{f"int {bits} bits": ("int", IntSpec(bits=bits, group_size=32)) for bits in range(2, 9)},
    "int 4 bits, zeros, groups of 24": ("int", IntSpec(group_size=24, sym=False)),
    "int 4 bits, groups of 20": ("int", IntSpec(group_size=20)),
    "int 4 bits, float32 scales": ("int", IntSpec(group_size=16, scale_dtype="float32")),
    "int 8 bits, bfloat16 scales": ("int", IntSpec(bits=8, group_size=16, scale_dtype="bfloat16")),
    "int 3 bits, one group": ("int", IntSpec(bits=3, group_size=-1, sym=False)),
    "nf4, double quantization": ("nf4", CodebookSpec(group_size=16, double_quant=True)),
}


@pytest.fixture(params=SPECS.values(), ids=SPECS.keys())
def format_and_spec(request: pytest.FixtureRequest) -> tuple[str, QuantSpec]:
    found: tuple[str, QuantSpec] = request.param
    return found


@pytest.fixture
def no_grad() -> Iterator[None]:
    """Modules share calls only where nobody asks for gradients."""
    with torch.no_grad():
        yield
