"""What a training says on its way: bar, validations, and every step's numbers for the trackers on the driver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rella.artifacts import Artifact, Json
from rella.config import Experiment, leaves
from rella.dist.remote_progress import ProgressHandle
from rella.tracking import Follower, TrackedRun, check_trackers

if TYPE_CHECKING:
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
    _steps: int = field(default=0, init=False)
    _valid: int = field(default=0, init=False)

    def __call__(self, now: Progress) -> None:
        """Tell what a step or a validation said."""
        import torch.distributed as dist

        if dist.get_rank() != 0:
            return
        valid = f", {self.selected_on} AUC {now.valid['auc']:.4f}" if now.valid else ""
        scale = f", scale {now.loss_scale:g}" if now.loss_scale != 1 else ""
        note = f"{self.title}: epoch {now.epoch}, loss {now.loss:.4f}{scale}{valid}"
        resumed = now.course.resumed_at[-1] if now.course.resumed_at else 0
        self.progress.report_at(self.number, now.rows, note, found=now.rows * resumed // max(1, now.step))
        self._follow(now)
        if now.valid:
            self.progress.measure(now.step, now.valid)

    def _follow(self, now: Progress) -> None:
        """Send what has happened since the last call: not every step is reported, and a run may go on from before."""
        told: list[tuple[int, dict[str, float]]] = []
        losses, valid = now.course.losses, now.course.valid
        told += [(n, {"train/loss": losses[n - 1]}) for n in range(self._steps + 1, now.step + 1)]
        told += [(int(v["step"]), {f"valid/{m}": v[m] for m in VALID if m in v}) for v in valid[self._valid :]]
        self._steps, self._valid = now.step, len(valid)
        values = {"train/learning_rate": now.learning_rate, "train/epoch": float(now.epoch)}
        if now.loss_scale != 1:
            values["train/loss_scale"] = now.loss_scale
        told.append((now.step, values))
        self.progress.follow(self.number, sorted(told, key=lambda record: record[0]))


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
