"""DCNv2 (Wang et al. 2021): explicit crosses of full matrices in parallel with a DNN."""

from __future__ import annotations

import torch
from torch import nn

from rella.baselines import BaselineConfig
from rella.ctr.batches import Batch
from rella.ctr.features import FeatureSpace
from rella.ctr.layers import MLP, CrossNetV2, Inputs, pooled_fields, pooled_width


class DCNv2(nn.Module):
    """ŷ = σ(w [cross(x₀); DNN(x₀)] + b), the parallel structure (§3.3, Eq. 4 there)."""

    def __init__(self, space: FeatureSpace, config: BaselineConfig) -> None:
        super().__init__()
        self.inputs = Inputs(space, config.embedding_dim, config.init_std)
        width = pooled_width(space) * config.embedding_dim
        self.cross = CrossNetV2(width, config.cross_layers)
        self.dnn = MLP(width, config.dnn_size, config.dnn_layers, config.dropout)
        self.out = nn.Linear(width + self.dnn.width, 1)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return (B,) logits."""
        x = pooled_fields(self.inputs(batch), batch).flatten(1)
        return self.out(torch.cat([self.cross(x), self.dnn(x)], dim=1)).squeeze(-1)
