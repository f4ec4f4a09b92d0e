"""SIM (Pi et al. 2020): search the whole history first, then attend to the K behaviours found.

Semantic and hard search are the batch's affair (`batches_of`): SIM is then DIN on what they found. Soft search is here.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from rella.baselines import BaselineConfig
from rella.ctr.batches import Batch
from rella.ctr.din import DIN
from rella.ctr.features import FeatureSpace


class SIM(DIN):
    """General search unit, then DIN's attention as the exact search unit (§3 there)."""

    def __init__(self, space: FeatureSpace, config: BaselineConfig, k: int) -> None:
        super().__init__(space, config)
        self.k, self.soft = k, config.search == "soft"

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return (B,) logits; with soft search the batch's histories are the whole ones that are searched."""
        return super().forward(self.found(batch) if self.soft else batch)

    @torch.no_grad()
    def found(self, batch: Batch) -> Batch:
        """Return the batch with the K behaviours of the largest inner product e_target · e_item, in the order of time.

        Nothing is learnt through the choice; the embeddings learn by what is done with the chosen. Of equal products
        the more recent behaviour comes first, as in SUBR.
        """
        if batch.items.shape[1] <= self.k:
            return batch
        target, items = self.inputs.table(batch.fields[:, self.item_at], batch.items)
        product = (items @ target[..., None]).squeeze(-1).masked_fill(~batch.mask, -torch.inf)
        # Stable and newest first: `topk` takes any of equal ones, and others when there is more padding.
        ranked = product.flip(1).sort(dim=1, descending=True, stable=True).indices
        # Padding is behind every behaviour: in the order of time it stays there.
        chosen = (product.shape[1] - 1 - ranked[:, : self.k]).sort(dim=1).values
        items, ratings = batch.items.gather(1, chosen), batch.ratings.gather(1, chosen)
        return replace(batch, items=items, ratings=ratings, lengths=batch.lengths.clamp(max=self.k))
