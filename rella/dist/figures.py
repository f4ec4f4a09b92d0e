"""What jobs say at their end: figures for one JSON line, and the metrics behind a table."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rella.artifacts import Json
from rella.cli import Resolved
from rella.data.tables import column
from rella.dist.context import AnyPipeline
from rella.dist.run import Runner
from rella.errors import InputError
from rella.metrics import BootstrapEstimates, bootstrap_users

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
    users = pipeline.prepare.artifact(runner.storage).read("users", ["offset"])
    # A sample of the data set is the row of its target among the interactions, which are sorted by user.
    user = np.searchsorted(column(users, "offset"), column(scores, "sample_id"), side="right")
    return bootstrap_users(user, column(scores, "label"), column(scores, "probability"))


def full_shot(resolved: Resolved) -> Resolved:
    """Return the experiment on the whole training split, as the paper's baselines, unless somebody set N."""
    if resolved.sources.get("shots", "default").partition(" ")[0] in ("flag", "file", "preset", "call"):
        return resolved
    experiment = replace(resolved.experiment, shots="all")
    return replace(resolved, experiment=experiment, sources={**resolved.sources, "shots": "jobs/baseline.py"})
