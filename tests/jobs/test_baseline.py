"""Baselines through the command line on the synthetic data set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rella.artifacts import Artifact, list_artifacts
from rella.cli import resolve
from rella.dist.figures import full_shot
from rella.dist.jobs import baseline_settings, baseline_words, main
from rella.schemas import SCORES
from rella.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    "--data.sample-users=150",
    "--baseline.embedding-dim=8",
    "--baseline.dnn-size=16",
    "--baseline.batch-size=64",
    "--baseline.max-epochs=2",
    "--baseline.dropout=0",
    "--k=10",
    "--test-rows=all",
)


def job(storage: Path, *words: str) -> tuple[int, str, dict[str, Any]]:
    command = [sys.executable, "jobs/baseline.py", "--storage", str(storage), *FLAGS, *words]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "RELLA_"))}
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=300, check=False)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    return done.returncode, done.stdout + done.stderr, json.loads(last) if last.startswith("{") else {}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("baselines")


def only(storage: Path, stage: str, what: str) -> Artifact:
    found = [a for a in list_artifacts(Storage(str(storage))) if f"/{stage}/" in a.path and what in a.path]
    assert len(found) == 1, [a.path for a in found]
    found[0].verify()
    return found[0]


@pytest.mark.ray
def test_a_baseline_is_fitted_scored_and_found_again(storage: Path) -> None:
    """SIM, whose neighbours come from SUBR, on the whole training split; as many dimensions as the LLM gives."""
    words = ["--seeds", "2", "--baseline.attention-size=16", "--pca-dim=auto"]
    code, out, figures = job(storage, "--model", "sim", *words)
    assert code == 0, out
    assert figures["baseline"] == "sim (semantic)"
    made = [line.split()[0] for line in out.splitlines() if " made " in line]
    assert made == ["prepare", "embed", "pca", "retrieve", "baseline", "baseline", "score", "score"]
    assert 0.4 < figures["auc"] < 1
    assert len(figures["seeds"]) == 2
    assert figures["seeds"][0] != figures["seeds"][1]
    assert figures["auc"] == pytest.approx(np.mean([s["auc"] for s in figures["seeds"]]), abs=1e-6)
    assert set(figures["floor"]) == {"auc", "log_loss", "accuracy"}
    assert "set by jobs/baseline.py:\n    shots=all" in out
    scores = only(storage, "score", "sim-semantic-nall-k10-seed1")
    table = scores.read()
    assert table.schema.remove_metadata().equals(SCORES)
    yes, no = (table[c].to_numpy() for c in ("logit_yes", "logit_no"))
    assert not no.any()
    np.testing.assert_allclose(table["probability"].to_numpy(), 1 / (1 + np.exp(-yes.astype(np.float64))), atol=1e-12)
    fitted = only(storage, "baseline", "sim-semantic-nall-k10-seed1").manifest()
    assert set(fitted.inputs) == {"data", "neighbours"}
    assert [p.name for p in fitted.parts] == ["weights.safetensors"]
    assert fitted.facts["steps"] == len(fitted.facts["losses"])
    assert fitted.facts["losses"][-1] < fitted.facts["losses"][0]
    assert fitted.facts["best_step"] in [v["step"] for v in fitted.facts["valid"]]
    code, out, again = job(storage, "--model=sim", *words)
    assert code == 0, out
    assert out.count("baseline  found") == 2
    assert {**again, "seconds": 0} == {**figures, "seconds": 0}


@pytest.mark.ray
@pytest.mark.slow
def test_few_shots_and_a_subset_of_the_test_rows(storage: Path) -> None:
    code, out, figures = job(storage, "--model", "sim", "--shots", "256", "--test-rows", "100")
    assert code == 0, out
    assert figures["rows"] == 100
    manifest = only(storage, "baseline", "sim-semantic-n256").manifest()
    assert set(manifest.inputs) == {"data", "neighbours"}
    assert (manifest.facts["rows"], manifest.facts["valid_rows"]) == (256, 256)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("model", ["deepfm", "autoint", "dcnv2", "gru4rec", "caser", "sasrec", "din", "sim"])
def test_every_model_runs(model: str, storage: Path) -> None:
    for search in ("hard", "soft") if model == "sim" else (None,):
        words = [] if search is None else ["--search", search]
        code, out, figures = job(storage, "--model", model, *words, "--shots", "256", "--test-rows", "100")
        assert code == 0, out
        assert figures["baseline"] == (model if search is None else f"sim ({search})")


@pytest.mark.ray
@pytest.mark.slow
def test_one_worker_and_two_give_one_curve(storage: Path, tmp_path: Path) -> None:
    losses = []
    for workers in (1, 2):
        where = tmp_path / str(workers)
        code, out, _ = job(where, "--model", "gru4rec", "--shots", "512", "--cluster.workers", str(workers))
        assert code == 0, out
        facts = only(where, "baseline", "gru4rec").manifest().facts
        assert facts["workers"] == workers
        losses.append(facts["losses"])
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)


def test_words_of_the_job() -> None:
    words = ["--model", "din", "--model=sim", "--search=hard", "--lm", "vicuna-7b", "--base=t5-small", "--shots", "5"]
    assert baseline_words(words) == [
        "--baseline.model", "din", "--baseline.model=sim", "--baseline.search=hard", "--model", "vicuna-7b",
        "--textctr.base=t5-small", "--shots", "5",
    ]  # fmt: skip


def test_the_whole_training_split_unless_somebody_says_otherwise() -> None:
    assert full_shot(resolve({"dataset": "ml-1m"})).experiment.shots == "all"
    assert full_shot(resolve({"dataset": "ml-1m", "shots": 8192})).experiment.shots == 8192
    assert full_shot(resolve({}, preset="bookcrossing-n256")).experiment.shots == 256


@pytest.mark.parametrize(
    ("model", "word", "remedy"),
    [
        ("din", "--baseline.gru-layers=2", "leave it out"),
        ("din", "--search=hard", "leave it out"),
        ("din", "--textctr.patience=3", "did you mean --baseline.patience?"),
        ("ctr-bert", "--baseline.batch-size=8", "did you mean --textctr.batch-size?"),
        ("ctr-bert", "--textctr.mlm-epochs=2", "leave it out"),
    ],
)
def test_a_flag_that_the_model_does_not_feel_is_refused(
    model: str, word: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = baseline_words(["--model", model, word])
    assert main("baseline", "", lambda runner: {}, words, baseline_settings) == 1
    assert f"{words[-1].partition('=')[0]}: {model} does not feel it; {remedy}" in capsys.readouterr().err
    words = baseline_words(["--model", model])
    assert main("baseline", "", lambda runner: {}, words, baseline_settings) == 0


def test_an_unknown_model_is_named(storage: Path) -> None:
    code, out, _ = job(storage, "--model", "fm")
    assert code == 2
    assert "baseline.model" in out
    assert "deepfm" in out
