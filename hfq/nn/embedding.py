"""`QuantEmbedding`: an `nn.Embedding` whose table is packed; rows are dequantized as they are looked up."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.spec import QuantSpec
from .packed import PackedModule
from .packing import Encode
from .slot import PackedSlot

__all__ = ["QuantEmbedding"]


class QuantEmbedding(PackedModule, nn.Embedding):
    """Look-up in a packed table. ids int `[...]` give `[..., D]` in `compute_dtype`.

    Args:
        num_embeddings, embedding_dim: V rows of D columns; the packed weight has N = V and K = D.
        padding_idx: as in `nn.Embedding`; it has no effect without gradients.
        dtype: dtype of the looked-up rows.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        format: str,
        spec: QuantSpec,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.padding_idx = (
            num_embeddings,
            embedding_dim,
            padding_idx,
        )
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = (
            None,
            2.0,
            False,
            False,
        )
        slot = PackedSlot(
            base="weight",
            format=format,
            spec=spec,
            out_features=num_embeddings,
            in_features=embedding_dim,
        )
        self._init_packed({"weight": slot}, dtype, device)

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, *, format: str, spec: QuantSpec, encode: Encode | None = None
    ) -> QuantEmbedding:
        """Quantize a float Embedding; by rounding to nearest unless `encode` says otherwise."""
        weight = embedding.weight
        new = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            format=format,
            spec=spec,
            dtype=weight.dtype,
            device=weight.device,
        )
        new.requantize("weight", weight.detach(), encode)
        new.prepare()
        return new.train(embedding.training)

    def to_float(self) -> nn.Embedding:
        """A float Embedding with the dequantized table, in `compute_dtype`, frozen."""
        new = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        new.weight = nn.Parameter(self.dequantize(), requires_grad=False)
        return new.train(self.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The float table `[V, D]`, virtual; see `QuantLinear.weight`."""
        return self._virtual_weight()

    def forward(self, ids: Tensor) -> Tensor:
        operands, flat = self.operands("weight"), ids.flatten()
        if flat.is_cpu and not torch.compiler.is_compiling():
            self._check(flat)
        rows = operands.choice.row.lookup(operands.grid, flat, self.compute_dtype)
        return rows.view(*ids.shape, self.embedding_dim)

    def _check(self, ids: Tensor) -> None:
        """Negative ids would count from the end, and a kernel's layout has more rows than the table."""
        if not ids.numel():
            return
        least, most = (int(end) for end in ids.aminmax())
        if not 0 <= least <= most < self.num_embeddings:
            raise IndexError(
                f"expected ids from 0 to {self.num_embeddings - 1}, got {least} to {most}"
            )

    def reset_parameters(self) -> None:
        """Nothing to initialise: codes come from a weight."""

    def extra_repr(self) -> str:
        spec = self.slots["weight"].spec
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, format={self.slots['weight'].format}, "
            f"bits={spec.bits}, group_size={spec.group_size}"
        )
