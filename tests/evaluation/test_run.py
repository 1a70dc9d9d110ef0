"""`hfq.evaluate` against direct computations, and its errors."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from hfq.core.errors import ConfigError, HfqError
from hfq.evaluation import evaluate
from hfq.evaluation.logits import EvaluationError


def direct(model, reference, ids, seqlen):
    """Perplexity, KL and agreement by the definitions, in float64."""
    nll, kl, agreed, count = 0.0, 0.0, 0, 0
    for window in ids.split(seqlen):
        if window.numel() < 2:
            continue
        with torch.no_grad():
            mine = model(input_ids=window[None]).logits[0, :-1].double()
            theirs = reference(input_ids=window[None]).logits[0, :-1].double()
        nll += F.cross_entropy(mine, window[1:], reduction="sum").item()
        p = theirs.softmax(-1)
        kl += (p * (p.log() - mine.log_softmax(-1))).sum().item()
        agreed += (mine.argmax(-1) == theirs.argmax(-1)).sum().item()
        count += window.numel() - 1
    return math.exp(nll / count), kl / count, agreed / count, count


@pytest.mark.parametrize(
    ("seqlen", "batch_size", "count"), [(2, 1, 9), (31, 2, 150), (64, 1, 150), (64, 4, 150)]
)
def test_figures_match_a_direct_computation(
    make_llama, pack_linears, ids, seqlen, batch_size, count
):
    ids = ids[:count]
    model, reference = pack_linears(make_llama()), make_llama()
    report = evaluate(
        model, reference, dataset=ids, seqlen=seqlen, batch_size=batch_size, speed=False
    )
    perplexity, kl, agreement, count = direct(model, reference, ids, seqlen)
    assert report.predicted_tokens == count
    assert report.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert report.kl == pytest.approx(kl, rel=1e-3)
    assert report.top1_agreement == agreement
    assert report.kl > 1e-3  # 4 bits do change this model
    own, *_ = direct(reference, reference, ids, seqlen)
    assert report.reference.perplexity == pytest.approx(own, rel=1e-4)


def test_a_model_agrees_with_itself(make_llama, ids):
    model = make_llama()
    report = evaluate(model, model, dataset=ids, speed=False)
    assert report.kl == 0 and report.top1_agreement == 1
    assert report.reference.perplexity == report.perplexity


def test_more_bits_are_nearer(make_llama, pack_linears, ids):
    reference = make_llama()
    reports = [
        evaluate(pack_linears(make_llama(), bits), reference, dataset=ids, speed=False)
        for bits in (2, 4, 8)
    ]
    kl = [report.kl for report in reports]
    assert kl[0] > kl[1] > kl[2] > 0
    assert reports[0].top1_agreement < reports[1].top1_agreement < 1


def test_a_rest_of_one_token_is_dropped(make_llama, ids):
    report = evaluate(make_llama(), dataset=ids[:65], seqlen=64, speed=False)
    assert (report.tokens, report.predicted_tokens) == (65, 63)
    assert report.kl is None and report.top1_agreement is None and report.reference is None


def test_seqlen_is_cut_to_the_context(make_llama, ids):
    assert evaluate(make_llama(), dataset=ids, seqlen=512, speed=False).seqlen == 64


def test_max_tokens(make_llama, ids):
    assert evaluate(make_llama(), dataset=ids, max_tokens=20, speed=False).tokens == 20


def test_reference_by_path(make_llama, ids, tmp_path):
    make_llama().save_pretrained(tmp_path)
    report = evaluate(make_llama(), tmp_path, dataset=ids, speed=False)
    assert report.kl == pytest.approx(0, abs=1e-9) and report.top1_agreement == 1


def test_speed_and_size(make_llama, pack_linears, ids):
    model = pack_linears(make_llama())
    report = evaluate(model, make_llama(), dataset=ids[:40])
    assert report.decode_tokens_per_s > 0 and report.prefill_tokens_per_s > 0
    assert report.prompt_tokens == 64 - 33  # room for the decoded tokens
    assert report.bits_per_weight < report.reference.bits_per_weight == 32
    assert report.packed_bytes > 0 and report.reference.packed_bytes == 0


def test_modes_are_as_before(make_llama, ids):
    model = make_llama().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    evaluate(model, dataset=ids, speed=False)
    assert [module.training for module in model.modules()] == before


def test_the_global_generator_is_untouched(make_llama, ids):
    before = torch.random.get_rng_state()
    evaluate(make_llama(), dataset=ids[:40])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_model_can_train_after_an_evaluation(make_llama, pack_linears, ids):
    """No inference tensors are left behind."""
    model = pack_linears(make_llama())
    evaluate(model, dataset=ids, speed=False)
    embeds = model.model.embed_tokens(ids[None, :8]).detach().requires_grad_()
    model(inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad.abs().sum() > 0


def test_report_as_dict_and_table(make_llama, pack_linears, ids):
    report = evaluate(pack_linears(make_llama()), make_llama(), dataset=ids)
    found = json.loads(json.dumps(report.to_dict()))
    assert found["kl"] == report.kl
    assert found["reference"]["perplexity"] == report.reference.perplexity
    table = report.table()
    assert "KL(reference || model)" in table and "tokens/s" in table
    assert max(map(len, table.splitlines())) <= 100
    without = evaluate(make_llama(), dataset=ids, speed=False).table()
    assert "KL" not in without and "tokens/s" not in without and "None" not in without


def test_nan_names_the_module(make_llama, ids):
    model = make_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = math.nan
    with pytest.raises(EvaluationError, match=r"the model: NaN .*'model\.layers\.1\.mlp\.up_proj'"):
        evaluate(model, dataset=ids, speed=False)
    with pytest.raises(HfqError, match="the reference: NaN"):
        evaluate(make_llama(), model, dataset=ids, speed=False)


def test_other_vocabularies_are_refused(make_llama, ids):
    with pytest.raises(EvaluationError, match="expected token ids from 0 to 60, got 61"):
        evaluate(make_llama(), dataset=torch.full((9,), 61), speed=False)
    with pytest.raises(EvaluationError, match="the 70 tokens of the reference, got 61"):
        evaluate(make_llama(), make_llama(vocab_size=70), dataset=ids, speed=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seqlen": 1}, "seqlen must be at least 2"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_tokens": 1}, "max_tokens must be at least 2"),
    ],
)
def test_settings_out_of_range(make_llama, ids, settings, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(make_llama(), dataset=ids, **settings)


def test_text_without_a_tokenizer(make_llama):
    with pytest.raises(ConfigError, match="pass tokenizer="):
        evaluate(make_llama(), dataset=["words"])
