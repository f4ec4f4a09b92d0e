"""SASRec (Kang and McAuley 2018): causal self-attention over the history."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from rella.baselines import BaselineConfig
from rella.ctr.batches import Batch
from rella.ctr.features import FeatureSpace
from rella.ctr.layers import MLP, Dropout, Inputs, Steps, joined, split_heads


class Block(nn.Module):
    """x + Dropout(SA(LN(x))), then x + Dropout(FFN(LN(x))) (§3.2 there)."""

    def __init__(self, size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_network = nn.LayerNorm(size), nn.LayerNorm(size)
        self.query, self.key, self.value = (nn.Linear(size, size, bias=False) for _ in range(3))
        self.dropout = Dropout(dropout)
        self.network = nn.Sequential(
            nn.Linear(size, size), nn.ReLU(inplace=True), Dropout(dropout), nn.Linear(size, size)
        )

    def forward(self, asking: torch.Tensor, states: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Return (B, Q, d).

        Args:
            asking: (B, Q, d) states of the steps that are wanted.
            states: (B, K, d) states of all steps.
            visible: (Q, K), or (B, Q, K), bool: what each may look at, at least one.
        """
        normed = self.before_attention(states)
        query = self.query(normed if asking is states else self.before_attention(asking))
        query, key, value = (split_heads(x, self.heads) for x in (query, self.key(normed), self.value(normed)))
        mask = visible if visible.dim() == 2 else visible[:, None]
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = asking + self.dropout(attended.transpose(1, 2).flatten(2))
        return x + self.dropout(self.network(self.before_network(x)))


class SASRec(nn.Module):
    """The last behaviour's state after the attention blocks, with the fields, goes into a DNN.

    Positions count from the most recent behaviour. Of the last block only that behaviour's state is computed.
    """

    def __init__(self, space: FeatureSpace, config: BaselineConfig, k: int) -> None:
        super().__init__()
        dim, size = config.embedding_dim, config.attention_size
        self.inputs = Inputs(space, dim, config.init_std)
        self.steps = Steps(space, dim, size)
        self.position = nn.Parameter(torch.randn(k, size) * config.init_std)
        self.dropout = Dropout(config.dropout)
        layers = range(config.attention_layers)
        self.blocks = nn.ModuleList(Block(size, config.attention_heads, config.dropout) for _ in layers)
        self.norm = nn.LayerNorm(size)
        self.dnn = MLP(space.fields * dim + size, config.dnn_size, config.dnn_layers, config.dropout, out=1)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return (B,) logits."""
        found = self.inputs(batch)
        return self.dnn(joined(found.fields, [self._interest(self.steps(found, batch), batch.lengths)])).squeeze(-1)

    def _interest(self, steps: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return (B, d): the state of the last behaviour, zeros where there is none."""
        place = torch.arange(steps.shape[1], device=steps.device)
        last = (lengths - 1).clamp(min=0)[:, None]
        states = self.dropout(steps + self.position[(last - place).clamp(0, len(self.position) - 1)])
        causal = place[:, None] >= place
        for block in self.blocks[:-1]:
            states = block(states, states, causal)
        asking = states.gather(1, last[..., None].expand(-1, 1, states.shape[-1]))
        state = self.blocks[-1](asking, states, (place <= last)[:, None])
        return self.norm(state.squeeze(1)) * (lengths > 0)[:, None]
