"""A node of the cluster is lost in the middle of training and comes back: it goes on with one worker, then with two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.faults.harness import Place, adapter_of, assert_same_adapter, steps_of

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

LONG: dict[str, Any] = {
    "shots": 1024,
    "tune.batch_size": 256,
    "tune.max_epochs": 30,
    "tune.stop_after": 30,
    "tune.valid_rows": 64,
    "tune.checkpoint_seconds": 0.5,
    "mix": "original",
    "history": "recent",
    "variants": "wo-retrieval",
}
"""Some minutes on one worker, most of them in steps: Ray takes 75 seconds to notice what is lost and what has come."""


def losses_of(place: Place) -> tuple[list[float], dict[str, Any]]:
    facts = place.finished("reit").manifest().facts
    return facts["losses"], facts


@pytest.mark.parametrize("kind", ["folder"])
def test_a_worker_is_taken_away_and_given_back(place: Callable[[str], Place]) -> None:
    from ray.cluster_utils import Cluster

    undisturbed = place("undisturbed")
    done = undisturbed.run("reit", **LONG)
    assert done.code == 0, done.out
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        second = cluster.add_node(num_cpus=1)
        own = place("elastic")
        here = replace(own, environment={**own.environment, "RAY_ADDRESS": cluster.address})
        flags = {**LONG, "cluster.workers": 2, "cluster.min_workers": 1}
        job = here.start("reit", **flags)
        job.until(lambda: steps_of(here, "reit")[-1:] >= [10])
        cluster.remove_node(second, allow_graceful=False)
        at = steps_of(here, "reit")[-1]
        job.until(lambda: steps_of(here, "reit")[-1:] >= [at + 10])
        cluster.add_node(num_cpus=1)
        done = job.end()
    finally:
        cluster.shutdown()
    assert done.code == 0, done.out
    (expected, _), (losses, facts) = losses_of(undisturbed), losses_of(here)
    print(f"resumed at steps {facts['resumed_at']} of {facts['steps']}, {facts['workers']} workers at the end")
    assert len(facts["resumed_at"]) == 2, "once with one worker, once with two again"
    assert facts["workers"] == 2
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    assert_same_adapter(undisturbed, here, 1e-5)
    assert adapter_of(here)
