"""A sweep loses a training worker and then its driver: no trial is made twice, and the best are what they would be."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Place

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

FLAGS: dict[str, Any] = {
    "cluster.workers": 1,
    "tune.max_epochs": 2,
    "sweep.shots": "[32, 64]",
    "variants": "ours",
}
SPACE = "tune.learning_rate: [0.001, 0.006]\ntune.batch_size: [16, 32]\n"


def adapters(place: Place) -> dict[str, Any]:
    """Finished adapters and when their weights were written."""
    files = place.files()
    done = {path.rpartition("/")[0] for path in files if "/reit/" in path and path.endswith("/manifest.json")}
    return {
        p: t for p, t in files.items() if p.endswith("adapter_model.safetensors") and p.split("/adapter/")[0] in done
    }


@pytest.mark.parametrize("kind", ["folder"])
def test_no_trial_is_made_twice(place: Callable[[str], Place], tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(SPACE)
    here, calm = place("here"), place("calm")
    flags = {**FLAGS, "sweep.space": space, "sweep.out": tmp_path / "out"}
    job = here.start("sweep", **flags)
    job.until(lambda: len(adapters(here)) >= 1)
    job.until(lambda: job.workers("RayTrainWorker"))
    job.workers("RayTrainWorker")[0].send_signal(signal.SIGKILL)
    job.until(lambda: len(adapters(here)) >= 3)
    before = adapters(here)
    job.kill()
    assert len(before) < 8, "the sweep had ended before its driver was killed"
    done = here.run("sweep", **flags)
    assert done.code == 0, done.out
    assert f"found  {len(before)} trials" in done.out or f"found  {len(before) + 1} trials" in done.out
    after = adapters(here)
    assert len(after) == 8
    assert {p: after[p] for p in before} == before, "a finished trial was made again"
    undisturbed = calm.run("sweep", **{**flags, "sweep.out": tmp_path / "calm"})
    assert undisturbed.code == 0, undisturbed.out
    for mine, right in zip(done.figures["best"], undisturbed.figures["best"], strict=True):
        for name, value in right.items():
            if isinstance(value, float):
                assert mine[name] == pytest.approx(value, abs=1e-5), name
    inputs = {str(a.manifest().inputs) for a in all_finished(here)}
    assert len(inputs) == 1, "all trials share every upstream artifact"
    # Each file gives what the sweep said, in the same storage and in one of its own.
    for row in done.figures["best"]:
        config = {"cluster.workers": 1, "variants": "ours"}
        again = here.run("reit", "--config", row["config"], **config)
        assert again.code == 0, again.out
        assert again.figures["variants"]["ours"]["auc"] == pytest.approx(row["test_auc"], abs=1e-6)
    assert len(adapters(here)) == 8
    assert len(json.loads((tmp_path / "out/sweep.json").read_text())["trials"]) == 8


def all_finished(place: Place) -> list[Any]:
    from rella.artifacts import list_artifacts

    return [a for a in list_artifacts(place.storage()) if "/reit/" in a.path and a.is_complete()]
