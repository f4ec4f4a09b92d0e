"""The jobs through their command lines, on real Ray, DeepSpeed, transformers and PEFT, with a very small model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rella.artifacts import Artifact, list_artifacts
from rella.cli import resolve
from rella.data.fewshot import subset
from rella.data.questions import Neighbours
from rella.data.selection import split_ids
from rella.dist.dataset import read_tables
from rella.models import ModelIdentity
from rella.storage import Storage

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.ray, pytest.mark.timeout(420)]

SETTING = {
    "precision": "float32",
    "k": 4,
    "shots": 40,
    "test_rows": 150,
    "data.sample_users": 60,
    "tune.max_epochs": 2,
    "tune.batch_size": 16,
    "tune.micro_batch_rows": 4,
    "tune.learning_rate": 0.01,
    "tune.valid_rows": 60,
}


@dataclass(frozen=True)
class Run:
    """One command's outcome."""

    code: int
    out: str
    err: str

    @property
    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out.strip().splitlines()[-1])
        return found


def job(name: str, storage: Path, model: Path, *flags: str, setting: Mapping[str, Any] = SETTING) -> Run:
    """Run `python jobs/<name>.py` in a process of its own."""
    words = [f"--{field.replace('_', '-')}={value}" for field, value in setting.items()]
    command = [sys.executable, f"jobs/{name}.py", "--storage", str(storage), "--model", str(model), *words, *flags]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "RELLA_"))}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, stdin=subprocess.DEVNULL
    )
    return Run(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def main_run(storage: Path, model_folder: Path) -> Run:
    run = job("reit", storage, model_folder, "--variants", "ours,wo-retrieval,wo-it")
    assert run.code == 0, run.err
    return run


def artifact(storage: Path, stage: str, *parts: str) -> Artifact:
    """The one finished artifact of a stage whose path holds all of `parts`."""
    found = [
        a for a in list_artifacts(Storage(str(storage))) if f"/{stage}/" in a.path and all(p in a.path for p in parts)
    ]
    assert len(found) == 1, [a.path for a in found]
    return found[0]


def test_every_stage_leaves_a_finished_artifact(main_run: Run, storage: Path) -> None:
    found = list(list_artifacts(Storage(str(storage))))
    stages = sorted(a.path.split("/")[1] for a in found)
    assert stages == ["embed", "pca", "prepare", "reit", "reit", "retrieve", "score", "score", "score"]
    for a in found:
        a.verify()
        manifest = a.manifest()
        assert manifest.config
        assert manifest.code["libraries"]["ray"]
        assert a.storage.list(f"{a.path}/lease") == []


def test_output_is_a_table_and_one_json_line_without_noise(main_run: Run) -> None:
    lines = main_run.out.splitlines()
    assert sum(line.startswith("ReLLa (") for line in lines) == 3
    assert set(main_run.figures["variants"]) == {"ours", "wo-retrieval", "wo-it"}
    assert main_run.figures["rows"] == 150
    noise = [
        line
        for line in main_run.err.splitlines()
        if line.strip() and not line.startswith(("embed ", "retrieve ", "tune ", "score "))
    ]
    assert noise == []
    assert not [line for line in lines if "WARNING" in line or "INFO" in line or "pid=" in line]


def test_metrics_are_of_the_scored_rows(main_run: Run, storage: Path) -> None:
    from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

    scores = artifact(storage, "score", "mixed").read()
    label, probability = scores["label"].to_numpy(), scores["probability"].to_numpy()
    said = main_run.figures["variants"]["ours"]
    assert said["auc"] == pytest.approx(roc_auc_score(label, probability), abs=1e-6)
    assert said["log_loss"] == pytest.approx(log_loss(label, probability), abs=1e-6)
    assert said["accuracy"] == pytest.approx(accuracy_score(label, probability >= 0.5), abs=1e-6)
    tables = read_tables(artifact(storage, "prepare"))
    expected = subset(split_ids(tables.samples, "test"), 150, 42, "test")
    assert scores["sample_id"].to_numpy().tolist() == expected.tolist()


def test_the_adapter_is_plain_peft_and_gives_the_same_scores(
    main_run: Run, storage: Path, model_folder: Path, identity: ModelIdentity
) -> None:
    """Everything written out again with transformers and PEFT alone: prompt, full logits, softmax over two of them."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rella.dist.dataset import catalogue_of
    from rella.prompts import ML_1M, WRAPPERS, Display, prompt_text

    folder = artifact(storage, "reit", "mixed").local_folder("adapter")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder).eval()
    tables = read_tables(artifact(storage, "prepare"))
    catalogue = catalogue_of(tables, ML_1M, Display())
    neighbours = Neighbours.from_table(artifact(storage, "retrieve").read())
    rows = {row["sample_id"]: row for row in tables.samples.to_pylist()}
    yes, no = (tokenizer(f"ASSISTANT: {word}")["input_ids"][-1] for word in ("Yes", "No"))
    scores = artifact(storage, "score", "mixed").read().to_pylist()
    for scored in scores[::10]:
        sample = rows[scored["sample_id"]]
        positions = neighbours.top(sample["sample_id"], 4)
        asked = catalogue.question(sample["user"], sample["item"], sample["end"], positions, 4)
        prompt = WRAPPERS["vicuna"].wrap(prompt_text(ML_1M, asked.profile, asked.names, asked.ratings, asked.target))
        with torch.no_grad():
            logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
        assert float(logits[yes]) == pytest.approx(scored["logit_yes"], abs=2e-4)
        expected = float(torch.softmax(logits[[yes, no]].double(), 0)[0])
        assert scored["probability"] == pytest.approx(expected, abs=1e-4)


def test_neighbours_are_those_of_the_engine_on_the_stored_vectors(main_run: Run, storage: Path) -> None:
    from rella.dist.embed import vectors_of
    from rella.retrieval.engines import top_k

    tables = read_tables(artifact(storage, "prepare"))
    vectors = vectors_of(artifact(storage, "pca").read())
    s = tables.samples
    columns = [s[c].to_numpy() for c in ("user", "item", "end")]
    offsets, positions = top_k(vectors, tables.histories(), *columns, 80)
    stored = Neighbours.from_table(artifact(storage, "retrieve").read().combine_chunks())
    assert np.array_equal(stored.sample_id, s["sample_id"].to_numpy())
    assert np.array_equal(stored.offsets, offsets)
    assert np.array_equal(stored.positions, positions)


def test_tuning_changed_the_scores_and_recorded_its_course(main_run: Run, storage: Path) -> None:
    facts = artifact(storage, "reit", "mixed").manifest().facts
    assert facts["shots"] == 40
    assert facts["rows"] == 80
    assert len(facts["losses"]) == 2 * 5
    assert facts["losses"][-1] < facts["losses"][0]
    assert facts["valid_rows"] == 60
    best = max(range(2), key=lambda n: facts["valid"][n]["auc"])
    assert facts["best_epoch"] == best + 1
    assert facts["selected_on"] == "valid"
    tuned = artifact(storage, "score", "mixed").read()["logit_yes"].to_numpy()
    zero = artifact(storage, "score", "zero-shot").read()["logit_yes"].to_numpy()
    assert not np.allclose(tuned, zero)


def test_a_second_run_takes_everything_as_it_is(main_run: Run, storage: Path, model_folder: Path) -> None:
    before = {a.path: a.manifest().created for a in list_artifacts(Storage(str(storage)))}
    again = job("reit", storage, model_folder, "--variants", "ours,wo-retrieval,wo-it")
    assert again.code == 0, again.err
    assert again.figures["variants"] == main_run.figures["variants"]
    assert again.figures["seconds"] < 20
    assert "made" not in again.out
    assert {a.path: a.manifest().created for a in list_artifacts(Storage(str(storage)))} == before


def test_another_learning_rate_shares_every_upstream_artifact(main_run: Run, storage: Path, model_folder: Path) -> None:
    from rella.dist.run import Runner

    values = {**SETTING, "storage": str(storage), "model": str(model_folder)}
    runner = Runner(resolve({**values, "tune.learning_rate": 0.02}).experiment)
    stages = {s.name: s.artifact(runner.storage).is_complete() for s in runner.pipeline(runner.experiment).stages()}
    assert stages == {"prepare": True, "embed": True, "pca": True, "retrieve": True, "reit": False, "score": False}


def test_scoring_with_a_copied_adapter_and_another_k(
    main_run: Run, storage: Path, model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "my-adapter"
    shutil.copytree(artifact(storage, "reit", "mixed").local_folder("adapter"), folder)
    run = job(
        "score", storage, model_folder, "--adapter", str(folder), "--k", "6", setting={**SETTING, "test_rows": 80}
    )
    assert run.code == 0, run.err
    assert run.figures["rows"] == 80
    manifest = artifact(storage, "score", "-adapter-").manifest()
    assert manifest.config["score.k"] == 6
    assert manifest.identity["adapter"]


def test_a_missing_or_foreign_adapter_is_an_error_never_zero_shot(
    main_run: Run, storage: Path, model_folder: Path, tmp_path: Path
) -> None:
    absent = job("score", storage, model_folder, "--tune.learning-rate", "0.5")
    assert absent.code == 1
    assert "there is no adapter at" in absent.err
    assert "--adapter none" in absent.err

    empty = job("score", storage, model_folder, "--adapter", str(tmp_path))
    assert empty.code == 1
    assert "has no adapter_config.json" in empty.err
    assert "--adapter none" in empty.err

    folder = tmp_path / "foreign"
    shutil.copytree(artifact(storage, "reit", "mixed").local_folder("adapter"), folder)
    base = json.loads((folder / "rella_base.json").read_text())
    (folder / "rella_base.json").write_text(json.dumps(base | {"digest": "0" * 64, "name": "other"}))
    foreign = job("score", storage, model_folder, "--adapter", str(folder))
    assert foreign.code == 1
    assert "was tuned on other" in foreign.err
    assert "Traceback" not in foreign.err


SONGS = {"precision": "float32", "k": 4, "shots": 24, "test_rows": 60, "tune.max_epochs": 1, "tune.valid_rows": 30}


def test_your_own_data_run_the_whole_main_job(tmp_path: Path, model_folder: Path) -> None:
    """Songs with play counts: another domain, no stars, described by one YAML file."""
    flags = ("--dataset", "examples/songs/songs.yaml")
    run = job("reit", tmp_path, model_folder, *flags, setting=SONGS)
    assert run.code == 0, run.err
    assert run.figures["dataset"] == "songs"
    assert run.figures["rows"] == 60
    assert 0 <= run.figures["variants"]["ours"]["auc"] <= 1
    assert "48 rows of 24 samples" in run.out
    stages = {a.path.split("/")[1] for a in list_artifacts(Storage(str(tmp_path))) if a.path.startswith("songs/")}
    assert stages == {"prepare", "embed", "pca", "retrieve", "reit", "score"}
    shown = job("score", tmp_path, model_folder, *flags, "--show", "1", setting=SONGS)
    assert shown.code == 0, shown.err
    assert "The user listened to the following songs in the past, with the number of plays:" in shown.out
    assert "[retrieved, K = 4: " in shown.out
    assert "Here is a song. Its title is " in shown.out


def test_more_workers_than_the_cluster_has_says_what_is_missing(
    storage: Path, model_folder: Path, tmp_path: Path
) -> None:
    run = job("embed", tmp_path, model_folder, "--cluster.workers", "999")
    assert run.code == 1
    assert "needs 999 CPUs where the cluster has" in run.err
    assert "Traceback" not in run.err


def test_an_unknown_flag_and_an_unknown_data_set_are_refused(tmp_path: Path, model_folder: Path) -> None:
    wrong = job("prepare", tmp_path, model_folder, "--learning-rate", "1")
    assert wrong.code == 2
    assert "--learning_rate" in wrong.err
    unknown = job("prepare", tmp_path, model_folder, "--dataset", "netflix")
    assert unknown.code == 1
    assert "unknown data set 'netflix'" in unknown.err
