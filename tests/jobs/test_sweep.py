"""Sweeps through the command line on the synthetic data set, on Ray Tune."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rella.artifacts import list_artifacts
from rella.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--data.sample-users=120",
    "--k=5",
    "--tune.max-epochs=1",
    "--tune.valid-rows=50",
    "--test-rows=100",
    "--cluster.workers=1",
)


def job(name: str, storage: Path, folder: Path, *words: str) -> tuple[int, str, dict[str, Any]]:
    command = [sys.executable, str(ROOT / f"jobs/{name}.py"), "--storage", str(storage), *words]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "RELLA_"))}
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, timeout=400, check=False)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    return done.returncode, done.stdout + done.stderr, json.loads(last) if last.startswith("{") else {}


def made(storage: Path, stage: str) -> list[Any]:
    return [a for a in list_artifacts(Storage(str(storage))) if f"/{stage}/" in a.path and a.is_complete()]


FLAGS = (*SMALL, "--sweep.space=space.yaml", "--sweep.shots=[32, 64]")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """A folder with a storage and a sweep's files, what it said, and its figures."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "space.yaml").write_text("tune.learning_rate: [0.0001, 0.006]\n")
    code, out, figures = job("sweep", folder / "storage", folder, *FLAGS)
    assert code == 0, out
    return folder, out, figures


@pytest.mark.ray
def test_every_setting_once_and_upstream_once(swept: tuple[Path, str, dict[str, Any]]) -> None:
    folder, out, figures = swept
    assert figures["trials"] == 4
    assert out.count("valid AUC") >= 4
    assert [row["shots"] for row in figures["best"]] == [32, 64]
    assert len(made(folder / "storage", "reit")) == 4
    for stage in ("prepare", "embed", "pca", "retrieve"):
        assert len(made(folder / "storage", stage)) == 1, "upstream is computed once"
    assert len({str(a.manifest().inputs) for a in made(folder / "storage", "reit")}) == 1
    body = json.loads((folder / figures["file"]).read_text())
    for row in figures["best"]:
        tried = [t for t in body["trials"] if t["shots"] == row["shots"]]
        assert row["valid_auc"] == pytest.approx(max(t["valid"]["auc"] for t in tried), abs=1e-6)
    # Nothing is tried twice: Ray is not even started.
    code, again, same = job("sweep", folder / "storage", folder, *FLAGS)
    assert code == 0, again
    assert "found  4 trials" in again
    assert "ray       ready" not in again
    assert same["best"] == figures["best"]


@pytest.mark.slow
@pytest.mark.ray
def test_a_file_runs_the_best_again_to_the_same_metrics(swept: tuple[Path, str, dict[str, Any]]) -> None:
    folder, _, figures = swept
    for best in figures["best"]:
        words = ["--config", best["config"], "--cluster.workers=1", "--variants=ours"]
        code, out, alone = job("reit", folder / f"storage-{best['shots']}", folder, *words)
        assert code == 0, out
        assert alone["variants"]["ours"]["auc"] == pytest.approx(best["test_auc"], abs=1e-5)
        assert alone["variants"]["ours"]["log_loss"] == pytest.approx(best["test_log_loss"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.ray
def test_a_baseline_stops_early_within_its_n(tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("baseline.learning_rate: [0.0000001, 0.001, 0.003, 0.00000001]\n")
    flags = [
        "--data.sample-users=150",
        "--k=5",
        "--baseline.max-epochs=20",
        "--baseline.patience=20",
        "--baseline.embedding-dim=8",
        "--baseline.batch-size=64",
        "--cluster.workers=1",
        "--test-rows=all",
        "--sweep.space=space.yaml",
        "--sweep.method=din",
        "--sweep.shots=[512]",
        "--sweep.early-stopping=true",
        "--sweep.at-once=2",
    ]
    code, out, figures = job("sweep", tmp_path / "storage", tmp_path, *flags)
    assert code == 0, out
    body = json.loads((tmp_path / figures["file"]).read_text())
    stopped = [t["baseline.learning_rate"] for t in body["trials"] if t["stopped"]]
    assert stopped, "no trial was stopped"
    assert set(stopped) <= {1e-7, 1e-8}
    assert figures["best"][0]["baseline.learning_rate"] >= 1e-3
    code, again, same = job("sweep", tmp_path / "storage", tmp_path, *flags)
    assert code == 0, again
    assert "found  4 trials" in again, "what was stopped is not tried again"
    assert same["best"] == figures["best"]


@pytest.mark.ray
def test_more_trials_at_once_than_the_cluster_holds_are_refused(tmp_path: Path) -> None:
    code, out, _ = job("sweep", tmp_path / "storage", tmp_path, *SMALL, "--sweep.at-once=99", "--sweep.shots=[16]")
    assert code == 1, out
    assert "--sweep.at-once 99: a trial takes 1 CPU, so the cluster has room for" in out
