"""`hfq.evaluate` on a model that has learned something: the example's Llama and its held-out text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import hfq
from hfq import HfqConfig

FOLDER = Path(__file__).parents[2] / "examples" / "stdlib-llama"

pytestmark = pytest.mark.skipif(
    not (FOLDER / "model.safetensors").is_file(), reason="needs examples/stdlib-llama"
)


@pytest.fixture(scope="module")
def reports():
    """Bits -> evaluation of 512 tokens against the float model, in float32: rounding of 16 bits aside."""
    found = {}
    reference = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    for bits in (4, 8):
        config = HfqConfig(bits=bits, group_size=64, quantize_embeddings=True)
        model = AutoModelForCausalLM.from_pretrained(
            FOLDER, quantization_config=config, dtype=torch.float32
        )
        text = FOLDER / "heldout.txt"
        found[bits] = hfq.evaluate(model, reference, dataset=text, max_tokens=512, speed=False)
    return found


def test_the_float_model_reads_its_text(reports):
    assert reports[8].predicted_tokens == 511
    assert reports[8].reference.perplexity < 400  # of 4096 tokens


@pytest.mark.parametrize(
    ("bits", "kl", "agreement", "loss"), [(4, 0.1, 0.8, 0.1), (8, 1e-3, 0.97, 5e-3)]
)
def test_quantization_stays_near(reports, bits, kl, agreement, loss):
    report = reports[bits]
    assert 0 < report.kl < kl
    assert report.top1_agreement > agreement
    assert report.perplexity == pytest.approx(report.reference.perplexity, rel=loss)


def test_sizes(reports):
    for bits, report in reports.items():
        assert bits < report.bits_per_weight < bits + 0.3
        assert report.reference.bits_per_weight == 32
