"""Runs a plan of tuning runs in one process of a group; a test starts as many of these as the group has workers.

Arguments: model folder, storage, meeting file, rank, number of workers, plan (JSON: name → options), answers.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import warnings
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rella.artifacts import Artifact
from rella.config import TuneConfig
from rella.lm.checkpoints import Checkpoints
from rella.lm.encoding import pad_right
from rella.lm.loading import load_base
from rella.lm.lora import add_lora
from rella.lm.tuning import Progress, Row, Tuner, epoch_order
from rella.lm.validation import Validation
from rella.lm.zero_settings import read_settings
from rella.models import identify
from rella.storage import Storage

SETTING = {"learning_rate": 0.02, "batch_size": 16, "max_epochs": 4, "lora_dropout": 0.0, "micro_batch_rows": 16}
PAIR = (311, 310)


class Killed(Exception):
    """Stands for what ends a process in the middle of its work."""


def make_row(n: int, rng: np.random.Generator) -> Row:
    """The last token of the prompt tells the answer; lengths of prompts and of answers differ."""
    label = n % 2
    prompt = [*rng.integers(3, 200, rng.integers(3, 60)), 300 + label]
    return Row(np.array(prompt, np.int32), (310, 312) if label else (311,))


RNG = np.random.default_rng(0)
ROWS = [make_row(n, RNG) for n in range(37)]
VALID = [make_row(n, RNG).prompt for n in range(23)]
LABEL = np.array([(n + 1) % 2 for n in range(23)], np.int8)


def plain_loop(base: Any, rows: list[Row], batch_size: int, epochs: int, rate: float) -> list[float]:
    """Full logits, one row at a time, torch alone: no DeepSpeed, no batches, no padding."""
    tuned = add_lora(base, TuneConfig(lora_dropout=0.0), 0)
    weights = [p for p in tuned.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    steps, losses = math.ceil(len(rows) / batch_size), []
    for epoch in range(epochs):
        order = epoch_order(len(rows), 0, epoch)
        for step in range(steps):
            batch = [rows[i] for i in order[step * batch_size : (step + 1) * batch_size]]
            optimiser.param_groups[0]["lr"] = rate * (1 - (epoch * steps + step) / (steps * epochs))
            total = torch.zeros(())
            for row in batch:
                ids = torch.tensor([[*row.prompt.tolist(), *row.answer]])
                first = len(row.prompt) - 1
                logits = tuned(input_ids=ids).logits[0, first : first + len(row.answer)]
                total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(row.answer), reduction="sum")
            loss = total / sum(len(row.answer) for row in batch)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            losses.append(float(loss))
    return losses


def digest_of(tensors: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    return {name: tensor.double().flatten().tolist() for name, tensor in tensors.items()}


class Case:
    """One tuning run and what is to be known of it."""

    def __init__(self, folder: str, storage: Storage, options: dict[str, Any]) -> None:
        own = {k: options.pop(k) for k in ("rows", "aucs", "seed", "die_at", "at", "precision") if k in options}
        self.precision = own.get("precision", "float32")
        self.base = load_base(identify(folder), self.precision, torch.device("cpu"))
        self.frozen = {n: p.clone() for n, p in self.base.state_dict().items()}
        self.aucs, self.seed, self.die_at = own.get("aucs"), own.get("seed", 0), own.get("die_at")
        self.config = TuneConfig(**{**SETTING, **options})
        self.rows = ROWS[: own.get("rows", len(ROWS))]
        place = Artifact(storage, f"curves/{own['at']}", own["at"].ljust(64, "0")) if "at" in own else None
        self.states = None if place is None else Checkpoints(place)
        self.told: list[Progress] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.modes: list[bool] = []

    def validate(self, root: torch.nn.Module) -> dict[str, float]:
        self.weights.append(self.tuner.engine.weights())
        self.modes.append(root.training)
        if self.aucs is not None:
            return {"auc": self.aucs[len(self.weights) - 1]}
        return Validation(VALID, LABEL, PAIR, 2, 200)(root)

    def tell(self, now: Progress) -> None:
        self.told.append(now)
        if now.step == self.die_at and now.valid is None:
            raise Killed

    def run(self) -> dict[str, Any]:
        tuned = add_lora(self.base, self.config, self.seed)
        start = {f"model.{n}": p.detach().clone() for n, p in tuned.named_parameters() if p.requires_grad}
        self.tuner = Tuner(
            tuned,
            self.rows,
            self.config,
            self.precision,
            2,
            self.seed,
            self.validate,
            self.tell,
            self.states,
            read_settings(self.config, self.precision),
        )
        try:
            result = self.tuner.run()
        except Killed:
            self.tuner.engine.destroy()
            return {"killed": True}
        course = result.course
        epochs = [start, *self.weights]
        found: dict[str, Any] = {
            "losses": course.losses,
            "rows": course.rows,
            "valid": course.valid,
            "best": course.best_step,
            "best_weights": digest_of(result.best),
            "resumed_at": course.resumed_at,
            "kept": [all(torch.equal(result.best[n], e[n]) for n in e) for e in epochs],
            "moved": {n: float((self.weights[-1][n] - p).abs().max()) for n, p in start.items()},
            "rates": [p.learning_rate for p in self.told if p.valid is None],
            "progress": [[p.rows, p.total_rows, p.epoch, p.step, p.valid is not None] for p in self.told],
            "training_while_validated": self.modes,
            "passes": self.tuner.passes,
        }
        if self.config.zero_stage < 3:
            back = tuned.unload().state_dict()
            found["frozen"] = all(torch.equal(back[n], p) for n, p in self.frozen.items())
            found["frozen"] = found["frozen"] and back.keys() == self.frozen.keys()
        else:
            found["frozen"] = self.frozen_when_sharded(tuned)
        return found

    def frozen_when_sharded(self, tuned: Any) -> bool:
        from deepspeed.runtime.zero import GatheredParameters

        names = {n.replace(".base_layer", "").removeprefix("base_model.model."): p for n, p in tuned.named_parameters()}
        held = {n: p for n, p in names.items() if n in self.frozen}
        with GatheredParameters(list(held.values())):
            same = [torch.equal(p.data, self.frozen[n]) for n, p in held.items()]
        return all(same) and len(held) >= len({p.data_ptr() for p in self.frozen.values()})


def one_by_one(folder: str) -> dict[str, Any]:
    """Metrics of the untuned model on the validation rows, from full logits, one prompt at a time."""
    from rella.metrics import evaluate

    base = load_base(identify(folder), "float32", torch.device("cpu"))
    odds = []
    for prompt in VALID:
        ids, _ = pad_right([prompt], 2, torch.device("cpu"))
        with torch.no_grad():
            logits = base(input_ids=ids).logits[0, -1, list(PAIR)].double()
        odds.append(float(torch.softmax(logits, 0)[0]))
    found = evaluate(LABEL, np.array(odds))
    return {"auc": found.auc, "log_loss": found.log_loss, "accuracy": found.accuracy}


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    folder, storage, meeting, rank, world, plan, out = sys.argv[1:]
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=int(world))
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    answers: dict[str, Any] = {}
    for name, options in json.loads(plan).items():
        if options.get("plain"):
            base = load_base(identify(folder), "float32", torch.device("cpu"))
            answers[name] = plain_loop(base, ROWS[: options["rows"]], 16, options["epochs"], 0.02)
        elif options.get("one_by_one"):
            answers[name] = one_by_one(folder)
        else:
            answers[name] = Case(folder, Storage(storage), options).run()
    if rank == "0":
        with open(out, "w") as file:
            json.dump(answers, file)
    dist.barrier()


if __name__ == "__main__":
    main()
