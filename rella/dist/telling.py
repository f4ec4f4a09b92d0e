"""What a training says on its way: bar, validations, and every step's numbers for the trackers on the driver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rella.artifacts import Artifact, Json
from rella.config import Experiment, leaves
from rella.dist.remote_progress import ProgressHandle
from rella.tracking import Follower, TrackedRun, check_trackers

if TYPE_CHECKING:
    from rella.lm.checkpoints import Course
    from rella.lm.tuning import Progress

VALID = ("auc", "log_loss", "accuracy")


class Followed(Protocol):
    """A run whose curves are followed."""

    @property
    def artifact(self) -> Artifact:
        """What it makes."""

    @property
    def experiment(self) -> Experiment:
        """What it runs."""


@dataclass
class Telling:
    """On one worker: a run's course to the driver; the first of the group alone speaks."""

    progress: ProgressHandle
    number: int
    """Of the run among those of its group."""
    title: str
    selected_on: str = "valid"
    _begun: bool = field(default=False, init=False)

    def __call__(self, now: Progress) -> None:
        """Tell what a step or a validation said."""
        import torch.distributed as dist

        if dist.get_rank() != 0:
            return
        valid = f", {self.selected_on} AUC {now.valid['auc']:.4f}" if now.valid else ""
        scale = f", scale {now.loss_scale:g}" if now.loss_scale != 1 else ""
        note = f"{self.title}: epoch {now.epoch}, loss {now.loss:.4f}{scale}{valid}"
        self.progress.report_at(self.number, now.rows, note)
        self._follow(now)
        if now.valid:
            self.progress.measure(now.step, now.valid)

    def _follow(self, now: Progress) -> None:
        if not self._begun:
            # Of a run that goes on from a checkpoint: what happened before, which another driver may have been told.
            self._begun = True
            for step, values in _before(now.course, now.step):
                self.progress.follow(self.number, step, values)
        if now.valid:
            values = {f"valid/{name}": now.valid[name] for name in VALID if name in now.valid}
        else:
            values = {"train/loss": now.loss, "train/learning_rate": now.learning_rate, "train/epoch": float(now.epoch)}
            if now.loss_scale != 1:
                values["train/loss_scale"] = now.loss_scale
        self.progress.follow(self.number, now.step, values)


def _before(course: Course, step: int) -> Sequence[tuple[int, Mapping[str, float]]]:
    losses = [(n, {"train/loss": loss}) for n, loss in enumerate(course.losses[: step - 1], 1)]
    valid = [
        (int(v["step"]), {f"valid/{name}": v[name] for name in VALID if name in v})
        for v in course.valid
        if v["step"] < step
    ]
    return sorted([*losses, *valid], key=lambda told: told[0])


def follower(tasks: Sequence[Followed]) -> Follower:
    """Return what takes the curves of a group's runs on the driver.

    Raises:
        MissingError: a tracker's library is not installed.
    """
    first = tasks[0]
    config, storage = first.experiment.tracking, first.artifact.storage
    check_trackers(config)
    if config.folder != "auto":
        folder = Path(config.folder).expanduser()
    elif storage.is_local:
        folder = Path(storage.absolute("tensorboard"))
    else:
        folder = Path("~/rella/tensorboard").expanduser()
    runs = [TrackedRun(t.artifact.path, _felt(t.experiment, t.artifact.stage)) for t in tasks]
    return Follower(config, folder, runs)


def _felt(experiment: Experiment, stage: str) -> dict[str, Json]:
    return {name: value for name, value, stages in leaves(experiment) if stage in stages}
