"""Training curves: what TensorBoard reads back, runs that go on, and the optional trackers."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rella.cli import resolve
from rella.errors import InputError, MissingError
from rella.tracking import Follower, TrackedRun, TrackingConfig, check_trackers, trackers

RUN = TrackedRun("sample/reit/tiny-n512-0123456789ab", {"k": 8, "tune.learning_rate": 6e-3})


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_reads_what_was_told(tmp_path: Path) -> None:
    follower = Follower(TrackingConfig(), tmp_path, [RUN, TrackedRun("sample/reit/other-0123456789ac", {})])
    follower.take(0, 1, {"train/loss": 0.5})
    follower.take(1, 1, {"train/loss": 9.0})
    follower.take(0, 2, {"train/loss": 0.25, "valid/auc": 0.75})
    follower.close()
    assert curves(tmp_path / RUN.path) == {"train/loss": [(1, 0.5), (2, 0.25)], "valid/auc": [(2, 0.75)]}
    assert curves(tmp_path / "sample/reit/other-0123456789ac") == {"train/loss": [(1, 9.0)]}


def test_steps_that_are_told_again_are_written_once(tmp_path: Path) -> None:
    follower = Follower(TrackingConfig(), tmp_path, [RUN])
    for step, loss in ((1, 0.5), (2, 0.25), (1, 0.5), (2, 0.25), (3, 0.125)):
        follower.take(0, step, {"train/loss": loss})
    follower.take(0, 2, {"valid/auc": 0.75})
    follower.close()
    assert curves(tmp_path / RUN.path) == {
        "train/loss": [(1, 0.5), (2, 0.25), (3, 0.125)],
        "valid/auc": [(2, 0.75)],
    }


def test_another_driver_takes_the_place_of_what_the_first_wrote(tmp_path: Path) -> None:
    first = Follower(TrackingConfig(), tmp_path, [RUN])
    for step in range(1, 6):
        first.take(0, step, {"train/loss": float(step)})
    first.close()
    second = Follower(TrackingConfig(), tmp_path, [RUN])
    for step in range(1, 4):
        second.take(0, step, {"train/loss": step + 0.5})
    second.close()
    assert curves(tmp_path / RUN.path) == {"train/loss": [(1, 1.5), (2, 2.5), (3, 3.5)]}


def test_nothing_is_written_where_nothing_is_asked_for(tmp_path: Path) -> None:
    follower = Follower(TrackingConfig(to=()), tmp_path, [RUN])
    follower.take(0, 1, {"train/loss": 0.5})
    follower.close()
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_is_missing_is_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingError, match="pip install wandb"):
        check_trackers(TrackingConfig(to=("tensorboard", "wandb")))
    with pytest.raises(InputError, match="tensorbored"):
        resolve({"tracking.to": ["tensorbored"]})


def test_wandb_goes_on_with_the_artifact_s_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun: list[dict[str, Any]] = []
    told: list[tuple[Any, ...]] = []

    def init(**arguments: Any) -> SimpleNamespace:
        begun.append(arguments)
        return SimpleNamespace(
            log=lambda values, step: told.append((step, values)), finish=lambda: told.append(("over",))
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    (tracker,) = trackers(TrackingConfig(to=("wandb",), project="films"), tmp_path, RUN)
    tracker.log(3, {"train/loss": 0.5})
    tracker.close()
    assert begun[0]["id"] == "0123456789ab"
    assert begun[0]["project"] == "films"
    assert begun[0]["resume"] == "allow"
    assert begun[0]["config"] == {"k": 8, "tune.learning_rate": 6e-3}
    assert told == [(3, {"train/loss": 0.5}), ("over",)]


def test_mlflow_goes_on_with_the_artifact_s_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow (or mlflow-skinny)")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    importlib.reload(mlflow)
    for steps in ((1, 2), (3,)):
        (tracker,) = trackers(TrackingConfig(to=("mlflow",), project="films"), tmp_path, RUN)
        for step in steps:
            tracker.log(step, {"train/loss": 1.0 / step})
        tracker.close()
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("films")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params == {"k": "8", "tune.learning_rate": "0.006"}
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
