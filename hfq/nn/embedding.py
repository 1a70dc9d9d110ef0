"""`QuantEmbedding`: an `nn.Embedding` whose table is packed; rows are dequantized as they are looked up."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.spec import QuantSpec
from ..kernels import dispatch
from .packed import PackedModule
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
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm = self.norm_type = None
        self.scale_grad_by_freq = self.sparse = False
        slot = PackedSlot(
            base="weight", format=format, spec=spec, out_features=num_embeddings, in_features=embedding_dim
        )
        self._init_packed({"weight": slot}, dtype, device)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The float table `[V, D]`, virtual; see `QuantLinear.weight`."""
        placeholder = self._parameters.get("weight")
        if placeholder is not None:
            return placeholder
        return self._virtual_weight()

    def _choose(self, base: str) -> dispatch.Choice:
        # Rows are picked, nothing is multiplied: the stored layout is the right one.
        reason = "an embedding that shares its table with no Linear is read as it is stored"
        return dispatch.Choice(dispatch.rows()[-1], tuple((row.name, reason) for row in dispatch.rows()[:-1]))

    def forward(self, ids: Tensor) -> Tensor:
        row, flat = self.kernel("weight"), ids.flatten()
        rows = row.rows(self.grid("weight"), flat)
        table = dispatch.rows()[-1].dequantize(rows, self.compute_dtype)
        return table.view(*ids.shape, self.embedding_dim)

    def reset_parameters(self) -> None:
        """Nothing to initialise: codes come from a weight."""

    def extra_repr(self) -> str:
        spec = self.slots["weight"].spec
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, format={self.slots['weight'].format}, "
            f"bits={spec.bits}, group_size={spec.group_size}"
        )
