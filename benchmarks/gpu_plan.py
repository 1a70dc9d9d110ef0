"""Sizes of what the GPU benchmark measures: all of it, and tiny ones for dry runs on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gpu_weights import KINDS

__all__ = ["FULL", "TINY", "Plan"]

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured.

    Attributes:
        shapes: (K, N) of kernels; the goals are about the `large` ones.
        tokens: M of each of them.
        kinds: weights of kernels, gradients and packing, by their names in `KINDS`.
        gradient_shapes, gradient_tokens: (K, N) and M of gradients.
        models: weights of the models beside bfloat16, by their names in `KINDS`.
        llama: settings of a `LlamaConfig`.
        context: tokens of the prompt before decoding.
        room: tokens that its cache has room for, those of the prompt among them.
        steps: of decoding in one measurement.
        batches: sequences that are decoded at once.
        prompts: tokens of the prompts that are timed.
        packed: (K, N) of the weight that is packed.
        layers: of the checkpoint that is loaded, else like `llama`.
        compiled: decode through `torch.compile`, too.
        rounds: measurements of each work.
    """

    shapes: tuple[tuple[int, int], ...] = (
        (4096, 4096),
        (4096, 14336),
        (14336, 4096),
        (8192, 28672),
    )
    large: tuple[tuple[int, int], ...] = ((4096, 14336), (14336, 4096), (8192, 28672))
    tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
    kinds: tuple[str, ...] = tuple(KINDS)
    gradient_shapes: tuple[tuple[int, int], ...] = ((4096, 14336), (14336, 4096))
    gradient_tokens: tuple[int, ...] = (512, 2048)
    models: tuple[str, ...] = ("int4 g128", "nf4 g64", "W8A8 dynamic", "fp8 dynamic")
    llama: Mapping[str, int]
    context: int = 128
    room: int = 256
    steps: int = 16
    batches: tuple[int, ...] = (1, 8)
    prompts: tuple[int, ...] = (512, 2048)
    packed: tuple[int, int] = (4096, 14336)
    layers: int = 4
    compiled: bool = False
    rounds: int = 5


FULL = Plan(llama=LLAMA_8B)
# K and N that all kernels of the CPU and the GPU take, too.
TINY = Plan(
    shapes=((64, 96), (128, 64)),
    large=((128, 64),),
    tokens=(1, 16, 64, 256),
    gradient_shapes=((128, 64),),
    gradient_tokens=(8,),
    models=("int4 g128", "W8A8 dynamic"),
    llama={
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
    context=4,
    room=16,
    steps=2,
    batches=(1, 2),
    prompts=(8,),
    packed=(128, 96),
    layers=2,
    rounds=2,
)
