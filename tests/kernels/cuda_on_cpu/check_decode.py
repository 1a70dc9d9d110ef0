"""Run by test_cuda_decode_emulated.py in a process of its own: operators between the products are on the CPU those of CUDA, emulated.

The kernels' own tests call the launchers, this is the way there. See operators_on_cpu.py.
"""

from __future__ import annotations

import sys

import torch
from operators_on_cpu import emulated, refused

from hfq.kernels import decode

hfq = torch.ops.hfq

x, weight = torch.randn(3, 2, 64).bfloat16(), torch.randn(64).bfloat16()
normed = hfq.rms_norm(x, weight, 1e-5, 0.0, True)
torch.testing.assert_close(normed, decode.rms_norm(x, weight, 1e-5, 0.0, True))
refused("weight must be of shape", hfq.rms_norm, x, weight[1:], 1e-5, 0.0, True)
refused("weight must be of the dtype", hfq.rms_norm, x, weight.half(), 1e-5, 0.0, True)

together = torch.randn(2, 1, 3 * 64).half()
q, k = together.split_with_sizes([128, 64], -1)
angle = torch.randn(1, 1, 32)
cos, sin = angle.cos().half(), angle.sin().half()
for found, expected in zip(hfq.rotate(q, k, cos, sin), decode.rotate(q, k, cos, sin), strict=True):
    assert torch.equal(found, expected)
refused("of the dtype of q and k", hfq.rotate, q, k.float(), cos, sin)
refused("as many tokens as q", hfq.rotate, q, k[:1], cos, sin)
gated = hfq.gate(q[..., :64], k, False)
torch.testing.assert_close(gated, decode.gate(q[..., :64], k, False))

q = torch.randn(2, 4, 1, 64).bfloat16()
k, v = torch.randn(2, 2, 2, 200, 64).bfloat16()
seen = torch.randn(2, 1, 1, 190) > 0
exact = decode.attend(q.double(), k.double(), v.double(), 190, seen, 0.1)
for count in (1, 100):  # without and with a workspace
    emulated.set_multiprocessors(count)
    found = hfq.attend(q, k, v, 190, seen, 0.1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1e-2)
wide = torch.randn(1, 1, 1, 272)
refused("at most 512 bytes", hfq.attend, wide, wide, wide, 1, None, 1.0)
refused("mask must be of shape", hfq.attend, q, k, v, 189, seen, 0.1)
for place in range(3):
    given = [q, k, v]
    odd = torch.empty(given[place].numel() + 1, dtype=q.dtype)[1:].view(given[place].shape)
    given[place] = odd.copy_(given[place])
    refused("aligned to 16 bytes", hfq.attend, *given, 190, seen, 0.1)
sys.stdout.write("all checks passed\n")
