"""DIN (Zhou et al. 2018): the target attends to the behaviours."""

from __future__ import annotations

import torch
from torch import nn

from rella.baselines import BaselineConfig
from rella.ctr.batches import Batch
from rella.ctr.features import FeatureSpace
from rella.ctr.layers import MLP, Inputs, Steps, TargetAttention, joined


class DIN(nn.Module):
    """The behaviours weighted by the target's attention, with the fields, go into a DNN (§4 there)."""

    def __init__(self, space: FeatureSpace, config: BaselineConfig) -> None:
        super().__init__()
        dim, self.item_at = config.embedding_dim, space.item_at
        self.inputs = Inputs(space, dim, config.init_std)
        self.steps = Steps(space, dim, dim)
        self.attention = TargetAttention(dim, config.attention_size, config.attention_layers)
        width = space.fields * dim + dim
        self.dnn = MLP(width, config.dnn_size, config.dnn_layers, config.dropout, out=1)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return (B,) logits."""
        found = self.inputs(batch)
        interest = self.attention(found.fields[:, self.item_at], self.steps(found, batch), batch.mask)
        return self.dnn(joined(found.fields, [interest])).squeeze(-1)
