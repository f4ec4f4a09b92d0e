"""ReiT (§3.3): LoRA tuning with the causal language modelling objective of Eq. 3, on DeepSpeed.

A step's batch is a slice of a permutation that depends on the seed and the epoch only, and its loss is the sum over the
answers' tokens divided by their number in the whole batch. So the number of workers, the micro-batches, the
accumulation and the ZeRO stage are a matter of speed, not of result; and a run that was killed goes on from its last
checkpoint, on any number of workers, as if nothing had happened.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from rella.config import TuneConfig
from rella.errors import InputError, TrainingError
from rella.lm.checkpoints import Checkpoints, Course, TrainingState
from rella.lm.encoding import Ids
from rella.lm.lean import Chosen, lean, recomputed
from rella.lm.micro import Limits, Numbers, cut
from rella.lm.packed import attention_without_masks
from rella.lm.ranks import newest_state, write_on_first
from rella.lm.scoring import causal_lm, finished
from rella.lm.zero import Engine, OptimiserState, Tensors
from rella.stages import Precision


@dataclass(frozen=True)
class Row:
    """One training row: a wrapped prompt's tokens and its answer's."""

    prompt: Ids
    answer: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of prompt and answer together."""
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Progress:
    """What a step or a validation tells its caller; figures are reduced over all workers."""

    rows: int
    """Rows trained so far."""
    total_rows: int
    loss: float
    """Mean loss per answer token, of `rella.ctr` per sample, of the last batch."""
    learning_rate: float
    epoch: int
    """1 is the first."""
    step: int
    """Optimiser steps so far."""
    loss_scale: float
    """Of float16; 1 otherwise."""
    course: Course
    """Everything until here."""
    valid: dict[str, float] | None = None
    """Metrics on the validation rows, where they were just taken."""


@dataclass(frozen=True)
class TuneResult:
    """A finished run: its course, and the weights of its best step."""

    course: Course
    best: Tensors
    """Parameter name → weights on the CPU."""


@dataclass(frozen=True)
class Packing:
    """How rows stand one after the other in one sequence of L tokens."""

    positions: torch.Tensor
    """(1, L) int64, 0 where a row starts."""
    starts: torch.Tensor
    """(rows + 1,) int32: where they start, and L."""
    lengths: tuple[int, ...]


class AnswerModel(nn.Module):
    """A causal LM whose head is applied at answers only: a (B, L, V) tensor never exists."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.chosen: Chosen | None = None
        """Where the last layer can be told to compute the answers' positions only (`rella.lm.lean`)."""

    def forward(
        self,
        ids: torch.Tensor,
        row: torch.Tensor,
        position: torch.Tensor,
        target: torch.Tensor | None = None,
        packing: Packing | None = None,
    ) -> torch.Tensor:
        """Return Eq. 3 on a batch, a float32 scalar: the sum over answer tokens of −log P(y_j | x, y_<j).

        Without `target` return the logits of the whole vocabulary at the T positions: (T, V) float32.

        Args:
            ids: (B, L) int64, prompts and answers padded on the right; packed ones are (1, L), without padding.
            row: (T,) int64, row of each answer token; 0 where packed.
            position: (T,) int64, position in `ids` whose state predicts it: one before the token's own.
            target: (T,) int64, the token.
            packing: of packed rows; the attention of `rella.lm.packed` must then be at work.
        """
        lm, at = causal_lm(self.model), row * ids.shape[1] + position
        own: dict[str, Any] = {}
        if packing is not None:
            own = {
                "position_ids": packing.positions,
                "row_starts": packing.starts,
                "row_lengths": packing.lengths,
            }
        if self.chosen is not None:
            self.chosen.positions = at
        states = lm.base_model(input_ids=ids, use_cache=False, **own).last_hidden_state.flatten(0, 1)
        if self.chosen is None:
            states = states.index_select(0, at)
        logits = finished(lm, lm.get_output_embeddings()(states).float())
        return logits if target is None else nn.functional.cross_entropy(logits, target, reduction="sum")


def epoch_order(rows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the order in which an epoch visits the rows: a permutation of (rows,) from (seed, epoch) alone."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)


def seed_dropout(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Set a step's dropout masks: a function of seed, step and rank, so that a resumed run draws the same ones.

    What `torch.manual_seed` draws, at a hundredth of its time: for every kind of accelerator that torch knows of and
    that is not in use, that one writes down the Python stack from which it was called, 0.13 to 0.26 ms for three.
    """
    drawn_from = ((seed * 1_000_003 + step) * 4_099 + rank) % 2**63
    torch.default_generator.manual_seed(drawn_from)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(drawn_from)


def validation_steps(steps: int, per_epoch: int) -> set[int]:
    """Return after which of an epoch's `steps` (1 is the first) to validate: evenly spaced, the last one among them."""
    return {math.ceil(n * steps / per_epoch) for n in range(1, per_epoch + 1)}


def answer_inputs(rows: Sequence[Row], pad: int, device: torch.device, packing: bool = False) -> tuple[Any, ...]:
    """Return `AnswerModel`'s arguments for some rows.

    Args:
        rows: at least one.
        pad: any token id.
        device: where they go.
        packing: rows one after the other, or padded on the right.
    """
    lengths = np.array([r.tokens for r in rows])
    width = int(lengths.sum() if packing else lengths.max())
    offset = np.cumsum(lengths) - lengths if packing else np.arange(len(rows)) * width
    ids = np.full(width if packing else len(rows) * width, pad, dtype=np.int64)
    for row, start in zip(rows, offset, strict=True):
        ids[start : start + row.tokens] = [*row.prompt, *row.answer]
    answer = [len(r.answer) for r in rows]
    prompt = np.repeat([len(r.prompt) for r in rows], answer)
    within = np.concatenate([np.arange(n) for n in answer]) + prompt - 1
    of_row = np.repeat(np.arange(len(rows)), answer)
    target = np.concatenate([r.answer for r in rows]).astype(np.int64)
    if not packing:
        return tuple(_to(x, device) for x in (ids.reshape(len(rows), width), of_row, within, target))
    positions, starts = np.arange(width) - np.repeat(offset, lengths), np.append(offset, width).astype(np.int32)
    at = within + offset[of_row]
    packed = Packing(_to(positions[None], device), _to(starts, device), tuple(lengths.tolist()))
    return (*(_to(x, device) for x in (ids[None], np.zeros_like(at), at, target)), packed)


def _to(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@dataclass
class Tuner:
    """Trains the LoRA layers of one model on one list of rows. All workers make the same calls in the same order."""

    model: Any
    """The base with LoRA layers, from `add_lora`."""
    rows: Sequence[Row]
    config: TuneConfig
    precision: Precision
    pad: int
    seed: int
    validate: Callable[[nn.Module], dict[str, float]]
    """Scores the validation rows on all workers, given the `AnswerModel`, and returns the same metrics on each."""
    report: Callable[[Progress], None]
    checkpoints: Checkpoints | None = None
    """Where states go and where an earlier run's are looked for; without it a killed run starts over."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """More of DeepSpeed's settings, from `rella.lm.zero_settings`."""
    passes: list[int] = field(default_factory=list, init=False)
    """Forward and backward passes of each step of this process."""
    _best: Tensors = field(default_factory=dict, init=False)
    _saved: float = field(default=0.0, init=False)

    def run(self) -> TuneResult:
        """Train up to `max_epochs` and return the course with the weights of the best step on validation.

        Raises:
            InputError: no rows, or a model whose rows cannot be packed.
            TrainingError: a loss that is not finite.
            StorageError: a checkpoint cannot be written.
        """
        if not self.rows:
            raise InputError("no training rows: --shots is 0 or the training split is empty")
        with self._leaner() as chosen:
            course = self._start(chosen)
            self._train(course)
            self.engine.destroy()
        return TuneResult(course, self._best)

    @contextmanager
    def _leaner(self) -> Iterator[Chosen | None]:
        lm, longest = causal_lm(self.model), max(row.tokens for row in self.rows)
        with (
            attention_without_masks(lm, longest, self.config.packing),
            recomputed(lm, self.config.gradient_checkpointing),
            lean(lm, sharded=self.config.zero_stage == 3) as chosen,
        ):
            yield chosen

    def _train(self, course: Course) -> None:
        total = self._epochs() * self.steps_per_epoch
        due = validation_steps(self.steps_per_epoch, self.config.valid_per_epoch)
        self.engine.engine.train()
        while course.steps < total and not self._is_over(course):
            asked = self._step(course)
            validated = (course.steps - 1) % self.steps_per_epoch + 1 in due
            if validated:
                self._validate(course)
            if (asked or validated) and course.steps < total:
                self._save(course)

    def _epochs(self) -> int:
        return min(self.config.max_epochs, self.config.stop_after or self.config.max_epochs)

    def _is_over(self, course: Course) -> bool:
        return self.config.patience is not None and course.since_best >= self.config.patience

    def _start(self, chosen: Chosen | None) -> Course:
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        self.steps_per_epoch = math.ceil(len(self.rows) / self.config.batch_size)
        self.lengths = np.array([r.tokens for r in self.rows])
        self.limits = Limits(self.config.micro_batch_rows, self.config.micro_batch_tokens, self.config.packing)
        state = newest_state(self.checkpoints, self.rank, self.world)
        optimiser = None if state is None else state.optimiser
        root = AnswerModel(self.model)
        root.chosen = chosen
        self.engine = self._make_engine(root, optimiser)
        self.device, self._saved = self.engine.device, time.monotonic()
        if state is None:
            return Course()
        self._best = state.best
        state.course.resumed_at.append(state.course.steps)
        return state.course

    def _make_engine(self, root: AnswerModel, state: OptimiserState | None) -> Engine:
        return Engine(root, self.config, self.precision, state, self.settings)

    def _save(self, course: Course) -> None:
        """Gather the state on all workers; one writes it."""
        states = self.checkpoints
        if states is None:
            return
        state = TrainingState(course, self.engine.state(), self._best)
        write_on_first(lambda: states.save(state), self.rank, self.world)
        self._saved = time.monotonic()

    def _step(self, course: Course) -> bool:
        """One optimiser step; return whether a checkpoint is due."""
        epoch, step = divmod(course.steps, self.steps_per_epoch)
        order = epoch_order(len(self.rows), self.seed, epoch)
        batch = order[step * self.config.batch_size : (step + 1) * self.config.batch_size]
        rate = self._rate(course.steps)
        self.engine.set_rate(rate)
        loss, due = self._train_on(batch, course.steps)
        if not math.isfinite(loss):
            raise TrainingError(
                f"loss is {loss} at epoch {epoch + 1}, step {step + 1}: lower --tune.learning-rate, or take another "
                "--precision"
            )
        course.losses.append(loss)
        course.rows += len(batch)
        self.report(self._progress(course, rate))
        return due

    def _progress(self, course: Course, rate: float, valid: dict[str, float] | None = None) -> Progress:
        total, epoch = self._epochs() * len(self.rows), (course.steps - 1) // self.steps_per_epoch + 1
        scale = self.engine.loss_scale
        return Progress(course.rows, total, course.losses[-1], rate, epoch, course.steps, scale, course, valid)

    def _rate(self, step: int) -> float:
        """Linear from the initial rate to 0 at the end of `max_epochs`, no warm-up."""
        return self.config.learning_rate * (1.0 - step / (self.steps_per_epoch * self.config.max_epochs))

    def _train_on(self, batch: npt.NDArray[np.int64], step: int) -> tuple[float, bool]:
        """Return the batch's loss per answer token over all workers, and whether the time for a checkpoint has come."""
        seed_dropout(self.seed, step, self.rank, self.device)
        answer_tokens = sum(len(self.rows[i].answer) for i in batch)
        passes = cut(batch, self.lengths, self.limits, self.world, self.config.bucketing)
        self.passes.append(len(passes))
        # The sum of losses, and the vote for a checkpoint of the one worker whose clock counts.
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for number, pieces in enumerate(passes, 1):
            piece = pieces[self.rank]
            # An empty piece still takes part in every collective, with weight 0.
            inputs = self._inputs(piece if len(piece) else batch[:1])
            summed = self.engine.engine(*inputs) * float(len(piece) > 0)
            # DeepSpeed averages over the workers: undone here, so that every answer token weighs the same.
            self.engine.backward(summed * (self.world / answer_tokens), last=number == len(passes))
            total[0] += summed.detach()
        if self.rank == 0 and time.monotonic() - self._saved >= self.config.checkpoint_seconds:
            total[1] = 1.0
        dist.all_reduce(total)
        return float(total[0]) / answer_tokens, bool(total[1] > 0)

    def _inputs(self, piece: Numbers) -> tuple[Any, ...]:
        """Return what `AnswerModel` takes; the copies to a card do not make the host wait."""
        return answer_inputs([self.rows[i] for i in piece], self.pad, self.device, self.config.packing)

    def _validate(self, course: Course) -> None:
        """Take the metrics on the validation rows and keep the weights where they are the best so far."""
        self.engine.engine.eval()
        metrics = self.validate(self.engine.root)
        self.engine.engine.train()
        best = max((v["auc"] for v in course.valid), default=-math.inf)
        course.valid.append({**metrics, "step": course.steps})
        if metrics["auc"] > best:
            course.best_step, self._best = course.steps, self.engine.weights()
        self.report(self._progress(course, self._rate(course.steps - 1), metrics))
