"""The ways that `benchmarks/tuning.py` compares: ours in its modes, and HF's and trl's trainers on the same rows."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks import lm_bench
from benchmarks.lm_bench import Machine, timed
from rella.config import TuneConfig
from rella.lm.lora import add_lora
from rella.lm.tuning import AnswerModel, Progress, Row, Tuner, epoch_order
from rella.lm.zero import OptimiserState

MICRO_ROWS = 4
"""Published for K from 16 to 40."""
SEED = 0


@dataclass(frozen=True)
class Work:
    """What one run of a way trains on."""

    rows: Sequence[Row]
    batch: int
    micro_tokens: int
    """Ours: tokens of a pass."""
    dropout: float = 0.05
    micro_rows: int = MICRO_ROWS
    """The others': rows of a pass."""

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return len(self.rows) // self.batch

    @property
    def ordered(self) -> list[Row]:
        """The rows in the order in which ours visits them."""
        return [self.rows[i] for i in epoch_order(len(self.rows), SEED, 0)]

    def config(self, **changes: Any) -> TuneConfig:  # noqa: ANN401 - fields of TuneConfig
        """Return the settings that all ways share, and ours."""
        shared = TuneConfig(
            batch_size=self.batch,
            max_epochs=1,
            lora_dropout=self.dropout,
            micro_batch_rows=10**6,
            micro_batch_tokens=self.micro_tokens,
        )
        return replace(shared, **changes)


@dataclass
class Run:
    """What one run of a way gave."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of each optimiser step."""
    cpu: list[float] = field(default_factory=list)
    """The process's CPU seconds: what a machine that others use too slows down less."""


Way = Callable[[Machine, Work], Run]


# --- ours -----------------------------------------------------------------------------------------------------------


class TimedTuner(Tuner):
    """Times its steps."""

    def _step(self, course: Any) -> bool:  # noqa: ANN401
        if not hasattr(self, "run_"):
            self.run_ = Run()
        before = time.process_time()
        seconds, due = timed(lambda: super(TimedTuner, self)._step(course), self.device)
        self.run_.seconds.append(seconds)
        self.run_.cpu.append(time.process_time() - before)
        return due


class PlainEngine:
    """AdamW alone in place of DeepSpeed, on one card: what DeepSpeed costs is the difference."""

    loss_scale = 1.0

    def __init__(self, root: AnswerModel, config: TuneConfig, dtype: torch.dtype) -> None:
        self.root, self.clip, self.engine = root, config.clip, root
        self.trained = {n: p for n, p in root.named_parameters() if p.requires_grad}
        for parameter in self.trained.values():
            parameter.data = parameter.data.to(dtype)
        self.device = next(iter(self.trained.values())).device
        self.optimiser = torch.optim.AdamW(self.trained.values(), weight_decay=config.weight_decay)

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the next step."""
        self.optimiser.param_groups[0]["lr"] = rate

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add gradients; after the last pass take the step."""
        loss.backward()
        if last:
            torch.nn.utils.clip_grad_norm_(self.trained.values(), self.clip)
            self.optimiser.step()
            self.optimiser.zero_grad()

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the trained weights on the CPU."""
        return {n: p.detach().to("cpu", copy=True) for n, p in self.trained.items()}

    def destroy(self) -> None:
        """Nothing to take off."""


class PlainTuner(TimedTuner):
    """Ours without DeepSpeed."""

    def _make_engine(self, root: AnswerModel, state: OptimiserState | None) -> Any:  # noqa: ANN401
        return PlainEngine(root, self.config, self.model.dtype)


def ours(kind: type[TimedTuner] = TimedTuner, **changes: Any) -> Way:  # noqa: ANN401 - fields of TuneConfig
    """Return our way, with other settings."""

    def way(on: Machine, work: Work) -> Run:
        config = work.config(**changes)
        tuned = add_lora(on.model, config, SEED)
        precision: Any = str(on.dtype).removeprefix("torch.")
        quiet: Callable[[Progress], None] = lambda progress: None  # noqa: E731
        tuner = kind(tuned, work.rows, config, precision, 0, SEED, lambda root: {"auc": 0.5}, quiet)
        try:
            with _of_a_group():
                result = tuner.run()
        finally:
            tuned.unload()
            on.model.requires_grad_(False)
        return replace(tuner.run_, losses=result.course.losses)

    return way


@contextmanager
def _of_a_group() -> Iterator[None]:
    """What DeepSpeed reads, and would make HF's trainers wrap their models for several processes."""
    names, before = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"), dict(os.environ)
    os.environ["LOCAL_RANK"] = "0"
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update({name: before[name] for name in names if name in before})


# --- theirs ---------------------------------------------------------------------------------------------------------


def _arguments(on: Machine, work: Work, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": work.micro_rows,
        "gradient_accumulation_steps": work.batch // work.micro_rows,
        "max_steps": work.steps,
        "learning_rate": TuneConfig().learning_rate,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not on.gpu,
        "seed": SEED,
    }


def _callback(on: Machine, run: Run) -> Any:  # noqa: ANN401 - a TrainerCallback
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
            lm_bench.synchronise(on.device)
            self.started, self.cpu = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
            lm_bench.synchronise(on.device)
            run.seconds.append(time.perf_counter() - self.started)
            run.cpu.append(time.process_time() - self.cpu)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ANN401
            if logs and "loss" in logs:
                run.losses.append(float(logs["loss"]))

    return Steps()


def _in_order(kind: type) -> type:
    """Return the trainer, reading rows as they come."""

    def sampler(self: Any, *_: Any) -> Any:  # noqa: ANN401
        return torch.utils.data.SequentialSampler(self.train_dataset)

    return type(f"Ordered{kind.__name__}", (kind,), {"_get_train_sampler": sampler})


def _trained(trainer: Any, run: Run) -> Run:  # noqa: ANN401
    # Without its own callbacks, which print every log line.
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return run


def _labelled(work: Work) -> list[dict[str, list[int]]]:
    return [
        {
            "input_ids": [*r.prompt.tolist(), *r.answer],
            "labels": [-100] * len(r.prompt) + list(r.answer),
            "attention_mask": [1] * r.tokens,
        }
        for r in work.ordered
    ]


def authors(on: Machine, work: Work) -> Run:
    """(a)."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    run = Run()
    with tempfile.TemporaryDirectory() as folder, _adapted(on, work) as tuned:
        tuned.enable_input_require_grads()
        published = replace(work, micro_rows=MICRO_ROWS)
        arguments = TrainingArguments(**_arguments(on, published, folder), gradient_checkpointing=True)
        trainer = _in_order(Trainer)(
            model=tuned,
            args=arguments,
            train_dataset=_labelled(work),
            data_collator=DataCollatorForSeq2Seq(on.tokenizer, return_tensors="pt", padding="longest"),
            callbacks=[_callback(on, run)],
        )
        try:
            return _trained(trainer, run)
        finally:
            tuned.disable_input_require_grads()
            on.model.gradient_checkpointing_disable()


def by_hand(on: Machine, work: Work) -> Run:
    """What trl does on cards, on any device: HF `Trainer`, the head at answers' positions only, nothing recomputed."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    def compute_loss(self: Any, model: Any, inputs: Any, *_: Any, num_items_in_batch: Any = None, **__: Any) -> Any:  # noqa: ANN401
        lm, labels = model.get_base_model(), inputs.pop("labels")[:, 1:]
        states = lm.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        at = labels != -100
        logits = lm.lm_head(states[at]).float()
        return torch.nn.functional.cross_entropy(logits, labels[at], reduction="sum") / num_items_in_batch

    run = Run()
    with tempfile.TemporaryDirectory() as folder, _adapted(on, work) as tuned:
        trainer = type("ByHand", (_in_order(Trainer),), {"compute_loss": compute_loss})(
            model=tuned,
            args=TrainingArguments(**_arguments(on, work, folder), bf16=on.dtype == torch.bfloat16),
            train_dataset=_labelled(work),
            data_collator=DataCollatorForSeq2Seq(on.tokenizer, return_tensors="pt", padding="longest"),
            callbacks=[_callback(on, run)],
        )
        return _trained(trainer, run)


def engineer(grouped: bool) -> Way:
    """(b), on rows as they come or `grouped` by length."""

    def way(on: Machine, work: Work) -> Run:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        rows = [
            {
                "input_ids": [*r.prompt.tolist(), *r.answer],
                "completion_mask": [0] * len(r.prompt) + [1] * len(r.answer),
            }
            for r in work.ordered
        ]
        run = Run()
        with tempfile.TemporaryDirectory() as folder, _adapted(on, work) as tuned:
            arguments = SFTConfig(
                **_arguments(on, work, folder),
                completion_only_loss=True,
                max_length=None,
                gradient_checkpointing=False,
                bf16=on.dtype == torch.bfloat16,
                fp16=False,
                **({"train_sampling_strategy": "group_by_length"} if grouped else {}),
            )
            kind = SFTTrainer if grouped else _in_order(SFTTrainer)
            trainer = kind(
                model=tuned,
                args=arguments,
                train_dataset=Dataset.from_list(rows),
                processing_class=on.tokenizer,
                callbacks=[_callback(on, run)],
            )
            try:
                return _trained(trainer, run)
            finally:
                on.model.__dict__.pop("forward", None)

    return way


@contextmanager
def _adapted(on: Machine, work: Work) -> Iterator[Any]:
    tuned = add_lora(on.model, work.config(), SEED)
    try:
        yield tuned
    finally:
        tuned.unload()
        on.model.requires_grad_(False)


# --- all ---

WAYS: dict[str, Way] = {
    "ours": ours(),
    "packed": ours(packing=True),
    "recomputed": ours(gradient_checkpointing="full"),
    "plain": ours(PlainTuner),
    "by_hand": by_hand,
    "engineer": engineer(grouped=False),
    "engineer_grouped": engineer(grouped=True),
    "authors": authors,
}
"""In this order in every round."""
OURS = ("ours", "packed", "recomputed", "plain")
NEEDS = {
    **dict.fromkeys(OURS[:3], ("deepspeed",)),
    **dict.fromkeys(("engineer", "engineer_grouped"), ("datasets", "trl")),
}
"""Way → what has to be installed."""
