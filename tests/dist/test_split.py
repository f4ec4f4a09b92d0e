"""Embedding and scoring by two workers that share one base: the parts of a pool whose workers hold all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rella.cli import resolve
from rella.dist.embed import vectors_of
from rella.dist.run import Runner
from rella.errors import ClusterError

SMALL: dict[str, Any] = {
    "data.sample_users": 80,
    "test_rows": 301,
    "adapter": "none",
    "history": "retrieved",
    "score.shard_rows": 160,
    "embed.batch_tokens": 400,
    "score.batch_tokens": 900,
    "cluster.gpu": False,
}


def scored(storage: Path, **more: Any) -> tuple[np.ndarray, pa.Table, dict[str, Any]]:
    experiment = resolve({**SMALL, "storage": str(storage), **more}).experiment
    with Runner(experiment) as runner:
        pipeline = runner.pipeline(experiment)
        runner.run([pipeline])
        artifact = pipeline.score.artifact(runner.storage)
        return vectors_of(pipeline.embed.artifact(runner.storage).read()), artifact.read(), artifact.manifest().facts


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_two_workers_that_share_a_base(tmp_path: Path) -> None:
    vectors, alone, facts = scored(tmp_path / "alone")
    shared_vectors, together, shared_facts = scored(tmp_path / "together", **{"cluster.base_workers": 2})
    np.testing.assert_allclose(shared_vectors, vectors, atol=1e-5)
    assert together.column("sample_id").equals(alone.column("sample_id"))
    assert len(alone) == 301
    np.testing.assert_allclose(together.column("probability"), alone.column("probability"), atol=1e-5)
    # 301 rows in two shards of 150 and 151: one row of the second is computed by both workers, and counted once.
    assert shared_facts == facts
    assert facts["tokens"] > 0


@pytest.mark.ray
def test_fewer_workers_than_are_to_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"cluster.base_workers 3: the cluster has room for 1"):
        scored(tmp_path, **{"cluster.base_workers": 3, "cluster.workers": 1})
