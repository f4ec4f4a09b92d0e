"""DeepFM (Guo et al. 2017): a factorisation machine beside a DNN, on the same embeddings."""

from __future__ import annotations

import torch
from torch import nn

from rella.baselines import BaselineConfig
from rella.ctr.batches import Batch
from rella.ctr.features import FeatureSpace
from rella.ctr.layers import MLP, Inputs, factorization_machine, pooled_fields, pooled_width


class DeepFM(nn.Module):
    """ŷ = σ(⟨w, x⟩ + FM + DNN), Eqs. 1 to 4; a pooled history field is its features with the value 1 / length."""

    def __init__(self, space: FeatureSpace, config: BaselineConfig) -> None:
        super().__init__()
        self.inputs = Inputs(space, config.embedding_dim, config.init_std)
        self.linear = Inputs(space, 1, config.init_std)
        self.bias = nn.Parameter(torch.zeros(()))
        width = pooled_width(space) * config.embedding_dim
        self.dnn = MLP(width, config.dnn_size, config.dnn_layers, config.dropout, out=1)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return (B,) logits."""
        first_order = pooled_fields(self.linear(batch), batch).sum(dim=(1, 2)) + self.bias
        vectors = pooled_fields(self.inputs(batch), batch)
        return first_order + factorization_machine(vectors) + self.dnn(vectors.flatten(1)).squeeze(-1)
