"""The CUDA kernels on a GPU: operators, kernel row and modules against the PyTorch reference; CUDA graphs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from on_gpu import captured, check_module, check_overlap, quantized
from torch import Tensor

from hfq.core import bits as bit_packing
from hfq.core.codebooks import codebook
from hfq.core.float8 import e4m3_table
from hfq.core.spec import IntSpec
from hfq.kernels import cuda_ops, fragments, native, reference

assert cuda_ops.fragments_weight is not None  # defines torch.ops.hfq.cuda_*
pytestmark = pytest.mark.gpu

KINDS = (
    "int2",
    "int2_zeros",
    "int3",
    "int3_zeros",
    "int4",
    "int4_zeros",
    "int8",
    "int8_zeros",
    "nf4",
    "fp4",
    "e4m3",
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# (N, K, group_size; 0: one group per row): odd shapes, and those of models.
SHAPES = (
    (1, 8, 0),
    (17, 136, 32),
    (40, 512, 128),
    (33, 200, 0),
    (5, 1096, 96),
    (1024, 4096, 128),
    (14336, 4096, 64),
    (4096, 14336, 32),
)


@dataclass(frozen=True)
class Weight:
    """A random weight on the GPU: `operands` in layout fragments, the dense values `[N, K]` in float64 on the CPU."""

    operands: tuple[Tensor | None, ...]
    sizes: tuple[int, int, int, int]
    neutral: tuple[Tensor | None, ...]

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.hfq.cuda_linear(x, *self.operands, bias, *self.sizes)
        return y

    def reference(self, dtype: torch.dtype) -> Tensor:
        return reference.dequantize(*self.neutral, None, *self.sizes[:3], dtype)  # type: ignore[arg-type]


MakeWeight = Callable[..., Weight]


@pytest.fixture
def make_weight(cuda: torch.device, generator: torch.Generator) -> MakeWeight:
    if not native.load().cuda:
        pytest.skip(f"no native CUDA kernels: {native.load().cuda_reason}")

    def make(
        rows: int,
        columns: int,
        group_size: int,
        kind: str = "int4",
        scale_dtype: torch.dtype = torch.float16,
    ) -> Weight:
        bits = 8 if kind == "e4m3" else int(kind.removesuffix("_zeros")[-1])
        group_size = group_size or columns
        groups = -(-columns // group_size)
        codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
        scales = (torch.rand(rows, groups, generator=generator) * 0.02 + 1e-3).to(scale_dtype)
        zeros = table = None
        if kind.endswith("zeros"):
            zeros = torch.rand(rows, groups, generator=generator) * ((1 << bits) - 1)
            zeros = zeros.to(scale_dtype)
        if kind == "e4m3":
            codes[codes & 0x7F == 0x7F] ^= 1  # NaN, which no weight has
            table = e4m3_table()
        elif not kind.startswith("int"):
            table = codebook(kind)
        neutral = (bit_packing.pack(codes, bits).unsqueeze(-1), scales, zeros, table)
        neutral_there = [None if tensor is None else tensor.to(cuda) for tensor in neutral]
        qweight, scales_there, zeros_there, table_there = neutral_there
        assert qweight is not None and scales_there is not None
        operands = (
            fragments.to_fragments(qweight, bits),
            fragments.to_fragments(scales_there, bits),
            None if zeros_there is None else fragments.to_fragments(zeros_there, bits),
            table_there,
        )
        return Weight(operands, (bits, group_size, columns, rows), tuple(neutral_there))

    return make


def _check(
    y: Tensor, x: Tensor, weight: Weight, bias: Tensor | None = None, rounded: bool = False
) -> None:
    """Up to the rounding of the output and of sums in float32; entries of a codebook are rounded, too. `rounded`: all weights are, some of them in two parts (wgmma_rounded.h)."""
    exact = weight.reference(x.dtype if rounded else torch.float32).double()
    expected, largest = x.double() @ exact.T, x.double().abs() @ exact.abs().T
    if bias is not None:
        expected += bias.double()
    table = ROUNDING[x.dtype] * (1 + rounded) if weight.operands[3] is not None else 0.0
    # A zero point adds the sum of the group's activations, up to twice as large as its products.
    bound = (1e-5 + table) * largest + ROUNDING[x.dtype] * expected.abs() + 1e-6
    if rounded and x.dtype == torch.bfloat16:
        # Of two parts one weight of some hundred is the neighbour of the nearest one: of few columns it may be the two largest ones.
        most = x.double().abs().amax(1, keepdim=True) * exact.abs().amax(1)
        bound += ROUNDING[x.dtype] * (largest / 16 + 2 * most)
    assert y.dtype == x.dtype and y.shape == expected.shape
    error = (y.double() - expected).abs()
    assert (error <= bound).all(), (error / bound).max()


@pytest.fixture
def check_products(
    make_weight: MakeWeight, generator: torch.Generator, cuda: torch.device
) -> Callable[..., None]:
    def check(
        numbers: tuple[int, ...], shape: tuple[int, int, int], kind: str, rounded: bool = False
    ) -> None:
        for dtype, scale_dtype in zip(HALVES, (torch.float16, torch.float32), strict=True):
            weight = make_weight(*shape, kind=kind, scale_dtype=scale_dtype)
            for tokens in numbers:
                x = torch.randn(tokens, shape[1], generator=generator).to(cuda, dtype)
                bias = torch.randn(shape[0], generator=generator).to(cuda) if tokens % 2 else None
                y = weight.linear(x, bias)
                _check(y, x, weight, bias, rounded)
                assert torch.equal(y, weight.linear(x, bias)), "sums are in one order"

    return check


@pytest.fixture
def hopper(cuda: torch.device) -> None:
    """What wgmma and the kernels with many rows for each read of x need."""
    if torch.cuda.get_device_capability(cuda) != (9, 0):
        pytest.skip("needs compute capability 9.0")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(
    check_products: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int, int],
    kind: str,
) -> None:
    """By the kernels that all GPUs have."""
    monkeypatch.setenv("HFQ_CUDA_WGMMA", "0")
    monkeypatch.setenv("HFQ_CUDA_WIDE", "0")
    check_products((0, 1, 3, 8, 9, 19, 40, 130), shape, kind)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_with_wgmma(
    check_products: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int, int],
    kind: str,
) -> None:
    """Each number of tokens of a thread block, filled and not; ranges of all kinds come from the shapes."""
    monkeypatch.setenv("HFQ_CUDA_WGMMA", "1")
    monkeypatch.setenv("HFQ_CUDA_WIDE", "0")
    check_products((9, 16, 17, 27, 32, 33, 40, 63, 64), shape, kind)
    monkeypatch.setenv("HFQ_CUDA_WGMMA", "shared")
    check_products((33, 50, 64), shape, kind)
    monkeypatch.setenv("HFQ_CUDA_WGMMA", "pairs")
    check_products((65, 100, 128, 129, 200, 256, 300, 512, 1024), shape, kind, True)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape",
    [shape for shape in SHAPES if shape[2] % 64 == 0] + [(300, 11008, 128), (4096, 14336, 64)],
    ids=str,
)
def test_products_with_many_rows_for_each_read_of_x(
    check_products: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int, int],
    kind: str,
) -> None:
    """Warps with one step and with several, blocks by themselves and in clusters."""
    monkeypatch.setenv("HFQ_CUDA_WIDE", "1")
    check_products((1, 2, 7, 8, 9, 16), shape, kind)


@pytest.mark.parametrize("kind", ["int4", "int4_zeros"])
@pytest.mark.parametrize(
    "shape", [(40, 136, 128), (1024, 4096, 128), (33, 11008, 256), (4096, 328, 0)], ids=str
)
def test_one_token_in_digits(
    make_weight: MakeWeight,
    generator: torch.Generator,
    cuda: torch.device,
    shape: tuple[int, int, int],
    kind: str,
) -> None:
    for dtype, scale_dtype in itertools.product(ROUNDING, (torch.float16, torch.float32)):
        weight = make_weight(*shape, kind=kind, scale_dtype=scale_dtype)
        bias = torch.randn(shape[0], generator=generator).to(cuda)
        for power in (
            -12,
            0,
            4,
        ):  # zero points and many columns make outputs that float16 just holds
            x = torch.randn(1, shape[1], generator=generator).to(cuda, dtype) * 2.0**power
            x[0, shape[1] // 2] *= 30
            _check(weight.linear(x, bias), x, weight, bias)
        x[0, 5] = torch.inf
        assert weight.linear(x).isnan().all()


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    "shape",
    [(40, 136, 64), (1024, 4096, 64), (14336, 4096, 64), (33, 11008, 256), (4096, 328, 0)],
    ids=str,
)
def test_one_token_of_a_codebook_in_digits(
    make_weight: MakeWeight,
    generator: torch.Generator,
    cuda: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int, int],
    kind: str,
) -> None:
    """Thread blocks of one to eight tiles, alone and in clusters."""
    monkeypatch.setenv("HFQ_CUDA_WIDE", "1")
    monkeypatch.setenv("HFQ_CUDA_DIGITS", "1")
    for dtype, scale_dtype in itertools.product(ROUNDING, (torch.float16, torch.float32)):
        weight = make_weight(*shape, kind=kind, scale_dtype=scale_dtype)
        bias = torch.randn(shape[0], generator=generator).to(cuda)
        x = torch.randn(1, shape[1], generator=generator).to(cuda, dtype)
        x[0, shape[1] // 2] *= 30
        _check(weight.linear(x, bias), x, weight, bias)
        x[0, 5] = torch.inf
        assert weight.linear(x).isnan().all()


@pytest.mark.parametrize("kind", ["int2", "int2_zeros", "int4", "int4_zeros", "int8", "int8_zeros"])
@pytest.mark.parametrize(("tokens", "group_size"), [(3, 64), (12, 128), (16, 64)])
def test_activations_of_any_size(
    make_weight: MakeWeight,
    generator: torch.Generator,
    cuda: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    group_size: int,
    kind: str,
) -> None:
    """They meet codes that are subnormal numbers, which a tensor core has to take as they are."""
    monkeypatch.setenv("HFQ_CUDA_WIDE", "1")
    weight = make_weight(512, 2056, group_size, kind=kind)
    x = torch.randn(tokens, 2056, generator=generator).to(cuda, torch.bfloat16)
    y = weight.linear(x)
    _check(y, x, weight)
    for power in (-40, 50):
        raised = weight.linear(x * 2.0**power)
        assert torch.equal(raised.double(), y.double() * 2.0**power)


@pytest.mark.usefixtures("hopper")
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")
@pytest.mark.parametrize(
    ("variable", "value", "tokens", "kernels"),
    [
        ("HFQ_CUDA_WIDE", "1", 1, {"wide_kernel"}),
        ("HFQ_CUDA_WGMMA", "1", 16, {"wide_kernel"}),
        ("HFQ_CUDA_WIDE", "0", 16, {"gemm_kernel"}),
        ("HFQ_CUDA_WGMMA", "0", 40, {"gemm_kernel"}),
        ("HFQ_CUDA_WGMMA", "1", 40, {"wgmma_kernel"}),
        ("HFQ_CUDA_WGMMA", "shared", 40, {"arrange_kernel", "wgmma_kernel"}),
        ("HFQ_CUDA_WGMMA", "1", 70, {"arrange_kernel", "wgmma_kernel"}),
    ],
)
def test_the_kernel_that_is_wanted_is_taken(
    make_weight: MakeWeight,
    generator: torch.Generator,
    cuda: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    tokens: int,
    kernels: set[str],
) -> None:
    monkeypatch.setenv(variable, value)
    weight = make_weight(1024, 4096, 128)
    x = torch.randn(tokens, 4096, generator=generator).to(cuda, torch.bfloat16)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        weight.linear(x)
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    if not any("hfq" in name for name in names):
        pytest.skip("the profiler sees no kernels")
    possible = ("arrange_kernel", "wgmma_kernel", "gemm_kernel", "wide_kernel")
    assert {part for part in possible if any(part in name for name in names)} == kernels, names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantize_and_lookup_are_the_reference(
    make_weight: MakeWeight,
    generator: torch.Generator,
    cuda: torch.device,
    shape: tuple[int, int, int],
    kind: str,
) -> None:
    for scale_dtype in FLOATS:
        weight = make_weight(*shape, kind=kind, scale_dtype=scale_dtype)
        for dtype in FLOATS:
            expected = weight.reference(dtype)
            dense = torch.ops.hfq.cuda_dequantize(*weight.operands, *weight.sizes, dtype)
            assert torch.equal(dense, expected)
            index = torch.randint(shape[0], (35,), generator=generator).to(cuda)
            rows = torch.ops.hfq.cuda_lookup(index, *weight.operands, *weight.sizes, dtype)
            assert torch.equal(rows, expected[index])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_reaches_the_outputs_of_its_token(
    make_weight: MakeWeight,
    generator: torch.Generator,
    cuda: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    bad: float,
) -> None:
    monkeypatch.setenv("HFQ_CUDA_WGMMA", "pairs")  # for 70 tokens, where there is wgmma
    weight = make_weight(20, 136, 64, kind=kind)
    for dtype, tokens in itertools.product(HALVES, (7, 12, 40, 70, 200)):
        x = torch.randn(tokens, 136, generator=generator).to(cuda, dtype)
        x[4, 135] = bad
        finite = weight.linear(x).isfinite()
        assert not finite[4].any()
        assert finite[torch.arange(tokens) != 4].all()


def test_activations_that_begin_anywhere(
    make_weight: MakeWeight, generator: torch.Generator, cuda: torch.device
) -> None:
    weight = make_weight(40, 136, 64)
    storage = torch.randn(3 * 136 + 1, generator=generator).to(cuda, torch.bfloat16)
    x = storage[1:].view(3, 136)
    assert torch.equal(weight.linear(x), weight.linear(x.clone()))


@pytest.mark.parametrize("kind", ["int4", "int3_zeros", "nf4", "int8", "e4m3"])
def test_on_another_gpu_than_the_current_one(
    make_weight: MakeWeight, generator: torch.Generator, kind: str
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    here, there = torch.device("cuda", 0), torch.device("cuda", 1)
    weight = make_weight(1040, 4096, 128, kind=kind)
    operands, neutral = (
        tuple(None if tensor is None else tensor.to(there) for tensor in tensors)
        for tensors in (weight.operands, weight.neutral)
    )
    moved, stream = Weight(operands, weight.sizes, neutral), torch.cuda.Stream(there)
    torch.cuda.synchronize(there)
    assert torch.cuda.current_device() == 0
    for tokens in (1, 8, 9, 64, 130):
        x = torch.randn(tokens, 4096, generator=generator).to(there, torch.bfloat16)
        torch.cuda.synchronize(there)
        with torch.cuda.stream(stream), torch.cuda.device(here):
            y = moved.linear(x)
        torch.cuda.synchronize(there)
        assert y.device == there and torch.cuda.current_device() == 0
        _check(y, x, moved)
    for mixed, other in ((moved, x.to(here)), (weight, x)):
        with pytest.raises(RuntimeError, match="x must be on the device of qweight"):
            mixed.linear(other)


def test_opcheck(make_weight: MakeWeight, generator: torch.Generator, cuda: torch.device) -> None:
    check, hfq = torch.library.opcheck, torch.ops.hfq
    for kind in ("int3", "int4_zeros", "nf4", "e4m3"):
        w = make_weight(40, 136, 64, kind=kind)
        arguments = (*w.operands, *w.sizes)
        x = torch.randn(3, 136, generator=generator).to(cuda, torch.bfloat16).requires_grad_()
        bias = torch.randn(40, generator=generator).to(cuda).requires_grad_()
        check(hfq.cuda_dequantize.default, (*arguments, torch.bfloat16))
        check(
            hfq.cuda_lookup.default, (torch.tensor([3, 39], device=cuda), *arguments, torch.float16)
        )
        check(hfq.cuda_linear.default, (x, *w.operands, bias, *w.sizes))
        check(hfq.cuda_linear_dequantized.default, (x, *w.operands, None, *w.sizes))
        grad = torch.randn(3, 40, generator=generator).to(cuda, torch.bfloat16).requires_grad_()
        check(hfq.cuda_linear_gradient.default, (grad, *arguments))


@pytest.mark.parametrize(
    ("tokens", "wgmma", "kind"),
    [
        *((tokens, "0", "int4_zeros") for tokens in (2, 64)),
        *((tokens, "1", "int4_zeros") for tokens in (16, 32, 64, 100, 200)),
        (64, "1", "int4"),
        (64, "shared", "int4"),
    ],
)
def test_in_a_cuda_graph(
    make_weight: MakeWeight,
    generator: torch.Generator,
    cuda: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    wgmma: str,
    kind: str,
) -> None:
    """Several thread blocks share the columns: sums meet in memory that PyTorch has lent, with wgmma by flags with the same tag at each replay."""
    monkeypatch.setenv("HFQ_CUDA_WIDE", "0")
    monkeypatch.setenv("HFQ_CUDA_WGMMA", wgmma)
    weight = make_weight(1024, 4096, 128, kind=kind)
    x = torch.randn(tokens, 4096, generator=generator).to(cuda, torch.bfloat16)
    graph, y = captured(lambda: weight.linear(x))
    for _ in range(2):
        x.copy_(torch.randn(tokens, 4096, generator=generator))
        graph.replay()
        assert torch.equal(y, weight.linear(x))


@pytest.mark.parametrize(
    ("tokens", "wgmma"),
    [(1, "0"), (16, "0"), (16, "1"), (64, "1"), (64, "shared"), (100, "1"), (200, "1")],
)
def test_products_that_overlap(
    make_weight: MakeWeight,
    generator: torch.Generator,
    cuda: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    wgmma: str,
) -> None:
    """Each product reads what the one before gives, and writes where an earlier one has been read: as if they did not overlap."""
    monkeypatch.setenv("HFQ_CUDA_WIDE", "1" if wgmma == "0" else "0")
    monkeypatch.setenv("HFQ_CUDA_WGMMA", wgmma)
    weights = [make_weight(*shape, 128) for shape in ((3072, 4096), (4096, 3072)) * 3]
    # Codes of -8 .. 7 are negative on average: outputs would grow 20 times with each product.
    for i, weight in enumerate(weights):
        qweight, scales, *rest = weight.operands
        assert scales is not None
        weights[i] = replace(weight, operands=(qweight, scales * 0.05, *rest))
    x = torch.randn(tokens, 4096, generator=generator).to(cuda, torch.bfloat16)
    check_overlap([weight.linear for weight in weights], x, monkeypatch)


def test_bad_arguments_are_refused(make_weight: MakeWeight, cuda: torch.device) -> None:
    weight = make_weight(40, 128, 64)
    qweight, scales, zeros, table = weight.operands
    assert qweight is not None and scales is not None
    x = torch.zeros(1, 128, device=cuda, dtype=torch.bfloat16)

    def run(x: Tensor, qweight: Tensor, scales: Tensor, *sizes: int) -> None:
        torch.ops.hfq.cuda_linear(x, qweight, scales, zeros, table, None, *(sizes or weight.sizes))

    run(x, qweight, scales)
    for words, arguments in (
        ("bits must be 2, 3, 4 or 8", (x, qweight, scales, 5, 64, 128, 40)),
        ("in_features must be a multiple of 8", (x, qweight, scales, 4, 64, 132, 40)),
        ("group_size must be a multiple of 32", (x, qweight, scales, 4, 48, 128, 40)),
        ("qweight must be of shape", (x, qweight[1:], scales)),
        ("scales must be of shape", (x, qweight, scales[1:])),
        ("scales must be on the device", (x, qweight, scales.cpu())),
        ("x must be float16 or bfloat16", (x.float(), qweight, scales)),
        ("x must be of shape", (x[:, 8:], qweight, scales)),
        ("x must be contiguous", (x.expand(2, 128).T.contiguous().T, qweight, scales)),
    ):
        with pytest.raises(RuntimeError, match=words):
            run(*arguments)


@pytest.mark.parametrize("bits", fragments.BITS)
def test_modules(generator: torch.Generator, cuda: torch.device, bits: int) -> None:
    if not native.load().cuda:
        pytest.skip(f"no native CUDA kernels: {native.load().cuda_reason}")
    spec = IntSpec(bits=bits, group_size=32, sym=False)
    check_module(quantized(264, 72, "int", spec, generator), "cuda_fragments", cuda, generator)
