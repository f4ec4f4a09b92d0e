"""The validation rows of a tuning run, scored by all workers; metrics are of all rows at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from rella.lm.encoding import Ids, pad_right, token_batches
from rella.lm.passes import TokenBudget, budget_of, run_passes
from rella.lm.scoring import probabilities
from rella.metrics import evaluate


@dataclass(frozen=True)
class Validation:
    """Scores its rows with the module that is being trained: `Validation(...)(root)` on every worker."""

    prompts: Sequence[Ids]
    label: npt.NDArray[np.int8]
    pair: tuple[int, int]
    """Vocabulary indices of "Yes" and "No" (Eq. 2)."""
    pad: int
    batch_tokens: int | TokenBudget
    """Of a forward pass, padding included. A `TokenBudget` halves where memory runs out beside the training's, unless
    the weights are sharded (ZeRO-3): the others would wait for a worker that starts its pass again."""

    def __call__(self, root: nn.Module) -> dict[str, float]:
        """Return AUC, log loss and accuracy on all rows, the same on every worker.

        Raises:
            InputError: a single row does not fit into the device's memory.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        sharded = any(hasattr(p, "ds_id") for p in root.parameters())
        found = (
            self._together(root, rank, world) if sharded else self._alone(root, range(rank, len(self.prompts), world))
        )
        gathered: list[dict[int, npt.NDArray[np.float32]]] = [{} for _ in range(world)]
        dist.all_gather_object(gathered, found)
        everyone = {row: pair for part in gathered for row, pair in part.items()}
        whole = np.stack([everyone[row] for row in range(len(self.prompts))])
        metrics = evaluate(self.label, probabilities(whole))
        return {"auc": metrics.auc, "log_loss": metrics.log_loss, "accuracy": metrics.accuracy}

    def _alone(self, root: nn.Module, rows: Sequence[int]) -> dict[int, npt.NDArray[np.float32]]:
        device, pair = next(root.parameters()).device, list(self.pair)

        def forward(ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = root(ids, torch.arange(len(ids), device=device), lengths - 1)
            return logits[:, pair]

        budget, prompts = budget_of(self.batch_tokens), [self.prompts[row] for row in rows]
        found = run_passes(prompts, forward, device, self.pad, budget, without_gradients=torch.no_grad)
        return dict(zip(rows, found, strict=True))

    def _together(self, root: nn.Module, rank: int, world: int) -> dict[int, npt.NDArray[np.float32]]:
        shares = [range(r, len(self.prompts), world) for r in range(world)]
        plans = [self._batches(share) for share in shares]
        found: dict[int, npt.NDArray[np.float32]] = {}
        # Sharded weights are gathered by all workers together: who has fewer batches repeats its last one.
        for turn in range(max(len(plan) for plan in plans)):
            mine = plans[rank] or plans[0]
            batch = mine[min(turn, len(mine) - 1)]
            logits = self._logits(root, batch)
            found.update(zip(batch, logits, strict=True))
        return found

    def _batches(self, rows: Sequence[int]) -> list[list[int]]:
        lengths = [len(self.prompts[row]) for row in rows]
        return [[rows[i] for i in batch] for batch in token_batches(lengths, budget_of(self.batch_tokens).tokens)]

    def _logits(self, root: nn.Module, batch: Sequence[int]) -> npt.NDArray[np.float32]:
        device = next(root.parameters()).device
        ids, lengths = pad_right([self.prompts[row] for row in batch], self.pad, device)
        with torch.no_grad():
            logits = root(ids, torch.arange(len(batch), device=device), lengths - 1)
        answers: npt.NDArray[np.float32] = logits[:, list(self.pair)].cpu().numpy()
        return answers
