"""ReiT (§3.3): LoRA tuning with the causal language modelling objective of Eq. 3, on DeepSpeed.

A step's batch is a slice of a permutation that depends on the seed and the epoch only, and its loss is the sum over the
answers' tokens divided by their number in the whole batch. So the number of workers, the micro-batches and the
accumulation are a matter of speed, not of result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from rella.config import Precision, TuneConfig
from rella.errors import InputError
from rella.lm.encoding import Ids, pad_right
from rella.lm.scoring import causal_lm, finished


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
    """What a step or an epoch tells its caller; figures are reduced over all workers."""

    rows: int
    """Rows trained so far."""
    total_rows: int
    loss: float
    """Mean loss per answer token of the last batch."""
    learning_rate: float
    epoch: int
    valid: dict[str, float] | None = None
    """Metrics on the validation rows, at the end of an epoch."""


@dataclass
class TuneResult:
    """The course of one tuning run; the model itself is left with the best epoch's weights."""

    losses: list[float] = field(default_factory=list)
    """Mean loss per answer token, one value a step."""
    valid: list[dict[str, float]] = field(default_factory=list)
    """Validation metrics, one entry an epoch."""
    best_epoch: int = 0
    """1 is the first; the one whose weights are kept."""
    rows: int = 0
    """Rows trained."""


class AnswerLoss(nn.Module):
    """Eq. 3 on a batch: summed cross-entropy of the answers' tokens, the LM head applied at their positions only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: torch.Tensor, row: torch.Tensor, position: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """Return a float32 scalar, the sum over answer tokens of −log P(y_j | x, y_<j).

        Args:
            ids: (B, L) int64, prompts and answers padded on the right.
            row: (T,) int64, row of each answer token.
            position: (T,) int64, position whose state predicts it: one before the token's own.
            target: (T,) int64, the token.
        """
        lm = causal_lm(self.model)
        states = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = lm.get_output_embeddings()(states[row, position])
        return nn.functional.cross_entropy(finished(lm, logits.float()), target, reduction="sum")


def deepspeed_config(config: TuneConfig, precision: Precision, accumulation: int) -> dict[str, Any]:
    """Return DeepSpeed's settings for a run."""
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_rows,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.clip,
        "zero_optimization": {"stage": config.zero_stage},
        # torch's AdamW on a few million LoRA weights: nothing to compile, and nothing to gain from a fused one.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "fp16": {"enabled": precision == "float16", "initial_scale_power": 14},
        "bf16": {"enabled": precision == "bfloat16"},
        "steps_per_print": 10**9,
    }


def epoch_order(rows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the order in which an epoch visits the rows: a permutation of (rows,) from (seed, epoch) alone."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)


def micro_batches(
    batch: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], count: int
) -> list[npt.NDArray[np.int64]]:
    """Cut a step's batch into `count` pieces of similar length; some are empty when a last batch is small."""
    by_length = batch[np.lexsort((batch, lengths[batch]))]
    return list(np.array_split(by_length, count))


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
    validate: Callable[[Any], dict[str, float]]
    """Scores the validation rows on all workers and returns the same metrics on each."""
    report: Callable[[Progress], None]

    def run(self) -> TuneResult:
        """Train up to `max_epochs`, keep the weights of the epoch with the best validation AUC, and return the course.

        Raises:
            InputError: no rows.
            FloatingPointError: a loss that is not finite.
        """
        if not self.rows:
            raise InputError("no training rows: --shots is 0 or the training split is empty")
        self._start()
        result, best, since_best = TuneResult(), -math.inf, 0
        kept: dict[str, torch.Tensor] = {}
        for epoch in range(self._epochs()):
            self._epoch(epoch, result)
            metrics = self._validate(epoch, result)
            since_best += 1
            if metrics["auc"] > best:
                best, since_best, result.best_epoch = metrics["auc"], 0, epoch + 1
                kept = {n: p.detach().clone() for n, p in self._trainable()}
            if self.config.patience is not None and since_best >= self.config.patience:
                break
        with torch.no_grad():
            for name, parameter in self._trainable():
                parameter.copy_(kept[name])
        self.engine.destroy()
        return result

    def _epochs(self) -> int:
        return min(self.config.max_epochs, self.config.stop_after or self.config.max_epochs)

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]

    def _start(self) -> None:
        import deepspeed

        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        self.accumulation = math.ceil(self.config.batch_size / (self.world * self.config.micro_batch_rows))
        self.steps_per_epoch = math.ceil(len(self.rows) / self.config.batch_size)
        self.lengths = np.array([r.tokens for r in self.rows])
        parameters = [p for _, p in self._trainable()]
        optimiser = torch.optim.AdamW(parameters, lr=self.config.learning_rate, weight_decay=self.config.weight_decay)
        self.engine, self.optimiser, *_ = deepspeed.initialize(
            model=AnswerLoss(self.model),
            model_parameters=parameters,
            optimizer=optimiser,
            config=deepspeed_config(self.config, self.precision, self.accumulation),
        )
        self.device = self.engine.device

    def _epoch(self, epoch: int, result: TuneResult) -> None:
        self.engine.train()
        order = epoch_order(len(self.rows), self.seed, epoch)
        for step in range(self.steps_per_epoch):
            batch = order[step * self.config.batch_size : (step + 1) * self.config.batch_size]
            rate = self._set_rate(epoch * self.steps_per_epoch + step)
            loss = self._step(batch, epoch * self.steps_per_epoch + step)
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"loss is {loss} at epoch {epoch + 1}, step {step + 1}: lower the learning rate"
                )
            result.losses.append(loss)
            result.rows += len(batch)
            self.report(Progress(result.rows, self._epochs() * len(self.rows), loss, rate, epoch + 1))

    def _set_rate(self, step: int) -> float:
        """Linear from the initial rate to 0 at the end of `max_epochs`, no warm-up."""
        rate = self.config.learning_rate * (1.0 - step / (self.steps_per_epoch * self.config.max_epochs))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        return rate

    def _step(self, batch: npt.NDArray[np.int64], step: int) -> float:
        """One optimiser step; return the batch's loss per answer token, over all workers."""
        # Dropout masks: a function of seed, step and worker, so that a resumed run draws the same ones.
        torch.manual_seed(((self.seed * 1_000_003 + step) * 4_099 + self.rank) % 2**63)
        answer_tokens = sum(len(self.rows[i].answer) for i in batch)
        pieces = micro_batches(batch, self.lengths, self.world * self.accumulation)
        total = torch.zeros((), device=self.device)
        # DeepSpeed divides by the accumulation and averages over the workers: undone here, so that every answer
        # token of the batch weighs the same.
        scale = self.world * self.accumulation / answer_tokens
        for micro in range(self.accumulation):
            piece = pieces[micro * self.world + self.rank]
            # An empty piece still takes part in every collective, with weight 0.
            summed = self.engine(*self._inputs(piece if len(piece) else batch[:1])) * float(len(piece) > 0)
            self.engine.backward(summed * scale)
            self.engine.step()
            total += summed.detach()
        dist.all_reduce(total)
        return float(total) / answer_tokens

    def _inputs(self, piece: npt.NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
        rows = [self.rows[i] for i in piece]
        whole = [np.concatenate([r.prompt, np.asarray(r.answer, dtype=np.int32)]) for r in rows]
        ids, _ = pad_right(whole, self.pad, self.device)
        where = [(n, len(r.prompt) + j - 1, token) for n, r in enumerate(rows) for j, token in enumerate(r.answer)]
        row, position, target = torch.tensor(where, device=self.device).unbind(1)
        return ids, row, position, target

    def _validate(self, epoch: int, result: TuneResult) -> dict[str, float]:
        self.engine.eval()
        metrics = self.validate(self.model)
        result.valid.append(metrics)
        done = self._epochs() * len(self.rows)
        self.report(Progress(result.rows, done, result.losses[-1], self._rate_now(), epoch + 1, metrics))
        return metrics

    def _rate_now(self) -> float:
        return float(self.optimiser.param_groups[0]["lr"])
