"""Bytes and bits of a model's weights."""

from __future__ import annotations

import math

import torch
from torch import nn

from hfq.core.spec import IntSpec
from hfq.evaluation import weight_size
from hfq.nn.embedding import QuantEmbedding
from hfq.nn.linear import QuantLinear


def test_float_model():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4, bias=False).to(torch.bfloat16))
    size = weight_size(model)
    assert (size.packed_bytes, size.packed_weights) == (0, 0)
    assert (size.kept_bytes, size.kept_weights) == (36 * 4 + 16 * 2, 52)
    assert math.isclose(size.bits_per_weight, 8 * 176 / 52)


def test_packed_linear_in_either_layout():
    spec = IntSpec(bits=4, group_size=32, sym=False)
    linear = QuantLinear.from_linear(nn.Linear(100, 37), format="int", spec=spec)
    sizes = [weight_size(linear)]
    linear.prepare()  # a kernel's padded layout is no larger checkpoint
    sizes.append(weight_size(linear))
    for size in sizes:
        assert size.packed_bytes == 37 * 50 + 2 * 37 * 4 * 2
        assert (size.packed_weights, size.kept_bytes) == (3700, 37 * 4)


def test_tied_weights_count_once():
    spec = IntSpec(bits=8, group_size=-1)
    table = QuantEmbedding(20, 16, format="int", spec=spec)
    head = QuantLinear(16, 20, bias=False, format="int", spec=spec)
    head.share_packed(table)
    size = weight_size(nn.ModuleList([table, head]))
    assert (size.packed_bytes, size.packed_weights) == (20 * 16 + 20 * 2, 320)


def test_no_weights():
    assert math.isnan(weight_size(nn.ReLU()).bits_per_weight)
