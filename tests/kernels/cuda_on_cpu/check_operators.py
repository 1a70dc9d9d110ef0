"""Run by test_cuda_linear_emulated.py in a process of its own: the operators ``hfq::cuda_*`` on the CPU are those of CUDA, emulated.

See operators_on_cpu.py.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from operators_on_cpu import emulated, on_cpu, refused, strided, use_row
from torch import Tensor, nn

from hfq.core.activations import quantize_tokens
from hfq.core.float8 import E4M3
from hfq.core.spec import CodebookSpec, Fp8Spec, Int8Spec, IntSpec
from hfq.core.weight import Fp8Grid, PackedGrid
from hfq.kernels import (
    cuda,
    cuda_fp8,
    cuda_int8,
    cuda_int8_ops,
    decode,
    fp8,
)
from hfq.kernels.int8 import int8_linear
from hfq.nn.embedding import QuantEmbedding
from hfq.nn.linear import QuantLinear

N, K = 48, 136
ROW = on_cpu(cuda.CudaFragments)


def linear_module(spec: IntSpec | CodebookSpec, format: str, bias: bool = True) -> QuantLinear:
    linear = nn.Linear(K, N, bias=bias, dtype=torch.bfloat16)
    return QuantLinear.from_linear(linear, format=format, spec=spec)


def prepared_grid(module: QuantLinear) -> PackedGrid:
    """The module's operands in layout fragments."""
    module.prepare()
    grid = module.grid("weight")
    assert isinstance(grid, PackedGrid) and module.kernel("weight") is ROW
    return grid


def check_modules() -> None:
    for format, spec in (
        ("int", IntSpec(bits=2, group_size=32, sym=False)),
        ("int", IntSpec(bits=3, group_size=64)),
        ("int", IntSpec(bits=4, group_size=128, scale_dtype="bfloat16")),
        ("int", IntSpec(bits=8, group_size=-1, sym=False, scale_dtype="float32")),
        ("nf4", CodebookSpec(group_size=64, double_quant=True)),
    ):
        module = linear_module(spec, format)
        saved = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        weight = module.dequantize().double()
        module.restore()
        use_row(PackedGrid, ROW)
        module.prepare()
        assert module.kernel_choice("weight").row is ROW
        assert module.bias is not None
        for tokens in (0, 1, 3, 9, 70):
            x = torch.randn(2, tokens, K).bfloat16()[1].requires_grad_()
            expected = x.detach().double() @ weight.T + module.bias.double()
            y = module(x)
            torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)
            grad = torch.randn(tokens, N).bfloat16()
            y.backward(grad)
            assert x.grad is not None
            torch.testing.assert_close(
                x.grad.double(), grad.double() @ weight, rtol=1e-2, atol=1e-2
            )
        with torch.no_grad():
            x = torch.randn(1, K)
            expected = torch.nn.functional.linear(
                x, module.dequantize().float(), module.bias.float()
            )
            torch.testing.assert_close(module(x), expected, rtol=1e-2, atol=1e-2)
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, saved[name]), name

    table = QuantEmbedding.from_embedding(
        nn.Embedding(N, K, dtype=torch.bfloat16), format="int", spec=IntSpec(group_size=32)
    )
    ids = torch.randint(N, (2, 5))
    assert torch.equal(table(ids), table.dequantize()[ids])


def check_arguments() -> None:
    module = linear_module(IntSpec(group_size=32, sym=False), "int", bias=False)
    grid = prepared_grid(module)
    sizes = (4, 32, K, N)
    storage = torch.randn(2 * K + 1).bfloat16()
    moved = storage[1:].view(2, K)

    def linear(
        x: Tensor = moved,
        sizes: tuple[int, ...] = sizes,
        bias: Tensor | None = None,
        table: Tensor | None = None,
        **changes: Tensor,
    ) -> Tensor:
        g = replace(grid, **changes)
        y: Tensor = torch.ops.hfq.cuda_linear(x, g.qweight, g.scales, g.zeros, table, bias, *sizes)
        return y

    assert torch.equal(linear(), linear(moved.clone())), "activations that begin anywhere"
    assert grid.zeros is not None
    refused("bits must be 2, 3, 4 or 8, got 5", lambda: linear(sizes=(5, *sizes[1:])))
    refused("in_features must be a multiple of 8", lambda: linear(sizes=(4, 32, 132, N)))
    refused("in_features must be a multiple of 8", lambda: linear(sizes=(4, 32, 1 << 20, N)))
    refused("out_features must be between", lambda: linear(sizes=(4, 32, K, 0)))
    refused("group_size must be a multiple of 32", lambda: linear(sizes=(4, 48, K, N)))
    refused("qweight must be uint8", lambda: linear(qweight=grid.qweight.char()))
    refused("qweight must be of shape", lambda: linear(qweight=grid.qweight[1:]))
    refused("qweight must be contiguous", lambda: linear(qweight=strided(grid.qweight)))
    refused("scales must be of shape", lambda: linear(scales=grid.scales[..., 1:]))
    refused("scales must be float32, float16", lambda: linear(scales=grid.scales.double()))
    refused("zeros must be of the same dtype", lambda: linear(zeros=grid.zeros.float()))
    refused("a codebook takes 4 bits and no zeros", lambda: linear(table=torch.zeros(16)))
    refused("x must be float16 or bfloat16", lambda: linear(moved.float()))
    refused("x must be of shape", lambda: linear(moved[:, 8:]))
    refused("x must be of shape", lambda: linear(moved[None]))
    refused("x must be contiguous", lambda: linear(strided(moved)))
    refused("bias must be of shape", lambda: linear(bias=torch.zeros(N + 1)))
    refused("bias must be float32", lambda: linear(bias=torch.zeros(N).int()))
    lookup = torch.ops.hfq.cuda_lookup
    operands = (grid.qweight, grid.scales, grid.zeros, None, *sizes, torch.float16)
    refused("index must be int64 of shape", lambda: lookup(torch.zeros(1).int(), *operands))
    refused(
        "dtype must be float32", lambda: lookup(torch.zeros(1).long(), *operands[:-1], torch.int8)
    )


def stack(count: int) -> PackedGrid:
    """Weights of so many experts."""
    grids = [
        prepared_grid(linear_module(IntSpec(group_size=32, sym=False), "int")) for _ in range(count)
    ]
    first = grids[0]
    assert first.zeros is not None
    return replace(
        first,
        qweight=torch.stack([grid.qweight for grid in grids]),
        scales=torch.stack([grid.scales for grid in grids]),
        zeros=torch.stack([grid.zeros for grid in grids if grid.zeros is not None]),
    )


def check_experts() -> None:
    grid, sizes = stack(3), (4, 32, K, N)
    bias = torch.randn(3, N).half()
    counts = torch.tensor([5, 0, 12])
    x = torch.randn(20 * K + 1).bfloat16()[1:].view(20, K)

    def experts(
        x: Tensor = x,
        counts: Tensor = counts,
        sizes: tuple[int, ...] = sizes,
        bias: Tensor | None = bias,
        **changes: Tensor,
    ) -> Tensor:
        g = replace(grid, **changes)
        operands = (g.qweight, g.scales, g.zeros, None)
        y: Tensor = torch.ops.hfq.cuda_experts_linear(x, counts, *operands, bias, *sizes)
        return y

    y = experts()
    assert not y[17:].any(), "zeros behind the sum of counts"
    for expert, tokens in ((0, slice(0, 5)), (2, slice(5, 13)), (2, slice(13, 17))):
        alone = ROW.linear(x[tokens], grid.expert(expert), bias[expert], False)
        # More than 8 tokens of one weight go through a kernel that sums in another order.
        torch.testing.assert_close(y[tokens], alone)
    assert torch.equal(ROW.experts(x, counts, grid, bias, False), y)
    assert experts(x[:0], torch.zeros(3).long()).shape == (0, N)
    leaf = x[:17].clone().requires_grad_()
    ROW.experts(leaf, counts, grid, bias, False).sum().backward()
    assert leaf.grad is not None and leaf.grad.any()

    assert grid.zeros is not None
    none = grid.qweight[:0]
    refused("takes 1 to 1024 experts, got 0", lambda: experts(qweight=none))
    many = none.new_empty(1025, *none.shape[1:])
    refused("takes 1 to 1024 experts, got 1025", lambda: experts(qweight=many))
    refused("takes up to 2.20 tokens", lambda: experts(x.new_empty((1 << 20) + 1, K)))
    refused("counts must be int64", lambda: experts(counts=counts.int()))
    refused("counts must be of shape", lambda: experts(counts=counts[:2]))
    refused("counts must be contiguous", lambda: experts(counts=strided(counts)))
    refused("qweight must be of shape", lambda: experts(qweight=grid.qweight[0]))
    refused("scales must be of shape", lambda: experts(scales=grid.scales[:2]))
    refused("zeros must be of shape", lambda: experts(zeros=grid.zeros[0]))
    refused("bias must be of shape", lambda: experts(bias=bias[0]))
    refused("x must be float16 or bfloat16", lambda: experts(x.float()))
    refused("x must be of shape", lambda: experts(x[:, 8:]))
    operands = (grid.qweight, grid.scales, grid.zeros, None, bias)
    torch.library.opcheck(torch.ops.hfq.cuda_experts_linear.default, (x, counts, *operands, *sizes))


def check_schemas() -> None:
    module = linear_module(IntSpec(group_size=32), "int", bias=False)
    grid = prepared_grid(module)
    operands, sizes = (grid.qweight, grid.scales, None, None), (4, 32, K, N)
    check, hfq = torch.library.opcheck, torch.ops.hfq
    x = torch.randn(3, K).bfloat16().requires_grad_()
    check(hfq.cuda_linear.default, (x, *operands, torch.zeros(N), *sizes))
    check(hfq.cuda_dequantize.default, (*operands, *sizes, torch.float16))
    check(hfq.cuda_lookup.default, (torch.tensor([3, 47]), *operands, *sizes, torch.float32))


INT8 = on_cpu(cuda_int8.CudaInt8)
INT8_K = 144


def int8_module(activation: str) -> QuantLinear:
    """In layout signed."""
    linear = nn.Linear(INT8_K, N, dtype=torch.bfloat16)
    module = QuantLinear.from_linear(linear, format="int8", spec=Int8Spec(activation=activation))
    if activation == "static":
        module.set_packed(
            "weight",
            {**module.neutral_tensors("weight"), "weight_input_scale": torch.tensor([0.02])},
        )
    module.restore()
    use_row(PackedGrid, INT8)
    module.prepare()
    assert module.kernel_choice("weight").row is INT8
    return module


def check_int8_modules() -> None:
    for activation in ("dynamic", "static"):
        module = int8_module(activation)
        saved = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        neutral = module.neutral_tensors("weight")
        operands = (neutral["weight"], neutral["weight_scale"], neutral.get("weight_input_scale"))
        weight = module.dequantize().double()
        dense = (neutral["weight"].squeeze(-1).float() - 128) * operands[1]
        assert torch.equal(weight, dense.bfloat16().double())
        cuda_int8_ops._SUMS = 4 * N * 25  # 40 tokens in two parts
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            for tokens in (0, 1, 5, 32, 33, 40):
                x = torch.randn(2, tokens, INT8_K).to(dtype)[1].requires_grad_()
                expected = int8_linear(x.detach(), *operands, module.bias, INT8_K)
                y = module(x)
                assert y.dtype == dtype
                # Float64 is rounded to float32 on the way.
                assert torch.equal(
                    y, expected if dtype != torch.float64 else expected.float().double()
                )
                with torch.no_grad():
                    assert torch.equal(module(x), y)
                grad = torch.randn(tokens, N).to(dtype)
                y.backward(grad)
                assert x.grad is not None
                torch.testing.assert_close(
                    x.grad.double(), grad.double() @ weight, rtol=1e-2, atol=1e-2
                )
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, saved[name]), name
        module.restore()
        assert torch.equal(module._parameters["qweight"], neutral["weight"])


def check_int8_arguments() -> None:
    module = int8_module("static")
    grid = module.grid("weight")
    assert isinstance(grid, PackedGrid)
    static = grid.input_scale
    assert static is not None
    storage = torch.randn(6 * INT8_K + 1).bfloat16()
    moved = storage[1:].view(6, INT8_K)

    def linear(
        x: Tensor = moved,
        qweight: Tensor = grid.qweight,
        scales: Tensor = grid.scales,
        input_scale: Tensor | None = static,
        bias: Tensor | None = None,
        sizes: tuple[int, int] = (INT8_K, N),
    ) -> Tensor:
        y: Tensor = torch.ops.hfq.cuda_int8_linear(x, qweight, scales, input_scale, bias, *sizes)
        return y

    for tokens in (2, 6):
        part = moved[:tokens]
        assert torch.equal(linear(part), linear(part.clone())), "activations that begin anywhere"
    refused("in_features must be a multiple of 16 up", lambda: linear(sizes=(136, N)))
    refused("in_features must be a multiple of 16 up", lambda: linear(sizes=(1 << 18, N)))
    refused("out_features must be between", lambda: linear(sizes=(INT8_K, 0)))
    refused("qweight must be uint8", lambda: linear(qweight=grid.qweight.char()))
    refused("qweight must be of shape", lambda: linear(qweight=grid.qweight[1:]))
    refused("qweight must be contiguous", lambda: linear(qweight=strided(grid.qweight)))
    shifted = torch.zeros(N * INT8_K + 1, dtype=torch.uint8)[1:].view(grid.qweight.shape)
    refused("qweight must be aligned to 16", lambda: linear(qweight=shifted))
    refused("scales must be of shape", lambda: linear(scales=grid.scales[1:]))
    refused("scales must be float32, float16", lambda: linear(scales=grid.scales.double()))
    refused("input_scale must be float32", lambda: linear(input_scale=static.double()))
    refused("input_scale must be of shape", lambda: linear(input_scale=torch.ones(2)))
    refused("bias must be of shape", lambda: linear(bias=torch.zeros(N + 1)))
    refused("x must be float32, float16", lambda: linear(moved.double()))
    refused("x must be of shape", lambda: linear(moved[:, 16:]))
    refused("x must be contiguous", lambda: linear(strided(moved)))
    quantize = torch.ops.hfq.cuda_quantize_tokens
    refused("x must be of shape", lambda: quantize(moved[0], None))
    refused("in_features must be a multiple of 16", lambda: quantize(moved[:, 8:].clone(), None))
    refused("input_scale must be float32", lambda: quantize(moved, static.half()))
    sums, out, ones = torch.zeros(6, N, dtype=torch.int32), torch.zeros(6, N), torch.ones(6, 1)

    def scale_sums(
        out: Tensor = out,
        sums: Tensor = sums,
        token_scales: Tensor = ones,
        scales: Tensor = grid.scales,
        bias: Tensor | None = None,
    ) -> Tensor:
        torch.ops.hfq.cuda_scale_sums(out, sums, token_scales, scales, bias)
        return out

    scale_sums()
    refused("sums must be int32", lambda: scale_sums(sums=sums.long()))
    refused("sums must be contiguous", lambda: scale_sums(sums=strided(sums)))
    refused("out must be of shape", lambda: scale_sums(out[1:]))
    refused("out must be float32", lambda: scale_sums(out.double()))
    refused("token_scales must be of shape", lambda: scale_sums(token_scales=out[:, 0].clone()))
    refused("scales must be of shape", lambda: scale_sums(scales=grid.scales[1:]))
    refused("bias must be of shape", lambda: scale_sums(bias=torch.zeros(1)))


def check_int8_schemas() -> None:
    grid = int8_module("static").grid("weight")
    assert isinstance(grid, PackedGrid)
    check, hfq = torch.library.opcheck, torch.ops.hfq
    for tokens in (0, 3, 40):
        x = torch.randn(tokens, INT8_K).bfloat16().requires_grad_()
        bias = torch.zeros(N).requires_grad_()
        arguments = (grid.qweight, grid.scales, grid.input_scale, bias, INT8_K, N)
        check(hfq.cuda_int8_linear.default, (x, *arguments))
        check(hfq.cuda_int8_linear_cublas.default, (x, *arguments))
        check(hfq.cuda_quantize_tokens.default, (x.detach(), None))
        sums, scales = torch.zeros(tokens, N, dtype=torch.int32), torch.ones(tokens, 1)
        out = torch.zeros(tokens, N)
        check(hfq.cuda_scale_sums.default, (out, sums, scales, grid.scales, None))


def check_decode() -> None:
    """What stands between the products: the kernels' own tests call the launchers, this is the way there."""
    hfq = torch.ops.hfq
    x, weight = torch.randn(3, 2, 64).bfloat16(), torch.randn(64).bfloat16()
    normed = hfq.rms_norm(x, weight, 1e-5, 0.0, True)
    torch.testing.assert_close(normed, decode.rms_norm(x, weight, 1e-5, 0.0, True))
    refused("weight must be of shape", lambda: hfq.rms_norm(x, weight[1:], 1e-5, 0.0, True))
    refused("weight must be of the dtype", lambda: hfq.rms_norm(x, weight.half(), 1e-5, 0.0, True))

    together = torch.randn(2, 1, 3 * 64).half()
    q, k = together.split_with_sizes([128, 64], -1)
    angle = torch.randn(1, 1, 32)
    cos, sin = angle.cos().half(), angle.sin().half()
    for found, expected in zip(
        hfq.rotate(q, k, cos, sin), decode.rotate(q, k, cos, sin), strict=True
    ):
        assert torch.equal(found, expected)
    refused("of the dtype of q and k", lambda: hfq.rotate(q, k.float(), cos, sin))
    gated = hfq.gate(q[..., :64], k, False)
    torch.testing.assert_close(gated, decode.gate(q[..., :64], k, False))

    q = torch.randn(2, 4, 1, 64).bfloat16()
    k, v = torch.randn(2, 2, 2, 200, 64).bfloat16()
    seen = torch.randn(2, 1, 1, 190) > 0
    for count in (1, 100):  # without and with a workspace
        emulated.set_multiprocessors(count)
        found = hfq.attend(q, k, v, 190, seen, 0.1)
        expected = decode.attend(q.double(), k.double(), v.double(), 190, seen, 0.1)
        torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)
    refused(
        "at most 512 bytes", lambda: hfq.attend(*(torch.randn(1, 1, 1, 272),) * 3, 1, None, 1.0)
    )
    refused("mask must be of shape", lambda: hfq.attend(q, k, v, 189, seen, 0.1))


FP8 = on_cpu(cuda_fp8.CudaFp8)


def fp8_module(activation: str) -> QuantLinear:
    linear = nn.Linear(INT8_K, N, dtype=torch.bfloat16)
    module = QuantLinear.from_linear(linear, format="fp8", spec=Fp8Spec(activation=activation))
    if activation == "static":
        module.set_packed(
            "weight",
            {**module.neutral_tensors("weight"), "weight_input_scale": torch.tensor([0.006])},
        )
    module.restore()
    use_row(Fp8Grid, FP8)
    module.prepare()
    assert module.kernel_choice("weight").row is FP8
    return module


def check_fp8_modules() -> None:
    for activation in ("dynamic", "static"):
        module = fp8_module(activation)
        saved = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        grid = module.grid("weight")
        operands = (grid.qweight, grid.scales, grid.input_scale)
        weight = module.dequantize().double()
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            for tokens in (0, 1, 5, 32, 33, 40):
                x = torch.randn(2, tokens, INT8_K).to(dtype)[1].requires_grad_()
                expected = fp8.linear(x.detach(), *operands, module.bias)
                y = module(x)
                assert y.dtype == dtype
                # Bfloat16 on the way where the matrix library multiplies.
                bound = 2**-7 if dtype.itemsize == 2 else 1e-5
                torch.testing.assert_close(y, expected, rtol=bound, atol=bound)
                with torch.no_grad():
                    assert torch.equal(module(x), y)
                grad = torch.randn(tokens, N).to(dtype)
                y.backward(grad)
                assert x.grad is not None
                torch.testing.assert_close(
                    x.grad.double(), grad.double() @ weight, rtol=1e-2, atol=1e-2
                )
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, saved[name]), name


def check_fp8_arguments() -> None:
    grid = fp8_module("static").grid("weight")
    static = grid.input_scale
    assert static is not None
    storage = torch.randn(6 * INT8_K + 1).bfloat16()
    moved = storage[1:].view(6, INT8_K)

    def linear(
        x: Tensor = moved,
        qweight: Tensor = grid.qweight,
        scales: Tensor = grid.scales,
        input_scale: Tensor | None = static,
        bias: Tensor | None = None,
    ) -> Tensor:
        y: Tensor = torch.ops.hfq.cuda_fp8_linear(x, qweight, scales, input_scale, bias)
        return y

    for tokens in (2, 6):
        part = moved[:tokens]
        assert torch.equal(linear(part), linear(part.clone())), "activations that begin anywhere"
    refused("qweight must be uint8 of shape", lambda: linear(qweight=grid.qweight.char()))
    refused("qweight must be uint8 of shape", lambda: linear(qweight=grid.qweight[..., 0]))
    refused("in_features must be a multiple of 16 up", lambda: linear(qweight=grid.qweight[:, 8:]))
    refused("in_features must be a multiple of 16 up", lambda: linear(qweight=grid.qweight[:, :0]))
    refused("out_features must be between", lambda: linear(qweight=grid.qweight[:0]))
    refused("qweight must be contiguous", lambda: linear(qweight=strided(grid.qweight)))
    shifted = torch.zeros(N * INT8_K + 1, dtype=torch.uint8)[1:].view(grid.qweight.shape)
    refused("qweight must be aligned to 16", lambda: linear(qweight=shifted))
    refused("scales must be of shape", lambda: linear(scales=grid.scales[1:]))
    refused("scales must be float32, float16", lambda: linear(scales=grid.scales.double()))
    refused("input_scale must be float32", lambda: linear(input_scale=static.double()))
    refused("input_scale must be of shape", lambda: linear(input_scale=torch.ones(2)))
    refused("bias must be of shape", lambda: linear(bias=torch.zeros(N + 1)))
    refused("x must be float32, float16", lambda: linear(moved.double()))
    refused("x must be of shape", lambda: linear(moved[:, 16:]))
    refused("x must be contiguous", lambda: linear(strided(moved)))
    quantize = torch.ops.hfq.cuda_fp8_quantize_tokens
    for tokens in (0, 1, 6):
        for scale in (None, static):
            codes, scales = quantize(moved[:tokens], scale)
            wanted = quantize_tokens(moved[:tokens], scale, E4M3)
            assert codes.dtype == E4M3 and codes.shape == wanted[0].shape
            assert torch.equal(codes.view(torch.uint8), wanted[0].view(torch.uint8))
            assert torch.equal(scales, wanted[1])
    refused("x must be of shape", lambda: quantize(moved[0], None))
    refused("in_features must be a multiple of 16", lambda: quantize(moved[:, 8:].clone(), None))
    refused("input_scale must be float32", lambda: quantize(moved, static.half()))


def check_fp8_schemas() -> None:
    grid = fp8_module("static").grid("weight")
    check, hfq = torch.library.opcheck, torch.ops.hfq
    for tokens in (0, 3, 40):
        x = torch.randn(tokens, INT8_K).bfloat16().requires_grad_()
        bias = torch.zeros(N).requires_grad_()
        arguments = (grid.qweight, grid.scales, grid.input_scale, bias)
        check(hfq.cuda_fp8_linear.default, (x, *arguments))
        check(hfq.fp8_scaled_linear.default, (x, *arguments))
        check(hfq.cuda_fp8_quantize_tokens.default, (x.detach(), None))


torch.manual_seed(0)
check_decode()
check_modules()
check_int8_modules()
check_int8_arguments()
check_int8_schemas()
check_fp8_modules()
check_fp8_arguments()
check_fp8_schemas()
use_row(PackedGrid, ROW)
check_arguments()
check_experts()
check_schemas()
sys.stdout.write("all checks passed\n")
