"""The ReiT stage (§3.3) on Ray Train and DeepSpeed: every run of a job in one group of workers."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from rella.artifacts import Artifact, Json, Part
from rella.config import Experiment
from rella.data.fewshot import training_rows, twins_identical
from rella.data.questions import questions
from rella.data.selection import Chosen, SubsetRule, choose, split_ids, split_subset
from rella.data.tables import Tables
from rella.dist.dataset import Shared, catalogue_of
from rella.dist.score import ADAPTER
from rella.dist.session import RemoteProgress, Resources, root_cause
from rella.errors import InputError
from rella.models import BASE_FILE, ModelIdentity
from rella.wording import Wording


@dataclass(frozen=True)
class TuneTask:
    """One adapter to train."""

    artifact: Artifact
    experiment: Experiment
    shared: Shared
    wording: Wording
    title: str


@dataclass(frozen=True)
class Material:
    """The tokenised rows of one run: training set and validation set."""

    rows: list[Any]
    """`rella.lm.tuning.Row`s."""
    valid: list[np.ndarray]
    """Prompts, int32 ids."""
    valid_label: np.ndarray
    facts: dict[str, Json]


@ray.remote(num_cpus=1, num_returns=2)
def _material(
    shared: Shared, experiment: Experiment, wording: Wording, model: ModelIdentity
) -> tuple[Material, dict[str, Json]]:
    """Word and tokenise a run's rows once for all workers; return them and, for the driver, only what there is."""
    from rella.lm.loading import load_tokenizer
    from rella.lm.reading import Reader
    from rella.lm.tuning import Row

    e, tables, neighbours = experiment, shared.fetch_tables(), shared.fetch_neighbours()
    reader = Reader(load_tokenizer(model), model, e.prompt, wording)
    catalogue, encoder = catalogue_of(tables, wording, reader.display), reader.encoder()
    answers = {label: reader.trained(label) for label in (0, 1)}
    shots = choose(tables.samples, split_subset(tables.samples, "train", e.shots, SubsetRule.of(e)))
    check_labels(shots, "few-shot samples", "raise --shots or change --data.seed")
    valid = validation_samples(tables, e)
    check_labels(valid, f"samples that choose the epoch ({e.tune.select_on})", "raise --tune.valid-rows")
    twins: dict[bool, list[Any]] = {}
    ids, flags = training_rows(shots.sample_id, e.mix)
    for flag in sorted(set(flags.tolist())):
        asked = questions(catalogue, shots, "retrieved" if flag else "recent", neighbours, e.k)
        twins[flag] = [
            Row(prompt, answers[int(label)]) for prompt, label in zip(encoder.encode(asked), shots.label, strict=True)
        ]
    rows = [
        twins[flag][place] for place, flag in zip(np.searchsorted(shots.sample_id, ids), flags.tolist(), strict=True)
    ]
    prompts = encoder.encode(questions(catalogue, valid, e.history, neighbours, e.k))
    facts = {
        "shots": len(shots),
        "rows": len(rows),
        "positives": int(shots.label.sum()),
        "identical_twins": round(twins_identical(shots.end, e.k), 6),
        "tokens": sum(r.tokens for r in rows),
        "truncated_prompts": encoder.truncated,
        "dropped_behaviours": encoder.dropped,
        "valid_rows": len(valid),
        "selected_on": e.tune.select_on,
    }
    return Material(rows, prompts, valid.label.astype(np.int8), facts), facts


def check_labels(samples: Chosen, what: str, remedy: str) -> None:
    """Verify that samples are labelled and of both classes.

    Raises:
        InputError: none, unlabelled ones, or all labels equal; says what to do.
    """
    if not len(samples):
        raise InputError(f"there are no {what}: give the split a share with --data.split")
    unlabelled = int(np.isnan(samples.label).sum())
    if unlabelled:
        raise InputError(f"{unlabelled} of the {len(samples)} {what} have no label")
    if samples.label.min() == samples.label.max():
        raise InputError(f"all {len(samples)} {what} have the label {int(samples.label[0])}: {remedy}")


def validation_samples(tables: Tables, experiment: Experiment) -> Chosen:
    """Return the seeded samples that choose the epoch, at most `tune.valid_rows` of the split `tune.select_on`."""
    e = experiment
    there = len(split_ids(tables.samples, e.tune.select_on))
    wanted = min(int(e.tune.valid_rows), there)
    return choose(
        tables.samples,
        split_subset(tables.samples, e.tune.select_on, wanted, SubsetRule.of(e)) if wanted else np.zeros(0, np.int64),
    )


def _setup_process(cpus: int) -> None:
    """Make DeepSpeed quiet and keep it from compiling on this worker."""
    import logging
    import warnings

    import torch

    torch.set_num_threads(cpus)
    warnings.filterwarnings("ignore")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On CPUs DeepSpeed would compile a shared-memory all-reduce for a minute; gloo moves a few MB of LoRA just as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _train(config: dict[str, Any]) -> None:
    """What every worker of the group runs: one run after another, the base loaded once."""
    _setup_process(config["cpus"])
    from rella.lm.loading import best_device, load_base, load_tokenizer

    model: ModelIdentity = config["model"]
    tasks: Sequence[TuneTask] = config["tasks"]
    base = load_base(model, tasks[0].experiment.precision, best_device())
    pad = load_tokenizer(model).pad_token_id
    for task, material in zip(tasks, config["materials"], strict=True):
        base = _run_task(task, ray.get(material), base, pad, model, config["progress"])
    ray.train.report({"runs": len(tasks)})


def _run_task(task: TuneTask, material: Material, base: Any, pad: int, model: ModelIdentity, progress: Any) -> Any:  # noqa: ANN401
    """Train one adapter and write it; return the base without it."""
    import torch.distributed as dist

    from rella.lm.lora import add_lora
    from rella.lm.tuning import Progress, Tuner

    e, rank, started, trained = task.experiment, dist.get_rank(), time.monotonic(), 0

    def tell(now: Progress) -> None:
        nonlocal trained
        valid = f", valid AUC {now.valid['auc']:.4f}" if now.valid else ""
        if rank == 0:
            progress.report(now.rows - trained, f"{task.title}: epoch {now.epoch}, loss {now.loss:.4f}{valid}")
        trained = now.rows

    if e.tune.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tuned = add_lora(base, e.tune, e.seed)
    tuner = Tuner(tuned, material.rows, e.tune, e.precision, pad, e.seed, _validator(task, material, model, pad), tell)
    result = tuner.run()
    if rank == 0:
        seconds = time.monotonic() - started
        facts = material.facts | {
            "best_epoch": result.best_epoch,
            "epochs": len(result.valid),
            "valid": result.valid,
            "losses": [round(x, 6) for x in result.losses],
            "workers": dist.get_world_size(),
            "seconds_training": round(seconds, 3),
            "rows_per_second": round(result.rows / seconds, 3),
        }
        _write_adapter(task.artifact, tuned, model, facts)
    dist.barrier()
    base = tuned.unload()
    base.gradient_checkpointing_disable()
    return base


def _validator(task: TuneTask, material: Material, model: ModelIdentity, pad: int) -> Any:  # noqa: ANN401
    """Return the function that scores the validation rows over all workers; metrics are of all rows at once."""
    import torch.distributed as dist

    from rella.lm.loading import load_tokenizer
    from rella.lm.reading import Reader
    from rella.lm.scoring import answer_logits, probabilities
    from rella.metrics import evaluate

    pair = Reader(load_tokenizer(model), model, task.experiment.prompt, task.wording).answers().pair
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = list(range(rank, len(material.valid), world))

    def validate(tuned: Any) -> dict[str, float]:  # noqa: ANN401
        budget = task.experiment.score.batch_tokens
        logits = answer_logits(tuned, [material.valid[i] for i in mine], pair, pad, budget)
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, (mine, logits))
        whole = np.empty((len(material.valid), 2), dtype=np.float32)
        for places, values in gathered:
            whole[places] = values
        metrics = evaluate(material.valid_label, probabilities(whole))
        return {"auc": metrics.auc, "log_loss": metrics.log_loss, "accuracy": metrics.accuracy}

    return validate


def _write_adapter(artifact: Artifact, tuned: Any, model: ModelIdentity, facts: dict[str, Json]) -> list[Part]:  # noqa: ANN401
    """Write the adapter as a plain PEFT folder, and what was measured beside it."""
    import json

    from rella.lm.loading import describe_base

    with tempfile.TemporaryDirectory() as folder:
        tuned.peft_config["default"].base_model_name_or_path = model.source if model.revision else model.name
        tuned.save_pretrained(folder, safe_serialization=True)
        parts = [
            artifact.write_file(f"{ADAPTER}/{f.name}", f.read_bytes())
            for f in sorted(Path(folder).iterdir())
            if f.name != "README.md"
        ]
    parts.append(artifact.write_file(f"{ADAPTER}/{BASE_FILE}", describe_base(model)))
    # Read by the driver, which writes the manifest; last, so that it vouches for the rest.
    artifact.write_file("result.json", json.dumps({"facts": facts, "parts": [asdict(p) for p in parts]}).encode())
    return parts


def tune(
    tasks: Sequence[TuneTask], model: ModelIdentity, resources: Resources, say: Callable[[str], None]
) -> list[tuple[list[Part], dict[str, Json]]]:
    """Train every task's adapter in one worker group; return (parts, facts) by task.

    Raises:
        RuntimeError: training failed; carries the first worker's error.
    """
    import json

    made = [_material.remote(t.shared, t.experiment, t.wording, model) for t in tasks]
    materials, facts = [m for m, _ in made], ray.get([f for _, f in made])
    for task, found in zip(tasks, facts, strict=True):
        say(
            f"{'reit':<9} {task.title}: {found['rows']:,} rows of {found['shots']:,} samples, "
            f"{found['identical_twins']:.1%} of them with twins that are identical (histories of at most K)"
        )
    total = sum(_epochs(t.experiment) * found["rows"] for t, found in zip(tasks, facts, strict=True))
    with RemoteProgress("tune", total, "rows") as progress:
        config = {
            "tasks": list(tasks),
            "materials": materials,
            "model": model,
            "cpus": resources.cpus,
            "progress": progress.handle,
        }
        _launch(config, tasks[0].artifact, resources)
    outcomes = []
    for task in tasks:
        body = json.loads(task.artifact.storage.read(f"{task.artifact.path}/result.json"))
        outcomes.append(([Part(**p) for p in body["parts"]], body["facts"]))
        task.artifact.storage.delete(f"{task.artifact.path}/result.json")
    return outcomes


def _epochs(experiment: Experiment) -> int:
    return min(experiment.tune.max_epochs, experiment.tune.stop_after or experiment.tune.max_epochs)


def _launch(config: dict[str, Any], first: Artifact, resources: Resources) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    # Ray Train's own bookkeeping, on the storage because every node must see it; what counts goes into the artifacts.
    storage, name = first.storage, f"{Path(first.path).name}-{time.time_ns()}"
    trainer = TorchTrainer(
        _train,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=bool(resources.gpus),
            resources_per_worker=resources.per_worker(),
        ),
        run_config=RunConfig(name=name, storage_path=storage.where(".ray")),
    )
    try:
        trainer.fit()
    except Exception as error:
        cause = root_cause(error)
        raise RuntimeError(f"training failed: {type(cause).__name__}: {cause}") from cause
    storage.delete(f".ray/{name}")
