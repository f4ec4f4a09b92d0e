"""GRU4Rec (Hidasi et al. 2016): a recurrent network reads the history."""

from __future__ import annotations

import torch
from torch import nn

from rella.baselines import BaselineConfig
from rella.ctr.batches import Batch
from rella.ctr.features import FeatureSpace
from rella.ctr.layers import MLP, Inputs, Steps, joined, last_step


class GRU4Rec(nn.Module):
    """The GRU's state after the last behaviour, with the fields, goes into a DNN."""

    def __init__(self, space: FeatureSpace, config: BaselineConfig) -> None:
        super().__init__()
        dim, layers = config.embedding_dim, config.gru_layers
        self.inputs = Inputs(space, dim, config.init_std)
        self.steps = Steps(space, dim, dim)
        between = config.dropout if layers > 1 else 0.0
        self.gru = nn.GRU(dim, config.gru_size, layers, batch_first=True, dropout=between)
        width = space.fields * dim + config.gru_size
        self.dnn = MLP(width, config.dnn_size, config.dnn_layers, config.dropout, out=1)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return (B,) logits."""
        found = self.inputs(batch)
        states, _ = self.gru(self.steps(found, batch))
        return self.dnn(joined(found.fields, [last_step(states, batch.lengths)])).squeeze(-1)
