"""Training curves for TensorBoard, MLflow and Weights & Biases: the same numbers that checkpoints hold."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from rella.artifacts import Json
from rella.errors import MissingError

Kind = Literal["tensorboard", "mlflow", "wandb"]
PACKAGES: Mapping[Kind, str] = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
"""What each is written with."""


@dataclass(frozen=True)
class TrackingConfig:
    """Where training curves go, beside the artifacts."""

    to: tuple[Kind, ...] = ("tensorboard",)
    """`tensorboard`, `mlflow`, `wandb` (a comma list in brackets, or `[]`). The last two are configured by their own
    environment variables (MLFLOW_TRACKING_URI, WANDB_API_KEY, ...) and are installed by whoever wants them."""
    folder: str = "auto"
    """TensorBoard's, for `tensorboard --logdir`; `auto`: `tensorboard` in the storage where that is a folder, else
    `~/rella/tensorboard` on the driver's machine."""
    project: str = "rella"
    """MLflow's experiment and W&B's project."""


@dataclass(frozen=True)
class TrackedRun:
    """A training run, as a tracker names it."""

    path: str
    """Of its artifact: `<data set>/<stage>/<slug>-<12 hex>`."""
    config: Mapping[str, Json]
    """The fields that its result depends on."""

    @property
    def name(self) -> str:
        """What lists show."""
        return Path(self.path).name


class Tracker(Protocol):
    """Takes a run's numbers by step."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values after an optimiser step; steps do not go back."""

    def close(self) -> None:
        """Write what is not written yet."""


class TensorBoard:
    """Event files in `<folder>/<artifact's path>`."""

    def __init__(self, folder: Path, run: TrackedRun) -> None:
        """Begin another event file in the run's folder."""
        self._module, self._folder, self._run = _module("tensorboard"), folder / run.path, run
        self._writer: Any = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values; what an earlier driver wrote of this step and later ones no longer shows."""
        if self._writer is None:
            self._writer = self._module.SummaryWriter(str(self._folder), purge_step=step, flush_secs=10)
            told = "\n".join(f"    {name}: {value}" for name, value in self._run.config.items())
            self._writer.add_text("config", told, step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is not written yet."""
        if self._writer is not None:
            self._writer.close()


class MLflow:
    """A run of the experiment `project`, one for all drivers of the same artifact."""

    def __init__(self, project: str, run: TrackedRun) -> None:
        """Go on with the run that has this artifact's name, or begin it."""
        self._module = _module("mlflow")
        self._client = self._module.MlflowClient()
        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self._client.create_experiment(project)
        wanted = f"tags.artifact = '{run.path}'"
        before = self._client.search_runs([experiment], filter_string=wanted)
        if before:
            self._id = before[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(experiment, tags={"artifact": run.path}, run_name=run.name).info.run_id
        for name, value in run.config.items():
            self._client.log_param(self._id, name, value)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values."""
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._id)


class Wandb:
    """A run of the project, with the artifact's key as its id."""

    def __init__(self, project: str, run: TrackedRun) -> None:
        """Go on with the run that has this id, or begin it."""
        self._run = _module("wandb").init(
            project=project,
            id=run.path.rpartition("-")[2],
            name=run.name,
            config=dict(run.config),
            resume="allow",
            reinit="create_new",
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Write what is not written yet."""
        self._run.finish()


def _module(kind: Kind) -> Any:  # noqa: ANN401 - optional libraries
    try:
        return importlib.import_module(PACKAGES[kind])
    except ModuleNotFoundError as error:
        if error.name != PACKAGES[kind]:
            raise
        raise MissingError(
            f"--tracking.to {kind}: {PACKAGES[kind]} is not installed: pip install {PACKAGES[kind]}, or leave it out"
        ) from error


def check_trackers(config: TrackingConfig) -> None:
    """Refuse, before anything runs, a tracker whose library is not there.

    Raises:
        MissingError: names it, and what to install.
    """
    for kind in config.to:
        _module(kind)


def trackers(config: TrackingConfig, folder: Path, run: TrackedRun) -> list[Tracker]:
    """Return what takes a run's curves.

    Args:
        config: which.
        folder: TensorBoard's.
        run: whose.

    Raises:
        MissingError: a library that is not installed.
    """
    made: dict[Kind, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(folder, run),
        "mlflow": lambda: MLflow(config.project, run),
        "wandb": lambda: Wandb(config.project, run),
    }
    return [made[kind]() for kind in dict.fromkeys(config.to)]


class Follower:
    """The driver's side: the curves of several runs, as they come."""

    def __init__(self, config: TrackingConfig, folder: Path, runs: Sequence[TrackedRun]) -> None:
        """Begin nothing before a run's first number."""
        self._config, self._folder, self._runs = config, folder, runs
        self._open: dict[int, list[Tracker]] = {}
        self._last: dict[tuple[int, str], int] = {}

    def take(self, number: int, step: int, values: Mapping[str, float]) -> None:
        """Give a run's values to its trackers; what a group that started again says once more is left out."""
        new = {name: value for name, value in values.items() if self._last.get((number, name), -1) < step}
        self._last |= {(number, name): step for name in new}
        if not new or not self._config.to:
            return
        if number not in self._open:
            self._open[number] = trackers(self._config, self._folder, self._runs[number])
        for tracker in self._open[number]:
            tracker.log(step, new)

    def close(self) -> None:
        """Write what is not written yet."""
        for trackers_ in self._open.values():
            for tracker in trackers_:
                tracker.close()
        self._open.clear()
