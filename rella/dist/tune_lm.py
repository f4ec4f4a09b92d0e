"""The ReiT stage (§3.3) on Ray Train and DeepSpeed: every run of a job in one group of workers.

A worker that dies takes its group with it; the next group goes on from the last checkpoint. Each run leaves a result
file that vouches for its adapter, so neither the next group nor the next driver trains a finished run again.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ray

from rella.artifacts import Artifact, Json, Part, digest
from rella.config import Experiment
from rella.dist.dataset import Shared
from rella.dist.group import guarded, launch, setup_process
from rella.dist.material import Material, make_material
from rella.dist.remote_progress import ProgressHandle, RemoteProgress
from rella.dist.score import ADAPTER
from rella.dist.session import Resources
from rella.dist.telling import Telling, follower
from rella.errors import ArtifactError
from rella.models import BASE_FILE, ModelIdentity
from rella.wording import Wording

if TYPE_CHECKING:
    from rella.lm.tuning import TuneResult
    from rella.lm.validation import Validation

RESULT = "result.json"
"""What a finished run leaves for the driver: its parts and facts. It comes after the adapter, and vouches for it."""


@dataclass(frozen=True)
class TuneTask:
    """One adapter to train."""

    artifact: Artifact
    experiment: Experiment
    shared: Shared
    wording: Wording
    title: str

    def outcome(self) -> tuple[list[Part], dict[str, Json]] | None:
        """Return parts and facts where the run has finished and its adapter is whole, else None."""
        return finished_run(self.artifact)


def finished_run(artifact: Artifact) -> tuple[list[Part], dict[str, Json]] | None:
    """Return parts and facts of a run whose result file is there, right, and vouches for whole files, else None."""
    file = f"{artifact.path}/{RESULT}"
    if not artifact.storage.exists(file):
        return None
    try:
        body = json.loads(artifact.storage.read(file))
        seal = body.pop("seal")
    except (ValueError, KeyError, AttributeError):
        return None
    if seal != digest(body) or body["key"] != artifact.key:
        return None
    parts = [Part(**p) for p in body["parts"]]
    try:
        for part in parts:
            artifact.checked(part)
    except ArtifactError:
        return None
    return parts, body["facts"]


class Fit(Protocol):
    """Something that a group of workers trains."""

    @property
    def artifact(self) -> Artifact:
        """Where it goes."""

    def outcome(self) -> tuple[list[Part], dict[str, Json]] | None:
        """Return parts and facts where it is finished and whole, else None."""


def outcomes(fits: Sequence[Fit]) -> list[tuple[list[Part], dict[str, Json]]]:
    """Return (parts, facts) of every finished fit.

    Raises:
        ArtifactError: one of them is not whole.
    """
    found = [fit.outcome() for fit in fits]
    for fit, outcome in zip(fits, found, strict=True):
        if outcome is None:
            raise ArtifactError(f"{fit.artifact.where()} is not whole: start the same command again")
    return [outcome for outcome in found if outcome is not None]


def write_result(artifact: Artifact, parts: Sequence[Part], facts: Mapping[str, Json]) -> None:
    """Write the file that vouches for a finished run; everything else has been written before."""
    body = {"key": artifact.key, "facts": dict(facts), "parts": [asdict(p) for p in parts]}
    artifact.write_file(RESULT, json.dumps({**body, "seal": digest(body)}).encode())


def _train(config: dict[str, Any]) -> None:
    """What every worker of the group runs: one run after another, the base loaded once."""
    guarded(config["progress"], lambda: _train_all(config))


def _train_all(config: dict[str, Any]) -> None:
    setup_process(config["cpus"])
    from rella.lm.loading import load_tokenizer

    model: ModelIdentity = config["model"]
    tokenizer, base = load_tokenizer(model), None
    everything = zip(config["tasks"], config["materials"], config["settings"], strict=True)
    for number, (task, material, settings) in enumerate(everything):
        rows = ray.get(material)
        if task.outcome() is None:
            run = _Run(task, rows, model, tokenizer, config["progress"], number, settings)
            base = run.make(base)
        elif rows is not None:
            config["progress"].end_at(number, _epochs(task.experiment) * rows.facts["rows"])


@dataclass
class _Run:
    """One adapter's training, on one worker of the group."""

    task: TuneTask
    material: Material
    model: ModelIdentity
    tokenizer: Any
    progress: ProgressHandle
    number: int
    settings: Mapping[str, Any]
    """More of DeepSpeed's."""

    def make(self, base: Any) -> Any:  # noqa: ANN401 - transformers is untyped here
        """Train the adapter on `base` (loaded where it is None) and write it; return the base without it, if whole."""
        import torch
        import torch.distributed as dist

        from rella.lm.checkpoints import Checkpoints
        from rella.lm.loading import best_device, load_base
        from rella.lm.lora import add_lora
        from rella.lm.tuning import Tuner

        e, sharded, started = self.task.experiment, self.task.experiment.tune.zero_stage == 3, time.monotonic()
        if base is None:
            # Stage 3 shards the base from the host's memory, since no single card may hold it.
            device = torch.device("cpu") if sharded else best_device()
            base = load_base(self.model, e.precision, device, quantize=e.quantize)
        tuned = add_lora(base, e.tune, e.seed)
        states, pad = Checkpoints(self.task.artifact), self.tokenizer.pad_token_id
        if dist.get_rank() == 0:
            self.task.artifact.storage.check_space(states.space(tuned), f"checkpoints of {self.task.title}")
        rows, validation = self.material.rows, self._validation(pad)
        told = Telling(self.progress, self.number, self.task.title)
        tuner = Tuner(tuned, rows, e.tune, e.precision, pad, e.seed, validation, told, states, self.settings)
        result = tuner.run()
        if dist.get_rank() == 0:
            self._write(tuned, result, time.monotonic() - started)
            states.clear()
        dist.barrier()
        if sharded:
            return None
        return tuned.unload()

    def _validation(self, pad: int) -> Validation:
        from rella.lm.passes import TokenBudget
        from rella.lm.reading import Reader
        from rella.lm.validation import Validation

        e = self.task.experiment
        pair = Reader(self.tokenizer, self.model, e.prompt, self.task.wording).answers().pair
        budget = TokenBudget(e.score.batch_tokens, "validation", "--score.batch-tokens", self.progress.say)
        return Validation(self.material.valid, self.material.valid_label, pair, pad, budget)

    def _write(self, tuned: Any, result: TuneResult, seconds: float) -> None:  # noqa: ANN401
        """Write the best step's adapter as a plain PEFT folder, and what was measured beside it."""
        import torch.distributed as dist

        from rella.lm.loading import describe_base

        artifact, course = self.task.artifact, result.course
        with tempfile.TemporaryDirectory() as folder:
            tuned.peft_config["default"].base_model_name_or_path = (
                self.model.source if self.model.revision else self.model.name
            )
            best = {name.removeprefix("model."): tensor for name, tensor in result.best.items()}
            tuned.save_pretrained(folder, safe_serialization=True, state_dict=best)
            parts = [
                artifact.write_file(f"{ADAPTER}/{f.name}", f.read_bytes())
                for f in sorted(Path(folder).iterdir())
                if f.name != "README.md"
            ]
        parts.append(artifact.write_file(f"{ADAPTER}/{BASE_FILE}", describe_base(self.model)))
        steps_per_epoch = -(-len(self.material.rows) // self.task.experiment.tune.batch_size)
        resumed = course.resumed_at[-1] if course.resumed_at else 0
        trained = len(self.material.rows) * (course.steps - resumed) / steps_per_epoch
        facts = self.material.facts | {
            "best_epoch": -(-course.best_step // steps_per_epoch),
            "best_step": course.best_step,
            "steps": course.steps,
            "epochs": round(course.steps / steps_per_epoch, 3),
            "valid": course.valid,
            "losses": [round(x, 6) for x in course.losses],
            "resumed_at": course.resumed_at,
            "workers": dist.get_world_size(),
            "seconds_training": round(seconds, 3),
            "rows_per_second": round(trained / seconds, 3),
        }
        write_result(artifact, parts, facts)


def tune(
    tasks: Sequence[TuneTask], model: ModelIdentity, resources: Resources, say: Callable[[str], None]
) -> list[tuple[list[Part], dict[str, Json]]]:
    """Train every task's adapter in one worker group; return (parts, facts) by task.

    Raises:
        RellaError: training failed; carries the first worker's error.
    """
    left = [t for t in tasks if t.outcome() is None]
    if left:
        _tune(left, model, resources, say)
    return outcomes(tasks)


def _tune(tasks: Sequence[TuneTask], model: ModelIdentity, resources: Resources, say: Callable[[str], None]) -> None:
    from rella.lm.zero_settings import read_settings

    made = [make_material.remote(t.shared, t.experiment, t.wording, model) for t in tasks]
    materials, facts = [m for m, _ in made], ray.get([f for _, f in made])
    for task, found in zip(tasks, facts, strict=True):
        say(
            f"{'reit':<9} {task.title}: {found['rows']:,} rows of {found['shots']:,} samples, "
            f"{found['identical_twins']:.1%} of them with twins that are identical (histories of at most K)"
        )
    total = sum(_epochs(t.experiment) * found["rows"] for t, found in zip(tasks, facts, strict=True))
    with RemoteProgress("tune", total, "rows", follower(tasks)) as progress:
        config = {
            "tasks": list(tasks),
            "materials": materials,
            # Read here: the workers may not see the file.
            "settings": [read_settings(t.experiment.tune, t.experiment.precision) for t in tasks],
            "model": model,
            "cpus": resources.cpus,
            "progress": progress.handle,
        }
        launch(_train, config, tasks[0].artifact, tasks[0].experiment, resources)


def _epochs(experiment: Experiment) -> int:
    return min(experiment.tune.max_epochs, experiment.tune.stop_after or experiment.tune.max_epochs)
