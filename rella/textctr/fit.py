"""The fit of an LM-based baseline (Appendix C.2): AdamW with linear decay on all weights, in one process or several.

A step's batch is a slice of a permutation that depends on the seed and the epoch only, and its loss is the sum over its
rows divided by their number. So the number of ranks and the micro-batches are a matter of speed, not of result; and a
run that was killed goes on from its last checkpoint, on any number of ranks, as if nothing had happened.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic

import numpy as np
import torch
import torch.distributed as dist

from rella.baselines import TextBaselineConfig
from rella.errors import InputError, TrainingError
from rella.lm.checkpoints import Course, TrainingState
from rella.lm.encoding import token_batches
from rella.lm.ranks import write_on_first
from rella.lm.tuning import Progress, epoch_order, seed_dropout, validation_steps
from rella.lm.zero import Tensors
from rella.textctr.examples import Rows
from rella.textctr.model import E, ScoringModel, TextModel, arithmetic, put_weights, weights_of
from rella.textctr.optimiser import Optimiser, learning_rate


@dataclass(frozen=True)
class FitResult:
    """A finished fit: its course, whose losses are means per row (per predicted token in PTab's stage A)."""

    course: Course
    best: Tensors
    """Parameter name → float32 weights of the best step on the CPU; of the last step without validation."""


def micro_batches(batch: Rows, lengths: Rows, rank: int, world: int, budget: int) -> list[Rows]:
    """Return one rank's share of a step's batch in pieces of similar length within the token budget, longest first.

    Ranks get the same number of rows but for one, and long and short ones alike; together they get each row once.

    Args:
        batch: (B,) row numbers.
        lengths: (N,) tokens of every row of the training set.
        rank: which share.
        world: number of shares.
        budget: tokens of a piece, padding included; a longer row is a piece of its own.
    """
    ordered = batch[np.lexsort((batch, -lengths[batch]))]
    mine = ordered[rank::world]
    return [mine[piece] for piece in token_batches(lengths[mine].tolist(), budget)]


@dataclass
class TextFitter(Generic[E]):
    """Fits a model to rows. All ranks make the same calls; the caller has set up `torch.distributed` where there are
    several, and given each the same examples.
    """

    model: TextModel[E]
    """On this rank's device; afterwards it has the best step's weights."""
    examples: E
    config: TextBaselineConfig
    seed: int
    """Of the order of rows and the dropout masks."""
    report: Callable[[Progress], None]
    """Called on every rank after every step and validation."""
    validate: Callable[[], dict[str, float]] | None = None
    """Scores the validation rows (`rella.textctr.predict.Validation`); the best AUC chooses the step. Without it the
    last step's weights are taken, as in PTab's stage A."""
    save: Callable[[TrainingState], None] | None = None
    """Writes a checkpoint (`TrainingState.to_bytes`, `Checkpoints.save`); called on rank 0. May raise OSError."""
    start: TrainingState | None = None
    """Where to go on, the same on every rank."""
    rank: int = 0
    world: int = 1
    _best: Tensors = field(default_factory=dict, init=False)
    _saved: float = field(default=0.0, init=False)
    _drawn: tuple[int, Rows] | None = field(default=None, init=False)

    def run(self) -> FitResult:
        """Train up to `max_epochs` and return the course with the weights of the best step.

        Raises:
            InputError: no rows, or rows without a label.
            TrainingError: a loss that is not finite.
            OSError: a checkpoint cannot be written.
        """
        self._check()
        course = self._begin()
        due = validation_steps(self.steps_per_epoch, self.config.valid_per_epoch) if self.validate else set()
        self.model.train()
        while course.steps < self.total_steps and not self._is_over(course):
            asked = self._step(course)
            validated = (course.steps - 1) % self.steps_per_epoch + 1 in due
            if validated:
                self._validate(course)
            if (asked or validated) and course.steps < self.total_steps:
                self._save(course)
        if self.validate is None:
            course.best_step, self._best = course.steps, weights_of(self.model)
        put_weights(self.model, self._best)
        return FitResult(course, self._best)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch; the last one may have fewer rows."""
        return math.ceil(len(self.examples.labels) / self.config.batch_size)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole schedule."""
        return self.steps_per_epoch * self.config.max_epochs

    def _check(self) -> None:
        for name in ("batch_size", "max_epochs", "valid_per_epoch"):
            if getattr(self.config, name) < 1:
                raise InputError(f"{name} is {getattr(self.config, name)}; it must be at least 1")
        if not len(self.examples.labels):
            raise InputError("no training rows: the training split is empty")
        if isinstance(self.model, ScoringModel) and np.isnan(self.examples.labels).any():
            raise InputError("training rows without a label: choose rows that have one")

    def _is_over(self, course: Course) -> bool:
        return self.config.patience is not None and course.since_best >= self.config.patience

    def _begin(self) -> Course:
        optimiser = None if self.start is None else self.start.optimiser
        self._optimiser = Optimiser(self.model, self.config, self.config.arithmetic, self.world, optimiser)
        self._lengths, self._saved = self.examples.lengths, time.monotonic()
        if self.start is None:
            return Course()
        self._best = self.start.best
        self.start.course.resumed_at.append(self.start.course.steps)
        return self.start.course

    def _step(self, course: Course) -> bool:
        """One optimiser step; return whether a checkpoint is due."""
        epoch, step = divmod(course.steps, self.steps_per_epoch)
        batch = self._order(epoch)[step * self.config.batch_size : (step + 1) * self.config.batch_size]
        rate = learning_rate(self.config, course.steps, self.total_steps)
        loss, weight, asked = self._gradients(batch, course.steps, epoch)
        if not math.isfinite(loss):
            raise TrainingError(
                f"loss is {loss} at epoch {epoch + 1}, step {step + 1}: lower the learning rate, or take another "
                "precision"
            )
        self._optimiser.step(rate, weight)
        course.losses.append(loss)
        course.rows += len(batch)
        self.report(self._progress(course, rate))
        return asked

    def _order(self, epoch: int) -> Rows:
        """The epoch's order of rows; drawn once an epoch, for it may have millions."""
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = (epoch, epoch_order(len(self.examples.labels), self.seed, epoch))
        return self._drawn[1]

    def _gradients(self, batch: Rows, step: int, epoch: int) -> tuple[float, float, bool]:
        """Take the gradients of the batch's summed loss; return the mean loss, its divisor, and the checkpoint vote."""
        seed_dropout(self.seed, step, self.rank, self.model.device)
        device = self.model.device
        # The sum of losses, what it is divided by, and the vote for a checkpoint of the one rank whose clock counts.
        total = torch.zeros(3, dtype=torch.float64, device=device)
        for piece in micro_batches(batch, self._lengths, self.rank, self.world, self.config.micro_batch_tokens):
            with arithmetic(device, self.config.arithmetic):
                summed, weight = self.model.loss(self.examples, piece, epoch)
            self._optimiser.backward(summed)
            total[0] += summed.detach()
            total[1] += weight
        if self.rank == 0 and time.monotonic() - self._saved >= self.config.checkpoint_seconds:
            total[2] = 1.0
        if self.world > 1:
            dist.all_reduce(total)
        loss, divisor, asked = total.tolist()
        # No token of a small batch may have been chosen for prediction.
        divisor = max(divisor, 1.0)
        return loss / divisor, divisor, asked > 0

    def _validate(self, course: Course) -> None:
        """Take the metrics on the validation rows and keep the weights where they are the best so far."""
        assert self.validate is not None
        metrics = self.validate()
        best = max((v["auc"] for v in course.valid), default=-math.inf)
        course.valid.append({**metrics, "step": course.steps})
        if metrics["auc"] > best:
            course.best_step, self._best = course.steps, weights_of(self.model)
        rate = learning_rate(self.config, course.steps - 1, self.total_steps)
        self.report(self._progress(course, rate, metrics))

    def _save(self, course: Course) -> None:
        """Let one rank write the state."""
        save = self.save
        if save is None:
            return

        def write() -> None:
            save(TrainingState(course, self._optimiser.state(), self._best))

        write_on_first(write, self.rank, self.world)
        self._saved = time.monotonic()

    def _progress(self, course: Course, rate: float, valid: dict[str, float] | None = None) -> Progress:
        total, epoch = (
            self.config.max_epochs * len(self.examples.labels),
            (course.steps - 1) // self.steps_per_epoch + 1,
        )
        return Progress(
            course.rows, total, course.losses[-1], rate, epoch, course.steps, self._optimiser.scale, course, valid
        )
