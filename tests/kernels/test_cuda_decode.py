"""What stands between the products of a decode step, on a GPU: operators, modules that use them, CUDA graphs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from on_gpu import captured
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from hfq.integrations import decode as decoding
from hfq.integrations import decode_modules
from hfq.kernels import decode, native

pytestmark = pytest.mark.gpu

OPS = torch.ops.hfq
HALVES = (torch.float16, torch.bfloat16)
STEP = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def _loaded(cuda: torch.device) -> None:
    assert native.load().cuda, native.load().cuda_reason


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def assert_near(found: Tensor, exact: Tensor) -> None:
    step = STEP[found.dtype]
    scale = exact.abs().amax().clamp(min=1).item()
    torch.testing.assert_close(found.double(), exact, rtol=step, atol=step * scale)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("columns", [1, 15, 64, 1000, 4096, 20000])
@pytest.mark.parametrize(("offset", "round_first"), [(0.0, True), (1.0, False)])
def test_norm(columns: int, offset: float, round_first: bool, dtype: torch.dtype) -> None:
    x, weight = 30 * normal(700, 2, columns, dtype=dtype), normal(columns, dtype=dtype)
    found = OPS.rms_norm(x, weight, 1e-5, offset, round_first)
    wide = x.double()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    assert_near(found, normed * (weight.double() + offset))
    assert OPS.rms_norm(x[:0], weight, 1e-5, offset, round_first).shape == (0, 2, columns)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(5, 1, 48), (32, 8, 128), (3, 3, 130)])
@pytest.mark.parametrize("shared", [True, False])
def test_rotation(heads: int, kv_heads: int, size: int, shared: bool, dtype: torch.dtype) -> None:
    together = normal(3, 1, (heads + 2 * kv_heads) * size, dtype=dtype)
    q, k, _ = together.split_with_sizes([n * size for n in (heads, kv_heads, kv_heads)], -1)
    angle = normal(1 if shared else 3, 1, size)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    for ours, theirs in zip(OPS.rotate(q, k, cos, sin), decode.rotate(q, k, cos, sin), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("tanh_gelu", [True, False])
@pytest.mark.parametrize("columns", [31, 14336])
def test_gate(columns: int, tanh_gelu: bool, dtype: torch.dtype) -> None:
    gate, up = (6 * normal(20, 2 * columns, dtype=dtype)).split_with_sizes([columns] * 2, -1)
    found = OPS.gate(gate, up, tanh_gelu)
    assert_near(found, decode.gate(gate.double(), up.double(), tanh_gelu))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(8, 2, 64), (6, 6, 80), (9, 1, 128), (32, 8, 128), (4, 2, 256)]
)
@pytest.mark.parametrize("length", [1, 65, 3000])
def test_attention(heads: int, kv_heads: int, size: int, length: int, dtype: torch.dtype) -> None:
    batch, scale = 2, 1 / math.sqrt(size)
    q = 2 * normal(batch, heads, 1, size, dtype=dtype)
    k, v = (2 * normal(batch, kv_heads, length + 3, size, dtype=dtype) for _ in range(2))
    k[:, :, length:] = torch.nan
    v[:, :, length:] = torch.nan
    seen = normal(batch, 1, 1, length) > -0.3
    seen[..., -1] = True
    for mask in (None, seen, normal(batch, heads, 1, length, dtype=dtype)):
        wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
        exact = decode.attend(q.double(), k.double(), v.double(), length, wide, scale)
        assert_near(OPS.attend(q, k, v, length, mask, scale), exact)


def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=500,
    )
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()


@torch.no_grad()
def test_a_model_decodes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    llama, asked = model(), []
    ids = torch.randint(3, 500, (2, 9), device="cuda")
    settings = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20}
    plain = llama.generate(ids, **settings, return_dict_in_generate=True, output_logits=True)
    assert decoding.install(llama) == {"norms": 7, "gates": 3, "attentions": 3}
    attention = decode_modules.native_attention
    monkeypatch.setattr(
        decode_modules,
        "native_attention",
        lambda *a, **k: (asked.append(1), attention(*a, **k))[1],
    )
    found = llama.generate(ids, **settings, return_dict_in_generate=True, output_logits=True)
    assert len(asked) == 3 * 19
    # Roundings differ, so that a later token may; the first logits come from the same ids.
    first, expected = found.logits[1].float(), plain.logits[1].float()
    assert ((first - expected).norm() / expected.norm()).item() < 0.02


@torch.no_grad()
def test_a_step_in_a_graph() -> None:
    llama = model()
    decoding.install(llama)
    cache = StaticCache(config=llama.config, max_cache_len=64)
    ids = torch.randint(3, 500, (2, 9), device="cuda")
    llama(ids, past_key_values=cache, use_cache=True)
    token, position = ids[:, :1].clone(), torch.tensor([[9]], device="cuda")
    seen = (torch.arange(64, device="cuda") <= 9)[None, None, None].expand(2, 1, 1, 64)

    def step() -> Tensor:
        logits: Tensor = llama(
            token,
            attention_mask=seen,
            position_ids=position.expand(2, 1),
            past_key_values=cache,
            use_cache=True,
        ).logits
        return logits

    graph, logits = captured(step)
    graph.replay()
    assert torch.isfinite(logits).all()
