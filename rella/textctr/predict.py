"""Scores of rows by a fitted baseline, and the validation of one that is being fitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic

import numpy as np
import numpy.typing as npt
import torch

from rella.errors import InputError
from rella.lm.encoding import token_batches
from rella.lm.ranks import join_shares
from rella.lm.scoring import probabilities
from rella.metrics import evaluate
from rella.stages import Precision
from rella.textctr.examples import Rows
from rella.textctr.model import E, Scorer, ScoringModel, arithmetic


@dataclass(frozen=True)
class Predictions:
    """What the table of scores holds of N rows (`rella.schemas.SCORES`)."""

    logits: npt.NDArray[np.float32]
    """(N, 2) of yes and no; no's are 0 where the model has one logit."""

    @property
    def probability(self) -> npt.NDArray[np.float64]:
        """(N,) their softmax, that of yes."""
        return probabilities(self.logits)


@dataclass
class Predictor(Generic[E]):
    """Scores rows part by part with weights that stay as they are; the item tower's states are kept between parts."""

    model: ScoringModel[E]
    batch_tokens: int
    """Token budget of a forward pass, padding included."""
    precision: Precision = "float32"
    _scorer: Scorer[E] = field(init=False)

    def __post_init__(self) -> None:
        self._scorer = self.model.scorer(self.batch_tokens)

    def __call__(
        self, examples: E, rows: Rows | None = None, on_done: Callable[[int], None] | None = None
    ) -> Predictions:
        """Return the scores of rows, in their order; longest batches are computed first.

        Args:
            examples: of this part.
            rows: (N,) which of them; None for all.
            on_done: called with the number of rows of each batch.
        """
        chosen = np.arange(len(examples.labels)) if rows is None else rows
        out = np.zeros((len(chosen), 2), dtype=np.float32)
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode(), arithmetic(self.model.device, self.precision):
                self._scorer.prepare(examples, chosen)
                for batch in token_batches(examples.lengths[chosen].tolist(), self.batch_tokens):
                    out[batch] = self._scorer.logits(examples, chosen[batch]).float().cpu().numpy()
                    if on_done is not None:
                        on_done(len(batch))
        finally:
            self.model.train(training)
        return Predictions(out)


def predict(
    model: ScoringModel[E],
    examples: E,
    batch_tokens: int,
    precision: Precision = "float32",
    on_done: Callable[[int], None] | None = None,
) -> Predictions:
    """Return the scores of all N rows, (N, 2) float32 logits and (N,) float64 probabilities; see `Predictor`."""
    return Predictor(model, batch_tokens, precision)(examples, None, on_done)


@dataclass(frozen=True)
class Validation(Generic[E]):
    """Scores all validation rows with the model that is being fitted; every rank calls it, and each does its share."""

    model: ScoringModel[E]
    examples: E
    batch_tokens: int
    precision: Precision = "float32"
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if np.isnan(self.examples.labels).any():
            raise InputError("validation rows without a label: choose rows that have one")

    def __call__(self) -> dict[str, float]:
        """Return AUC, log loss and accuracy on all rows in float64, the same on every rank.

        Raises:
            InputError: all labels are the same.
        """
        logits = self.logits()
        metrics = evaluate(self.examples.labels, Predictions(logits).probability)
        return {"auc": metrics.auc, "log_loss": metrics.log_loss, "accuracy": metrics.accuracy}

    def logits(self) -> npt.NDArray[np.float32]:
        """Return all rows' logits (N, 2), the same on every rank."""
        # By length, so that every rank has long and short rows alike.
        order = np.argsort(-self.examples.lengths, kind="stable")
        mine = order[self.rank :: self.world]
        found = Predictor(self.model, self.batch_tokens, self.precision)(self.examples, mine).logits
        return join_shares(found, mine, len(order), self.world, self.model.device)
