"""Reports through the command line: numbers recomputed from the scores, curves against records, nothing made twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rella.dist.jobs import report_words
from tests.test_tracking import curves

ROOT = Path(__file__).resolve().parents[2]
WORDS = (
    "table1",
    "table2",
    "table6",
    "table9",
    "figure8",
    "--data.sample-users=60",
    "--k=4",
    "--test-rows=120",
    "--tune.max-epochs=2",
    "--tune.valid-rows=40",
    "--tune.valid-per-epoch=2",
    "--report.few=[32, 64]",
    "--report.lengths=[2, 4]",
    "--report.backbones=[tiny]",
    "--report.baselines=[din]",
    "--report.batches=3",
    "--baseline.max-epochs=2",
)


def job(storage: Path, out: Path, *words: str) -> tuple[int, str, dict[str, Any]]:
    command = [sys.executable, "jobs/report.py", *words, "--storage", str(storage), "--report.out", str(out)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "RELLA_"))}
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=900, check=False)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    return done.returncode, done.stdout + done.stderr, json.loads(last) if last.startswith("{") else {}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str, dict[str, Any]]:
    storage, out = tmp_path_factory.mktemp("storage"), tmp_path_factory.mktemp("report")
    code, output, figures = job(storage, out, *WORDS)
    assert code == 0, output
    return storage, out, output, figures


def scores(results: dict[str, Any], *words: str) -> tuple[np.ndarray, np.ndarray]:
    (place,) = [p for name, p in results["artifacts"].items() if all(word in name for word in words)]
    table = pq.read_table(sorted(Path(place, "parts").glob("*.parquet")))
    return table["label"].to_numpy(), table["probability"].to_numpy()


def metrics(labels: np.ndarray, p: np.ndarray) -> list[float]:
    above, below = p[labels == 1][:, None], p[labels == 0][None, :]
    loss = -np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p))
    return [((above > below) + 0.5 * (above == below)).mean(), loss, np.mean((p >= 0.5) == labels)]


@pytest.mark.ray
def test_numbers_are_what_the_scores_say(made) -> None:
    _, out, _, figures = made
    results = json.loads((out / "results.json").read_text())
    assert figures["tables"] == ["table1", "table2", "table6", "table9", "slices"]
    assert figures["figures"] == ["figure8", "calibration"]
    rows = {(row["group"], row["title"]): row for row in results["blocks"]["table2"]["rows"]}
    wanted = {
        ("Zero-shot", "tiny"): ("tiny, zero-shot", "recent"),
        ("Zero-shot", "ReLLa (Ours)"): ("tiny, zero-shot", "retrieved"),
        ("Full-shot", "DIN"): ("din, N = all",),
        ("Few-shot", "ReLLa (<1%, N = 32)"): ("tiny, N = 32",),
        ("Few-shot", "ReLLa (<10%, N = 64)"): ("tiny, N = 64",),
    }
    least = rows.pop(("Full-shot", "Floor (shrunk means of user and item)"))
    assert 0.5 < least["auc"]["value"] < 1
    assert rows.keys() == wanted.keys()
    for name, words in wanted.items():
        labels, p = scores(results, *words)
        assert len(p) == 120
        found = [rows[name][m]["value"] for m in ("auc", "log_loss", "accuracy")]
        assert found == pytest.approx(metrics(labels, p), abs=1e-9), name
    facts = {row["title"]: row for row in results["blocks"]["table1"]["rows"]}["sample"]
    assert facts["users"]["value"] == 60


@pytest.mark.ray
def test_tables_6_and_9_and_figure_8(made) -> None:
    blocks = json.loads((made[1] / "results.json").read_text())["blocks"]
    sim, ours = blocks["table6"]["rows"]
    assert sim["parameters"]["value"] == sim["trainable"]["value"]
    # LoRA of rank 8 on q and v of four layers of width 192: 4 · 2 · 8 · (192 + 192).
    assert ours["trainable"]["value"] == 4 * 2 * 8 * 384
    assert ours["parameters"]["value"] > 1e6
    assert min(sim["milliseconds"]["value"], ours["milliseconds"]["value"]) > 0
    recent, retrieved = blocks["table9"]["rows"]
    for row in (recent, retrieved):
        assert 1 <= row["2"]["value"] <= 2
        assert row["2"]["value"] <= row["4"]["value"] <= 4
    base, zero, few = blocks["figure8"]["rows"]
    assert zero["labels"] == few["labels"], "one prompt, with and without the adapter"
    assert all(0 < sum(row["values"]) < 1 and len(row["values"]) == len(row["labels"]) for row in (base, zero, few))
    assert zero["values"] != few["values"]


@pytest.mark.ray
def test_the_page_and_its_figures_are_there(made) -> None:
    out = made[1]
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    for title in ("Table 1", "Table 2", "Table 6", "Table 9", "Figure 8", "Calibration", "AUC by slice"):
        assert title in page
        assert title in text
    assert "http://" not in page.replace("http://www.w3.org", "")
    for name in ("figure8", "calibration"):
        assert (out / "figures" / f"{name}.svg").stat().st_size > 1000
        assert (out / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.ray
def test_tensorboard_s_curves_are_the_checkpoints_records(made) -> None:
    storage = made[0]
    trained = [m for m in storage.glob("sample/*/*/manifest.json") if m.parent.parent.name in ("reit", "baseline")]
    assert len(trained) == 4  # two adapters, DIN, SIM
    for manifest in trained:
        facts, folder = json.loads(manifest.read_text())["facts"], manifest.parent.relative_to(storage)
        found = curves(storage / "tensorboard" / folder)
        assert [step for step, _ in found["train/loss"]] == list(range(1, facts["steps"] + 1))
        np.testing.assert_allclose([loss for _, loss in found["train/loss"]], facts["losses"], atol=2e-6)
        for name in ("auc", "log_loss", "accuracy"):
            right = [(v["step"], v[name]) for v in facts["valid"]]
            assert [step for step, _ in found[f"valid/{name}"]] == [step for step, _ in right]
            np.testing.assert_allclose([v for _, v in found[f"valid/{name}"]], [v for _, v in right], rtol=1e-6)


@pytest.mark.ray
def test_a_second_run_makes_nothing_but_the_page(made, tmp_path: Path) -> None:
    storage, out, _, _ = made
    words = [w for w in WORDS if w not in ("table6", "table9", "figure8")]
    code, output, _ = job(storage, tmp_path, *words)
    assert code == 0, output
    assert " made " not in output
    assert "ray       ready" not in output
    first, second = (json.loads((f / "results.json").read_text())["blocks"]["table2"] for f in (out, tmp_path))
    assert first == second


def test_names_in_front_are_the_flag() -> None:
    assert report_words(["table2,figure7", "figure1", "--k", "5"]) == [
        '--report.what=["table2", "figure7", "figure1"]',
        "--k",
        "5",
    ]
    assert report_words(["--k", "5"]) == ["--k", "5"]


def test_an_unknown_name_ends_at_once(tmp_path: Path) -> None:
    code, output, _ = job(tmp_path, tmp_path, "table12")
    assert code == 1
    assert "unknown table12; there are table1" in output
