"""Fits a CTR model, in one process or as one of several; scores samples with it.

A step's batch is a slice of a permutation that depends on the seed and the epoch only, and its loss is the sum over its
samples divided by their number, whoever computes which. So the number of workers changes the speed and not the curve
(dropout's masks alone belong to a worker: with them another number of workers is like another seed), and a run that was
killed goes on from its last checkpoint, on any number of workers, as if nothing had happened.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from scipy.special import expit
from torch import nn
from torch.nn import functional

from rella.baselines import BaselineConfig
from rella.ctr.batches import Batch, Batches, Rows
from rella.errors import ArtifactError, InputError, TrainingError
from rella.lm.checkpoints import Checkpoints, Course, TrainingState
from rella.lm.ranks import join_shares, newest_state, write_on_first
from rella.lm.tuning import Progress, epoch_order, seed_dropout, validation_steps
from rella.lm.zero import MOMENTS, OptimiserState, Tensors
from rella.metrics import evaluate

SCORED = 2048
"""Rows of one forward pass without gradients."""
REPORTED = 20
"""Steps between two reports; a loss is read from a card only then, as the card waits for it."""

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Fitted:
    """A finished run: its course, and the weights of its best step."""

    course: Course
    best: Tensors
    """Parameter name → weights on the CPU."""


def predict(
    model: nn.Module, batches: Batches, device: torch.device, rows: Rows | None = None
) -> tuple[npt.NDArray[np.float64], Logits]:
    """Return the probabilities of label 1, (S,) float64, and the logits that they are of, (S,) float32.

    Args:
        model: of `build`; its mode (train or eval) is as before afterwards.
        batches: S samples.
        device: where the model is.
        rows: (S',) which samples, in their order; None for all.
    """
    wanted = np.arange(len(batches)) if rows is None else rows
    plan = [wanted[start : start + SCORED] for start in range(0, len(wanted), SCORED)]
    was_training = model.training
    model.eval()
    with torch.inference_mode(), closing(batches.prefetched(plan)) as made:
        found = [model(batch.to(device)).float().cpu().numpy() for batch in made]
    model.train(was_training)
    logits: Logits = np.concatenate([np.zeros(0, np.float32), *found])
    return expit(logits.astype(np.float64)), logits


def weights_of(model: nn.Module) -> Tensors:
    """Return copies of a model's parameters on the CPU, by name."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters()}


def load_weights(model: nn.Module, weights: Tensors) -> None:
    """Put weights in a model's parameters.

    Raises:
        ArtifactError: other names or shapes than the model's.
    """
    own = dict(model.named_parameters())
    if {n: p.shape for n, p in own.items()} != {n: w.shape for n, w in weights.items()}:
        raise ArtifactError("these weights are of another model or other features: --restart baseline fits it again")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def share(rows: int, rank: int, world: int) -> slice:
    """Return which of `rows` one worker takes: contiguous, in the order of ranks, of sizes that differ by at most 1."""
    return slice(rank * rows // world, (rank + 1) * rows // world)


@dataclass
class Fitter:
    """Fits one model. All workers make the same calls in the same order, in a group that the caller has initialised."""

    model: nn.Module
    """Of `build`, on `device`; worker 0's first weights count."""
    train: Batches
    valid: Batches
    config: BaselineConfig
    seed: int
    """Of the rows' order and the dropout."""
    device: torch.device
    report: Callable[[Progress], None]
    """Called every few steps and after a validation, by every worker with the same figures."""
    rank: int = 0
    world: int = 1
    checkpoints: Checkpoints | None = None
    """Where states go and where an earlier run's are looked for; without it a killed run starts over."""
    _best: Tensors = field(default_factory=dict, init=False)
    _saved: float = field(default=0.0, init=False)

    def run(self) -> Fitted:
        """Fit up to `max_epochs`, and return the course with the weights of the best step, which the model then has.

        Raises:
            InputError: a count below 1 in the configuration, no rows to train or validate on, a label that is unknown,
                or one class only in the validation rows.
            TrainingError: a loss that is not finite.
            StorageError: a checkpoint cannot be written.
        """
        self._check()
        course = self._start()
        total = self.config.max_epochs * self.steps_per_epoch
        self.model.train()
        if course.steps < total and not self._is_over(course):
            # Closed by hand: the generator's thread must not outlive the run.
            with closing(self.train.prefetched(self._plan(course.steps, total))) as batches:
                self._steps(course, batches, total)
        load_weights(self.model, self._best)
        return Fitted(course, self._best)

    def _check(self) -> None:
        c = self.config
        counts = {"batch_size": c.step_rows, "max_epochs": c.max_epochs, "valid_per_epoch": c.valid_per_epoch}
        if small := [name for name, value in counts.items() if value < 1]:
            raise InputError(f"{small[0]} is {counts[small[0]]}; it must be at least 1")
        if not len(self.train) or not len(self.valid):
            raise InputError(f"{len(self.train)} training and {len(self.valid)} validation rows: both take at least 1")
        for name, batches in (("training", self.train), ("validation", self.valid)):
            unknown = np.isnan(batches.samples.label)
            if unknown.any():
                sample = batches.samples.sample_id[int(np.argmax(unknown))]
                raise InputError(f"{name} sample {sample} has no label ({int(unknown.sum())} in all); leave them out")

    def _steps(self, course: Course, batches: Iterator[Batch], total: int) -> None:
        due = validation_steps(self.steps_per_epoch, self.config.valid_per_epoch)
        unread: list[torch.Tensor] = []
        for step, batch in enumerate(batches, start=course.steps):
            unread.append(self._step(batch.to(self.device), step))
            validated = step % self.steps_per_epoch + 1 in due
            if not validated and len(unread) < REPORTED:
                continue
            self._read(course, unread)
            if validated:
                self._validate(course)
            if self._wants_checkpoint(validated) and course.steps < total:
                self._save(course)
            if self._is_over(course):
                break

    def _is_over(self, course: Course) -> bool:
        return self.config.patience is not None and course.since_best >= self.config.patience

    def _start(self) -> Course:
        self.steps_per_epoch = math.ceil(len(self.train) / self.config.step_rows)
        self.parameters = dict(self.model.named_parameters())
        self.optimiser = torch.optim.AdamW(
            self.parameters.values(), self.config.learning_rate, weight_decay=self.config.weight_decay, fused=True
        )
        self._saved = time.monotonic()
        state = newest_state(self.checkpoints, self.rank, self.world)
        if state is not None:
            self._restore(state)
            return state.course
        if self.world > 1:
            for parameter in self.parameters.values():
                dist.broadcast(parameter.detach(), src=0)
        return Course()

    def _restore(self, state: TrainingState) -> None:
        load_weights(self.model, state.optimiser.weights)
        for name, parameter in self.parameters.items():
            moments = {m: state.optimiser.moments[m][name].to(self.device) for m in MOMENTS}
            steps = torch.tensor(float(state.optimiser.steps), device=self.device)
            self.optimiser.state[parameter] = {"step": steps, **moments}
        self._best = state.best
        state.course.resumed_at.append(state.course.steps)

    def _save(self, course: Course) -> None:
        """One worker writes the state, which all of them have."""
        states = self.checkpoints
        assert states is not None

        def write() -> None:
            adam = self.optimiser.state
            moments = {m: {n: adam[p][m].cpu() for n, p in self.parameters.items()} for m in MOMENTS}
            state = OptimiserState(weights_of(self.model), moments, course.steps)
            states.save(TrainingState(course, state, self._best))

        write_on_first(write, self.rank, self.world)
        self._saved = time.monotonic()

    def _wants_checkpoint(self, validated: bool) -> bool:
        """Whether a state is due: after a validation, or when the time of worker 0, whose clock counts, has come."""
        if self.checkpoints is None or validated:
            return self.checkpoints is not None
        late = time.monotonic() - self._saved >= self.config.checkpoint_seconds
        vote = torch.tensor([float(late and self.rank == 0)], device=self.device)
        if self.world > 1:
            dist.all_reduce(vote)
        return bool(vote.item() > 0)

    def _plan(self, step: int, total: int) -> Iterator[Rows]:
        """Yield this worker's rows of each step from `step` on."""
        order, of_epoch, size = np.zeros(0, dtype=np.int64), -1, self.config.step_rows
        for n in range(step, total):
            epoch, place = divmod(n, self.steps_per_epoch)
            if epoch != of_epoch:
                order, of_epoch = epoch_order(len(self.train), self.seed, epoch), epoch
            batch = order[place * size : (place + 1) * size]
            yield batch[share(len(batch), self.rank, self.world)]

    def _step(self, batch: Batch, step: int) -> torch.Tensor:
        """One optimiser step; return the mean loss over the whole batch, of all workers, as a scalar on the device."""
        seed_dropout(self.seed, step, self.rank, self.device)
        self.optimiser.zero_grad(set_to_none=True)
        place = step % self.steps_per_epoch
        rows = min(self.config.step_rows, len(self.train) - place * self.config.step_rows)
        if len(batch):
            loss = functional.binary_cross_entropy_with_logits(self.model(batch), batch.label, reduction="sum") / rows
            loss.backward()
            loss = loss.detach()
        else:
            loss = torch.zeros((), device=self.device)
        if self.world > 1:
            loss = self._summed(loss)
        self.optimiser.step()
        return loss

    def _summed(self, loss: torch.Tensor) -> torch.Tensor:
        """Add the gradients of all workers, and return the sum of their losses: one collective for all."""
        with_gradient = self.parameters.values()
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in with_gradient]
        flat = torch.cat([*(g.reshape(-1) for g in parts), loss.reshape(1)])
        dist.all_reduce(flat)
        for parameter, gradient in zip(with_gradient, flat[:-1].split([g.numel() for g in parts]), strict=True):
            parameter.grad = gradient.view_as(parameter)
        return flat[-1]

    def _read(self, course: Course, unread: list[torch.Tensor]) -> None:
        """Put the losses of the last steps in the course, report, and forget them."""
        for loss in torch.stack(unread).tolist():
            epoch, place = divmod(course.steps, self.steps_per_epoch)
            if not math.isfinite(loss):
                raise TrainingError(f"loss is {loss} at epoch {epoch + 1}, step {place + 1}: lower the learning rate")
            course.losses.append(loss)
            course.rows += min(self.config.step_rows, len(self.train) - place * self.config.step_rows)
        unread.clear()
        self.report(self._progress(course))

    def _progress(self, course: Course, valid: dict[str, float] | None = None) -> Progress:
        total, epoch = self.config.max_epochs * len(self.train), (course.steps - 1) // self.steps_per_epoch + 1
        rate = self.config.learning_rate
        return Progress(course.rows, total, course.losses[-1], rate, epoch, course.steps, 1.0, course, valid)

    def _validate(self, course: Course) -> None:
        """Take the metrics on the validation rows and keep the weights where they are the best so far."""
        part = share(len(self.valid), self.rank, self.world)
        _, mine = predict(self.model, self.valid, self.device, np.arange(part.start, part.stop))
        logits = join_shares(mine, part, len(self.valid), self.world, self.device)
        found = evaluate(self.valid.samples.label, expit(logits.astype(np.float64)))
        metrics = {"auc": found.auc, "log_loss": found.log_loss, "accuracy": found.accuracy}
        best = max((v["auc"] for v in course.valid), default=-math.inf)
        course.valid.append({**metrics, "step": course.steps})
        if metrics["auc"] > best:
            course.best_step, self._best = course.steps, weights_of(self.model)
        self.report(self._progress(course, metrics))
