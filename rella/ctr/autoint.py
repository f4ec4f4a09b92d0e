"""AutoInt (Song et al. 2019): fields attend to fields."""

from __future__ import annotations

import torch
from torch import nn

from rella.baselines import BaselineConfig
from rella.ctr.batches import Batch
from rella.ctr.features import FeatureSpace
from rella.ctr.layers import Dropout, Inputs, Interacting, pooled_fields, pooled_width


class AutoInt(nn.Module):
    """Interacting layers with residuals over the fields and the pooled history, then one linear layer (Eqs. 5 to 9).

    No DNN beside it: Appendix C.1 chooses attention layers and their size only.
    """

    def __init__(self, space: FeatureSpace, config: BaselineConfig) -> None:
        super().__init__()
        self.inputs = Inputs(space, config.embedding_dim, config.init_std)
        widths = [config.embedding_dim, *[config.attention_size] * config.attention_layers]
        layers = (Interacting(w, config.attention_size, config.attention_heads) for w in widths[:-1])
        self.interact = nn.Sequential(*layers)
        self.dropout = Dropout(config.dropout)
        self.out = nn.Linear(pooled_width(space) * widths[-1], 1)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return (B,) logits."""
        vectors = pooled_fields(self.inputs(batch), batch)
        return self.out(self.dropout(self.interact(vectors)).flatten(1)).squeeze(-1)
