"""The LM-based baselines through the command line, on the synthetic data set and on MovieLens-1M."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rella.artifacts import Artifact, list_artifacts
from rella.cli import resolve
from rella.errors import InputError
from rella.schemas import SCORES
from rella.storage import Storage
from rella.textctr.small import save_bert, save_t5, texts_of

ROOT = Path(__file__).resolve().parents[2]
ML_1M = ROOT.parent / "shared" / "data" / "ml-1m"
FLAGS = (
    "--data.sample-users=60",
    "--k=4",
    "--shots=64",
    "--test-rows=100",
    "--textctr.max-tokens=256",
    "--textctr.batch-size=64",
    "--textctr.max-epochs=5",
    "--textctr.learning-rate=5e-4",
    "--textctr.dropout=0",
)
"""A step holds all rows, so that one loss can be held against another."""
MLM = ("--textctr.mlm-epochs=2", "--textctr.mlm-batch-size=16", "--textctr.mlm-learning-rate=1e-3")
MODELS = ("ctr-bert", "ptab", "p5")

Job = Callable[..., tuple[int, str, dict[str, Any]]]


def run(model: str, storage: Path, base: Path, *words: str) -> tuple[int, str, dict[str, Any]]:
    mlm = MLM if model == "ptab" else ()
    command = [sys.executable, "jobs/baseline.py", "--storage", str(storage), "--model", model, "--base", str(base)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "RELLA_"))}
    done = subprocess.run(
        [*command, *FLAGS, *mlm, *words], cwd=ROOT, env=clean, capture_output=True, text=True, timeout=1800, check=False
    )
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    return done.returncode, done.stdout + done.stderr, json.loads(last) if last.startswith("{") else {}


@pytest.fixture(scope="module")
def sample_texts() -> list[str]:
    return texts_of(resolve({"data.sample_users": 60, "k": 4}).experiment, 100)


@pytest.fixture(scope="module")
def bert(sample_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("models") / "small-bert", sample_texts, 1000, 256, spread=0.05)


@pytest.fixture(scope="module")
def t5(sample_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_t5(tmp_path_factory.mktemp("models") / "small-t5", sample_texts, 1000)


@pytest.fixture(scope="module")
def job(bert: Path, request: pytest.FixtureRequest) -> Job:
    """Return what runs the job with a small model of the right kind."""

    def start(model: str, storage: Path, *words: str) -> tuple[int, str, dict[str, Any]]:
        base: Path = request.getfixturevalue("t5") if model == "p5" else bert
        return run(model, storage, base, *words)

    return start


def only(storage: Path, stage: str, what: str = "") -> Artifact:
    found = [a for a in list_artifacts(Storage(str(storage))) if f"/{stage}/" in a.path and what in a.path]
    assert len(found) == 1, [a.path for a in found]
    found[0].verify()
    return found[0]


def made(out: str) -> list[str]:
    return [line.split()[0] for line in out.splitlines() if " made " in line]


def check_run(model: str, storage: Path, out: str, figures: dict[str, Any], rows: int) -> None:
    """What every one of them leaves: scores as an LLM's, weights, a table that says what it was trained on."""
    small = "small-t5" if model == "p5" else "small-bert"
    assert (figures["baseline"], figures["base"]) == (f"{model} ({small})", small)
    table = only(storage, "score").read()
    assert table.schema.remove_metadata().equals(SCORES)
    assert len(set(table["sample_id"].to_pylist())) == len(table) == figures["rows"]
    yes, no = (table[c].to_numpy().astype(np.float64) for c in ("logit_yes", "logit_no"))
    assert no.any() == (model == "p5")
    assert len(set(yes.tolist())) > len(table) // 2, "one score for everything"
    np.testing.assert_allclose(table["probability"].to_numpy(), 1 / (1 + np.exp(no - yes)), atol=1e-12)
    fitted = only(storage, "textctr").manifest()
    assert [p.name for p in fitted.parts] == ["weights.safetensors"]
    losses = fitted.facts["losses"]
    assert losses[-1] < losses[0] - 0.005, losses  # A step holds all rows.
    assert fitted.facts["rows"] == rows
    assert fitted.facts["best_step"] in [v["step"] for v in fitted.facts["valid"]]
    assert fitted.facts["precision"] == fitted.config["textctr.precision"]
    assert fitted.identity["resolved_model"]["digest"] == fitted.identity["model"]
    assert f"{rows} of {fitted.facts['rows_of']:,} training rows" in out


@pytest.mark.ray
def test_ctr_bert_is_fitted_and_scores(job: Job, tmp_path: Path) -> None:
    code, out, figures = job("ctr-bert", tmp_path, "--cluster.workers=1")
    assert code == 0, out
    assert made(out) == ["prepare", "textctr", "score"]
    check_run("ctr-bert", tmp_path, out, figures, 64)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", MODELS)
def test_each_runs_and_is_found_again(model: str, job: Job, tmp_path: Path) -> None:
    code, out, figures = job(model, tmp_path, "--textctr.max-train-rows=48")
    assert code == 0, out
    assert made(out) == ["prepare", *(["mlm"] if model == "ptab" else []), "textctr", "score"]
    check_run(model, tmp_path, out, figures, 48)
    assert "training rows (textctr.max_train_rows); best step on valid" in out
    # Budgets and the number of workers change nothing.
    code, out, again = job(
        model, tmp_path, "--textctr.max-train-rows=48", "--textctr.batch-tokens=2000", "--cluster.workers=1"
    )
    assert code == 0, out
    assert made(out) == []
    assert {**again, "seconds": 0} == {**figures, "seconds": 0}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_further_pretraining_is_kept(job: Job, tmp_path: Path) -> None:
    """Another learning rate of the classifier starts from the same encoder."""
    code, out, _ = job("ptab", tmp_path)
    assert code == 0, out
    encoder = only(tmp_path, "mlm").manifest()
    assert {"encoder/config.json", "encoder/model.safetensors", "encoder/tokenizer.json"} <= {
        p.name for p in encoder.parts
    }
    assert encoder.facts["losses"][-1] < encoder.facts["losses"][0]
    assert encoder.facts["valid"] == []
    code, out, _ = job("ptab", tmp_path, "--textctr.learning-rate=2e-3")
    assert code == 0, out
    assert made(out) == ["textctr", "score"]
    assert only(tmp_path, "mlm").manifest() == encoder


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", MODELS)
def test_one_worker_and_two_give_one_curve(model: str, job: Job, tmp_path: Path) -> None:
    curves: dict[str, list[list[float]]] = {}
    for workers in (1, 2):
        where = tmp_path / str(workers)
        code, out, _ = job(model, where, f"--cluster.workers={workers}", "--textctr.batch-size=16")
        assert code == 0, out
        for stage in ("mlm", "textctr") if model == "ptab" else ("textctr",):
            facts = only(where, stage).manifest().facts
            assert facts["workers"] == workers
            curves.setdefault(stage, []).append(facts["losses"])
    for stage, (one, two) in curves.items():
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-5, err_msg=stage)


MOVIELENS = {"dataset": "ml-1m", "raw_dir": str(ML_1M), "k": 15, "shots": 512}


@pytest.fixture(scope="module")
def movielens_texts() -> list[str]:
    return texts_of(resolve(MOVIELENS).experiment, 1000)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not ML_1M.exists(), reason="MovieLens-1M is not there")
@pytest.mark.parametrize("model", MODELS)
def test_few_shots_on_movielens(model: str, movielens_texts: list[str], tmp_path: Path) -> None:
    """A BERT or T5 of two layers that knows nothing, 512 shots: whether all of it holds on real texts."""
    if model == "p5":
        base = save_t5(tmp_path / "small-t5", movielens_texts, 4000, 1024, 64)
    else:
        base = save_bert(tmp_path / "small-bert", movielens_texts, 4000, 512, 64, 0.05)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in MOVIELENS.items()]
    words += ["--test-rows=1000", "--textctr.max-tokens=512", "--textctr.batch-size=32"]
    words += ["--textctr.max-epochs=2", "--textctr.valid-per-epoch=1"]
    code, out, figures = run(model, tmp_path / "store", base, *words)
    assert code == 0, out
    start = out.index(
        "\nml-1m, test split, 1,000 rows (a seeded subset); K = 15, N = 512, 512 of 776,007 training rows"
    )
    print(out[start : out.index("\nArtifacts")])
    assert 0.4 < figures["auc"] < 1
    assert figures["rows"] == 1000
    manifest = only(tmp_path / "store", "textctr").manifest()
    assert (manifest.facts["rows"], manifest.facts["valid_rows"]) == (512, 512)


def test_the_defaults_of_appendix_c2_come_with_the_model() -> None:
    resolved = resolve({"baseline.model": "p5", "textctr.batch_size": 8})
    config = resolved.experiment.textctr
    assert (config.base, config.learning_rate, config.clip, config.batch_size) == ("t5-base", 5e-4, 1.0, 8)
    assert resolved.sources["textctr.base"] == "baseline p5"
    assert resolve({"baseline.model": "din"}).experiment.textctr.base == "bert-base-uncased"
    with pytest.raises(InputError, match=r"no field 'textctr\.bath_size'"):
        resolve({"textctr.bath_size": 8})
