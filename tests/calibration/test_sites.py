"""Finding where a rescaling can hide, and hiding it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hfq.calibration.blocks import find_blocks, record_calls, run_block
from hfq.calibration.fold import Folds, fold
from hfq.calibration.sites import Site, find_sites
from hfq.core.statistics import InputStatistics

from ..integrations.tiny_models import build

IDS = torch.arange(12).view(1, 12)


def first_block(kind: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    model = build(kind)
    blocks = list(find_blocks(model).values())
    hidden, calls = record_calls(model, blocks, IDS)
    hidden = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    return blocks[0], lambda: run_block(blocks[0], hidden, calls[0]) - hidden


def linear_layers(block: nn.Module) -> dict[str, bool]:
    """Name -> whether the weight is `[K, N]`."""
    kinds = {"Linear": False, "Conv1D": True}
    return {
        name: kinds[type(module).__name__]
        for name, module in block.named_modules()
        if type(module).__name__ in kinds
    }


def sites_of(block: nn.Module, run: Callable[[], Tensor]) -> dict[tuple[str, ...], Site]:
    transposed = linear_layers(block)
    shapes = {name: block.get_submodule(name).weight.shape for name in transposed}
    sizes = {name: (s[1], s[0]) if transposed[name] else (s[0], s[1]) for name, s in shapes.items()}
    return {site.consumers: site for site in find_sites(block, run, list(transposed), sizes)}


QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")


def test_sites_of_a_llama_block() -> None:
    block, run = first_block("llama")
    sites = sites_of(block, run)
    assert sites[QKV].producer == "input_layernorm"
    assert sites[("mlp.gate_proj", "mlp.up_proj")].producer == "post_attention_layernorm"
    assert sites[("mlp.down_proj",)] == Site(producer="mlp.up_proj", consumers=("mlp.down_proj",))
    values = sites[("self_attn.o_proj",)]
    assert values.producer == "self_attn.v_proj" and values.channels is not None
    # Two of four heads share the values of a head of 16 channels.
    heads = torch.arange(2).repeat_interleave(2).unsqueeze(1) * 16 + torch.arange(16)
    assert torch.equal(values.channels, heads.flatten())
    assert len(sites) == 4


def test_sites_of_a_block_with_layer_norms() -> None:
    """GPT-2: an activation function stands before the second product, and q, k and v are one layer."""
    sites = sites_of(*first_block("gpt2"))
    assert {consumers: site.producer for consumers, site in sites.items()} == {
        ("attn.c_attn",): "ln_1",
        ("mlp.c_fc",): "ln_2",
    }


def test_all_readers_of_a_norm_are_consumers() -> None:
    """Mixtral: the router and the experts read the same as each other."""
    block, run = first_block("mixtral")
    sites = sites_of(block, run)
    assert sites[QKV].producer == "input_layernorm"
    assert all("mlp" not in name for consumers in sites for name in consumers)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_fold_changes_nothing_but_the_weights(kind: str, generator: torch.Generator) -> None:
    block, run = first_block(kind)
    expected, transposed = run(), linear_layers(block)
    sites = sites_of(block, run)
    assert sites
    for site in sites.values():
        name = site.consumers[0]
        weight = block.get_submodule(name).weight
        columns = weight.shape[0] if transposed[name] else weight.shape[1]
        free = columns if site.channels is None else int(site.channels.max()) + 1
        factors = 0.25 + 4 * torch.rand(free, generator=generator)
        factors = factors if site.channels is None else factors[site.channels]
        folds = Folds()
        before = folds.weight(name, weight.detach().clone(), transposed[name])
        used = fold(block, site, factors, transposed, run, folds)
        assert used is not None
        torch.testing.assert_close(used, factors)
        torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-5)
        after = folds.weight(name, weight.detach(), transposed[name])
        torch.testing.assert_close(after, before * factors, rtol=1e-5, atol=0)


def test_a_site_that_is_none_is_put_back(generator: torch.Generator) -> None:
    """Between the gate and the down projection there is an activation function."""
    block, run = first_block("llama")
    expected, before = run(), {name: p.clone() for name, p in block.named_parameters()}
    site = Site(producer="mlp.gate_proj", consumers=("mlp.down_proj",))
    factors = 0.5 + torch.rand(96, generator=generator)
    assert fold(block, site, factors, linear_layers(block), run, Folds()) is None
    assert torch.equal(run(), expected)
    assert all(torch.equal(p, before[name]) for name, p in block.named_parameters())


def test_norms_that_multiply_by_one_plus_their_gain(generator: torch.Generator) -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, generator=generator) * 0.1)

        def forward(self, x: Tensor) -> Tensor:
            return x / x.square().mean(-1, keepdim=True).sqrt() * (1 + self.weight)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = Norm(), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.norm(x))

    block, x = Block(), torch.randn(5, 8, generator=generator)
    factors = 0.5 + torch.rand(8, generator=generator)
    with torch.no_grad():
        expected = block(x)
        site = Site(producer="norm", consumers=("layer",))
        used = fold(block, site, factors, {"layer": False}, lambda: block(x).detach(), Folds())
        assert used is not None
        torch.testing.assert_close(block(x), expected)
        assert not torch.allclose(block.norm.weight, torch.zeros(8), atol=0.2)


def test_rescaled_statistics_are_those_of_rescaled_activations(generator: torch.Generator) -> None:
    x, factors = torch.randn(50, 6, generator=generator), 0.5 + torch.rand(6, generator=generator)
    known = InputStatistics(tokens=50, hessian=x.T @ x / 50)
    scaled = x / factors
    torch.testing.assert_close(known.rescaled(factors).hessian, scaled.T @ scaled / 50)
