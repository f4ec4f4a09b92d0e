"""`--plan` through the jobs' own entry, in one process: nothing but the data set is made, and Ray does not start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rella.artifacts import Manifest, list_artifacts
from rella.cli import parse
from rella.dist.jobs import embed_job, main, prepare_job, reit_job, retrieve_job, score_job
from rella.dist.plan import stages_of
from rella.dist.run import Runner
from rella.storage import Storage

ACTIONS = {"embed": embed_job, "reit": reit_job, "score": score_job, "retrieve": retrieve_job, "prepare": prepare_job}
SMALL = ["--data.sample-users", "60", "--test-rows", "100"]


@pytest.fixture
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def planned(
    capsys: pytest.CaptureFixture[str], storage: Path, name: str, *flags: str
) -> tuple[int, str, dict[str, Any]]:
    code = main(name, "a job", ACTIONS[name], ["--storage", str(storage), *SMALL, *flags])
    seen = capsys.readouterr()
    return code, seen.out + seen.err, json.loads(seen.out.splitlines()[-1]) if code == 0 else {}


def test_every_stage_of_the_main_job(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import ray

    code, out, figures = planned(capsys, tmp_path, "reit", "--plan", "2xcpu", "--shots", "64", "--seeds", "2")
    assert code == 0
    assert not ray.is_initialized()
    assert {a.path.split("/")[1] for a in list_artifacts(Storage(str(tmp_path)))} == {"prepare"}
    kinds = [s["stage"].split()[0] for s in figures["stages"]]
    # Four tuned rows of Table 3 with two seeds each; two more are scored without tuning.
    assert kinds == ["embed", "retrieve", *["reit"] * 8, *["score"] * 10]
    assert all(s["fits"] for s in figures["stages"])
    assert "tokens are counted by the model's tokenizer" in out
    assert "weights of the base: 2,164,416 × 4 bytes" in out
    assert "128 prompts of" in out
    assert "as of reit tiny-n64-k8-mixed-seed0" in out, "the same memory is told once"


@pytest.mark.usefixtures("_no_hub")
def test_a_backbone_of_the_paper_without_the_hub(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["--model", "vicuna-13b", "--k", "30", "--shots", "512", "--variants", "ours"]
    code, out, figures = planned(capsys, tmp_path, "reit", "--plan", "8xv100-32gb", *flags)
    assert code == 0
    assert "estimated from 3 characters a token" in out
    assert "weights of the base: 13,015,864,320 × 2 bytes" in out
    fits = {s["stage"].split()[0]: s["fits"] for s in figures["stages"]}
    assert fits == {"embed": True, "retrieve": True, "reit": False, "score": True}
    assert "with --tune.gradient-checkpointing full (a third more time)" in out
    code, out, figures = planned(capsys, tmp_path, "score", "--plan", "8xv100-16gb", *flags, "--precision", "bfloat16")
    assert [s["fits"] for s in figures["stages"]] == [False, True, False]
    assert "v100-16gb has no bfloat16: take --precision float16" in out
    assert "take larger cards, or --model vicuna-7b (12.6 GiB of weights)" in out


def test_what_is_there_takes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"card": "h100", "gpus": 1, "cpus": 16}))
    flags = ["--plan", str(file), "--storage", str(tmp_path / "s")]
    _, out, figures = planned(capsys, tmp_path / "s", "retrieve", *flags)
    assert [s["stage"].split()[0] for s in figures["stages"]] == ["embed", "retrieve"]
    assert "/ 16 cores" in out
    with Runner(parse([*SMALL, *flags], "retrieve", "").experiment) as runner:
        stage = next(stages_of(runner, runner.model, "embed"))[0]
        stage.artifact(runner.storage).finish(Manifest("embed", 1, stage.key, "sample", {}, {}, {}, []))
    _, out, figures = planned(capsys, tmp_path / "s", "retrieve", *flags)
    assert [s["seconds"] > 0 for s in figures["stages"]] == [False, True]
    assert f"embed {stage.slug}: is there" in out


@pytest.mark.parametrize(
    ("name", "said", "message"),
    [
        ("prepare", "1xh100", r"--plan goes with the jobs embed, retrieve, reit, score"),
        ("reit", "8xv999", r"card 'v999' is not known"),
        ("reit", "many", r"say how many of which card, such as 8xv100-32gb"),
    ],
)
def test_what_cannot_be_planned(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, said: str, message: str
) -> None:
    code, out, _ = planned(capsys, tmp_path, name, "--plan", said)
    assert code == 1
    assert message in out
