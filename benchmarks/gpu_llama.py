"""A whole model of random weights on a GPU, made there weight by weight: its float twin never exists. Decoding in a CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from gpu_weights import KINDS, relative_error
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hfq.algorithms import ALGORITHMS
from hfq.config import HfqConfig
from hfq.core.activations import quantize_tokens
from hfq.core.spec import QuantSpec, activation_dtype
from hfq.core.weight import QuantizedWeight
from hfq.integrations import decode
from hfq.nn.linear import QuantLinear

__all__ = ["Decoder", "check_products", "kernels_of", "random_model", "weight_bytes"]

# Outputs are rounded to bfloat16, weights too where there are many tokens; E4M3 has 3 bits of mantissa, and what lies between two of them may go either way.
_AGREE = 0.02
# A graph runs the very kernels that were run before; a compiler fuses roundings away.
_SAME = 0.05


def random_model(shape: Mapping[str, int], kind: str | None, device: torch.device) -> Any:
    """A Llama with packed layers of a kind in `KINDS`, or all bfloat16; head and embeddings are bfloat16 always."""
    config = LlamaConfig(**shape)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.eval().requires_grad_(False)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    generator = torch.Generator(device).manual_seed(0)
    for name, module in list(model.named_modules()):
        if kind is not None and isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, _packed(module, kind, device, generator))
            continue
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                new = _normal(parameter, device, generator)
                if new.dim() == 1:
                    new.fill_(1)  # of a norm
                module._parameters[key] = nn.Parameter(new, requires_grad=False)
    if kind is not None:
        decode.install(model)  # as loading it does
    return model


def _packed(
    linear: nn.Linear, kind: str, device: torch.device, generator: torch.Generator
) -> QuantLinear:
    recipe = HfqConfig(format=KINDS[kind].format, **KINDS[kind].settings).recipe("layer")
    assert recipe is not None
    method = ALGORITHMS.get(recipe.method)

    def encode(rows: Tensor) -> QuantizedWeight:
        return method.quantize(rows, recipe.spec, recipe.options)

    new = QuantLinear(
        linear.in_features,
        linear.out_features,
        bias=False,
        format=recipe.format,
        spec=recipe.spec,
        dtype=torch.bfloat16,
        device=device,
    )
    new.requantize("weight", _normal(linear.weight, device, generator), encode)
    new.prepare()
    return new.eval()


def _normal(like: Tensor, device: torch.device, generator: torch.Generator) -> Tensor:
    weight = torch.empty(like.shape, dtype=torch.bfloat16, device=device)
    return weight.normal_(0, 0.02, generator=generator)


def weight_bytes(model: nn.Module) -> int:
    held = {tensor.data_ptr(): tensor.nbytes for tensor in model.parameters()}
    return sum(held.values())


def kernels_of(model: nn.Module) -> list[str]:
    found = {m.kernel_choice("weight").row.name for m in model.modules() if type(m) is QuantLinear}
    return sorted(found)


@torch.no_grad()
def check_products(model: Any, ids: Tensor) -> float:
    """The largest relative difference of a packed layer's outputs to those with its dequantized weight, in float32, of the same input.

    (Of logits it would say little: one code of an activation that is rounded the other way changes all that are rounded after it.)
    """
    errors = {"": 0.0}

    def compare(name: str, own: QuantLinear, inputs: tuple[Tensor], found: Tensor) -> None:
        x = _rounded(inputs[0], own.slot.spec).float()
        errors[name] = relative_error(found, nn.functional.linear(x, own.dequantize().float()))
        assert errors[name] < _AGREE, (
            f"{name} differs by {errors[name]:.3f} from what its weight gives"
        )

    packed = [(name, each) for name, each in model.named_modules() if type(each) is QuantLinear]
    hooks = [
        module.register_forward_hook(
            lambda own, inputs, found, name=name: compare(name, own, inputs, found)
        )
        for name, module in packed
    ]
    try:
        model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(errors) == 1 + len(packed), "a packed layer was left out"
    return max(errors.values())


def _rounded(x: Tensor, spec: QuantSpec) -> Tensor:
    """Activations as a format with dynamic scales has them: 8-bit codes times a scale for each token."""
    if spec.activation is None:
        return x
    codes, scales = quantize_tokens(x.flatten(0, -2), None, activation_dtype(spec))
    return (codes.float() * scales).to(x.dtype).view_as(x)


class _FixedCache(StaticCache):
    """Keys and values at fixed addresses, written at `positions`, int64 `[T]`, which a graph reads when it is replayed."""

    def __init__(self, config: Any, batch: int, length: int, positions: Tensor) -> None:
        super().__init__(config=config, max_cache_len=length)
        heads, layers = config.num_key_value_heads, config.num_hidden_layers
        shape = (layers, 2, batch, heads, length, config.head_dim)
        self.held = torch.zeros(shape, dtype=torch.bfloat16, device=positions.device)
        self.positions = positions

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.held[layer_idx]
        keys.index_copy_(2, self.positions, key_states)
        values.index_copy_(2, self.positions, value_states)
        return keys, values


class Decoder:
    """Greedy decoding of a batch, a step of which does all its work on the device."""

    def __init__(self, model: Any, prompt: Tensor, length: int, compiled: bool = False) -> None:
        """
        Args:
            prompt: int64 `[B, T]`, read here.
            length: tokens that there is room for.
            compiled: through `torch.compile`.
        """
        self.model = torch.compile(model, dynamic=False) if compiled else model
        batch, self.start = prompt.shape
        self.slots = torch.arange(length, device=prompt.device)
        self.position = torch.full((1,), self.start, device=prompt.device)
        self.cache = _FixedCache(model.config, batch, length, self.slots[: self.start])
        self.logits = self._forward(model, prompt)
        self.first = self.logits.argmax(-1)
        self.ids = self.first.clone()
        self.cache.positions = self.position

    def rewind(self) -> None:
        """Back to the end of the prompt."""
        self.position.fill_(self.start)
        self.ids.copy_(self.first)

    @torch.no_grad()
    def step(self) -> None:
        """One token for each sequence: reads and writes `ids` and `position`, writes `logits`."""
        self.logits.copy_(self._forward(self.model, self.ids))
        self.ids.copy_(self.logits.argmax(-1))
        self.position.add_(1)

    def check(self, step: Any) -> float:
        """Relative difference of a step's logits to those of the model's own forward."""
        self.rewind()
        with torch.no_grad():
            expected = self._forward(getattr(self.model, "_orig_mod", self.model), self.ids)
        self.rewind()
        step()
        error = relative_error(self.logits, expected)
        assert error < _SAME, f"logits of the captured step differ by {error:.3f}"
        assert int(self.position) == self.start + 1
        return error

    @torch.no_grad()
    def _forward(self, model: Any, ids: Tensor) -> Tensor:
        batch, positions = len(ids), self.cache.positions
        seen = (self.slots <= positions[:, None]).expand(batch, 1, -1, -1)
        output = model(
            ids,
            attention_mask=seen,
            position_ids=positions.expand(batch, -1),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1:]
        return logits
