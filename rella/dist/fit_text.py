"""The stages `mlm` and `textctr` on Ray Train: the LM-based baselines (Appendix C.2), every run of a job in one group
of workers.

As in `tune_lm`: a worker that dies takes its group with it, the next group goes on from the last checkpoint, and a
result file vouches for the weights of a finished run.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from rella.artifacts import Json, Part
from rella.dist.fit_ctr import WEIGHTS
from rella.dist.group import guarded, launch
from rella.dist.remote_progress import ProgressHandle, RemoteProgress
from rella.dist.session import Resources
from rella.dist.telling import Telling, follower
from rella.dist.text_material import TextMaterial, TextTask, make_text_material
from rella.dist.tune_lm import outcomes, write_result
from rella.models import identify

if TYPE_CHECKING:
    import torch

    from rella.textctr.fit import FitResult, TextFitter
    from rella.textctr.model import TextModel
    from rella.textctr.predict import Validation

ENCODER = "encoder"
"""Folder of PTab's encoder in an `mlm` artifact: a model as the hub has them."""


def _train(config: dict[str, Any]) -> None:
    """What every worker of the group runs: one model after another."""
    import torch

    torch.set_num_threads(config["cpus"])

    def fit_all() -> None:
        for number, (task, material) in enumerate(zip(config["tasks"], config["materials"], strict=True)):
            if task.outcome() is None:
                _Run(task, ray.get(material), number, config["progress"]).make()

    guarded(config["progress"], fit_all)


@dataclass
class _Run:
    """One fit, on one worker of the group."""

    task: TextTask
    material: TextMaterial
    number: int
    progress: ProgressHandle

    def make(self) -> None:
        """Fit the model and write it."""
        import torch.distributed as dist

        from rella.lm.checkpoints import Checkpoints
        from rella.lm.loading import best_device, load_tokenizer
        from rella.lm.ranks import newest_state
        from rella.textctr.fit import TextFitter

        started, task = time.monotonic(), self.task
        rank, world = dist.get_rank(), dist.get_world_size()
        tokenizer = load_tokenizer(task.base)
        model, states = self._model(tokenizer, best_device()), Checkpoints(task.artifact)
        if rank == 0:
            task.artifact.storage.check_space(states.space(model), f"checkpoints of {task.title}")
        fitter: TextFitter[Any] = TextFitter(
            model,
            self.material.train,
            task.config,
            task.experiment.seed,
            Telling(self.progress, self.number, self.task.title, self.task.experiment.tune.select_on),
            self._validation(model, rank, world),
            states.save,
            newest_state(states, rank, world),
            rank,
            world,
        )
        fitted = fitter.run()
        if rank == 0:
            self._write(fitter, fitted, tokenizer, time.monotonic() - started)
            states.clear()
            self.progress.end_at(self.number, task.config.max_epochs * self.material.facts["rows"])
        dist.barrier()

    def _model(self, tokenizer: Any, device: torch.device) -> TextModel[Any]:  # noqa: ANN401 - transformers is untyped
        from rella.textctr.baselines import load_baseline
        from rella.textctr.ptab import load_masked_lm

        task, seed = self.task, self.task.experiment.seed
        if task.mlm:
            return load_masked_lm(task.base, tokenizer, task.config, seed, device)
        base = task.base if task.encoder is None else identify(str(task.encoder.local_folder(ENCODER)))
        return load_baseline(task.name, base, tokenizer, task.config, seed, device)

    def _validation(self, model: Any, rank: int, world: int) -> Validation[Any] | None:  # noqa: ANN401
        from rella.textctr.predict import Validation

        valid, config = self.material.valid, self.task.config
        if valid is None:
            return None
        return Validation(model, valid, config.batch_tokens, config.arithmetic, rank, world)

    def _write(self, fitter: TextFitter[Any], fitted: FitResult, tokenizer: Any, seconds: float) -> None:  # noqa: ANN401
        """Write the best step's weights, for stage A a model's folder, and what was measured beside them."""
        import torch.distributed as dist

        from rella.textctr.model import weights_to_bytes
        from rella.textctr.ptab import MaskedLm

        task, course = self.task, fitted.course
        if isinstance(fitter.model, MaskedLm):
            with tempfile.TemporaryDirectory() as folder:
                fitter.model.save(tokenizer, Path(folder))
                files = sorted(f for f in Path(folder).iterdir() if f.is_file())
                parts = [task.artifact.write_file(f"{ENCODER}/{f.name}", f.read_bytes()) for f in files]
        else:
            parts = [task.artifact.write_file(WEIGHTS, weights_to_bytes(fitted.best))]
        resumed = course.resumed_at[-1] if course.resumed_at else 0
        trained = (course.steps - resumed) * task.config.batch_size
        facts = self.material.facts | {
            "parameters": sum(p.numel() for p in fitter.model.parameters()),
            "precision": task.config.arithmetic,
            "best_step": course.best_step,
            "steps": course.steps,
            "epochs": round(course.steps / fitter.steps_per_epoch, 3),
            "valid": course.valid,
            "losses": [round(x, 6) for x in course.losses],
            "resumed_at": course.resumed_at,
            "workers": dist.get_world_size(),
            "seconds_training": round(seconds, 3),
            "rows_per_second": round(min(trained, task.config.max_epochs * self.material.facts["rows"]) / seconds, 1),
        }
        write_result(task.artifact, parts, facts)


def fit_texts(
    tasks: Sequence[TextTask], resources: Resources, say: Callable[[str], None]
) -> list[tuple[list[Part], dict[str, Json]]]:
    """Fit every task's model in one worker group; return (parts, facts) by task.

    Raises:
        RellaError: a fit failed; carries the first worker's error.
    """
    left = [t for t in tasks if t.outcome() is None]
    if left:
        _fit(left, resources, say)
    return outcomes(tasks)


def _fit(tasks: Sequence[TextTask], resources: Resources, say: Callable[[str], None]) -> None:
    # Seeds have their rows in common.
    kinds = [repr((replace(t.experiment, seed=0), t.mlm)) for t in tasks]
    made = {kind: make_text_material.remote(task) for kind, task in dict(zip(kinds, tasks, strict=True)).items()}
    materials, facts = [made[kind][0] for kind in kinds], ray.get([made[kind][1] for kind in kinds])
    for task, found in zip(tasks, facts, strict=True):
        say(
            f"{task.artifact.stage:<9} {task.title}: {found['rows']:,} of {found['rows_of']:,} rows, "
            f"{found['tokens'] / max(1, found['rows']):.0f} tokens each, {found['truncated_texts']:,} of them without "
            f"{found['dropped_behaviours']:,} of the oldest behaviours"
        )
    total = sum(t.config.max_epochs * found["rows"] for t, found in zip(tasks, facts, strict=True))
    with RemoteProgress("fit", total, "rows", follower(tasks)) as progress:
        config = {
            "tasks": list(tasks),
            "materials": materials,
            "cpus": resources.cpus,
            "progress": progress.handle,
        }
        launch(_train, config, tasks[0].artifact, tasks[0].experiment, resources)
