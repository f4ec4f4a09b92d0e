"""What jobs say at their end: figures for one JSON line, and the metrics behind a table."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rella.artifacts import Json
from rella.cli import Resolved
from rella.data.tables import column
from rella.dist.context import AnyPipeline
from rella.dist.run import Runner
from rella.errors import InputError
from rella.metrics import BootstrapEstimates, bootstrap_users
from rella.storage import SUBMITTED_JOB, Storage

Figures = dict[str, Json]


def estimates(runner: Runner, pipeline: AnyPipeline) -> BootstrapEstimates:
    """Return a run's metrics on all scored rows, with their spread over users.

    Raises:
        InputError: samples without labels, or all of one class.
    """
    scores = pipeline.score.artifact(runner.storage).read()
    missing = scores.column("label").null_count
    if missing:
        raise InputError(f"{missing} of the {len(scores)} scored samples have no label: metrics are undefined")
    user = users_of(runner, pipeline, column(scores, "sample_id"))
    return bootstrap_users(user, column(scores, "label"), column(scores, "probability"))


def users_of(runner: Runner, pipeline: AnyPipeline, sample_id: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return whose each sample is: (S,) rows of the users table."""
    users = pipeline.prepare.artifact(runner.storage).read("users", ["offset"])
    # A sample of the data set is the row of its target among the interactions, which are sorted by user.
    return np.searchsorted(column(users, "offset"), sample_id, side="right").astype(np.int64) - 1


def output_folder(asked: str, name: str, storage: Storage) -> Path:
    """Return where a job puts what people read.

    Args:
        asked: a folder, or `auto`: `name` in the working directory; in a submitted job, whose working directory is a
            copy that nobody looks into, in the storage where that is a folder, else in `~/rella`.
        name: `reports/sample-tiny`, ...
        storage: of the artifacts.

    Raises:
        InputError: a relative folder in a submitted job.
    """
    submitted = SUBMITTED_JOB in os.environ
    if asked != "auto":
        folder = Path(asked).expanduser()
        if submitted and not folder.is_absolute():
            raise InputError(f"{asked} is relative, and a submitted job runs in a copy of its folder: give a full path")
        return folder
    if not submitted:
        return Path(name)
    return Path(storage.absolute(name)) if storage.is_local else Path("~/rella").expanduser() / name


def full_shot(resolved: Resolved) -> Resolved:
    """Return the experiment on the whole training split, as the paper's baselines, unless somebody set N."""
    if resolved.sources.get("shots", "default").partition(" ")[0] in ("flag", "file", "preset", "call"):
        return resolved
    experiment = replace(resolved.experiment, shots="all")
    return replace(resolved, experiment=experiment, sources={**resolved.sources, "shots": "jobs/baseline.py"})
