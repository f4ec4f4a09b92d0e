"""Table 3 as text: means, spreads, marks, alignment."""

from __future__ import annotations

import math

import pytest

from rella.metrics import BootstrapEstimates, Estimate
from rella.report.tables import Row, table3


def run(auc: float, loss: float, accuracy: float, error: float = 0.01) -> BootstrapEstimates:
    values = [Estimate(v, error, v - 2 * error, v + 2 * error) for v in (auc, loss, accuracy)]
    return BootstrapEstimates(*values, users=10, replicates=200)


def test_one_seed_shows_the_bootstrap_s_error() -> None:
    row = Row("ReLLa (Ours)", [run(0.8033, 0.5362, 0.73, 0.0123)])
    assert row.cell("auc") == "0.8033 ±0.0123"
    assert row.cell("log_loss") == "0.5362 ±0.0123"
    assert row.values("auc") == [0.8033]


def test_several_seeds_show_their_own_spread() -> None:
    row = Row("x", [run(0.7, 0.5, 0.6), run(0.8, 0.5, 0.6), run(0.9, 0.5, 0.9)])
    assert row.mean("auc") == pytest.approx(0.8)
    assert row.cell("auc") == "0.8000 ±0.1000"
    assert row.cell("log_loss") == "0.5000 ±0.0000"
    spread = math.sqrt((0.1**2 + 0.1**2 + 0.2**2) / 2)
    assert row.cell("accuracy") == f"0.7000 ±{spread:.4f}"


def test_a_whole_table() -> None:
    rows = [
        Row("ReLLa (Ours)", [run(0.8, 0.5, 0.7)]),
        Row("ReLLa (w/o Mixture)", [run(0.79, 0.4, 0.702)]),
        Row("ReLLa (w/o IT)", [run(0.7, 0.9, 0.71)]),
    ]
    assert table3(rows, "sample, test split, 200 rows").splitlines() == [
        "sample, test split, 200 rows",
        "-" * 70,
        "Model Variant        AUC              Log Loss         ACC",
        "-" * 70,
        "ReLLa (Ours)         0.8000 ±0.0100*  0.5000 ±0.0100_  0.7000 ±0.0100",
        "ReLLa (w/o Mixture)  0.7900 ±0.0100_  0.4000 ±0.0100*  0.7020 ±0.0100_",
        "ReLLa (w/o IT)       0.7000 ±0.0100   0.9000 ±0.0100   0.7100 ±0.0100*",
        "-" * 70,
        "* best, _ second best of a column",
    ]


def marked(text: str, title: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"{title} "))
    words = line.removeprefix(title).split("±")[1:]
    return [next((c for c in w if c in "*_"), " ") for w in words]


def test_a_smaller_log_loss_is_better() -> None:
    text = table3([Row("a", [run(0.6, 0.3, 0.6)]), Row("b", [run(0.7, 0.6, 0.7)]), Row("c", [run(0.5, 0.5, 0.5)])], "")
    assert marked(text, "a") == ["_", "*", "_"]
    assert marked(text, "b") == ["*", " ", "*"]
    assert marked(text, "c") == [" ", "_", " "]


def test_a_single_row() -> None:
    text = table3([Row("zero-shot", [run(0.55, 0.7, 0.5)])], "caption")
    assert text.splitlines()[0] == "caption"
    assert marked(text, "zero-shot") == ["*", "*", "*"]


def test_means_decide_the_marks_not_single_seeds() -> None:
    rows = [Row("even", [run(0.8, 0.5, 0.5)] * 2), Row("uneven", [run(0.95, 0.5, 0.5), run(0.55, 0.5, 0.5)])]
    text = table3(rows, "")
    assert (marked(text, "even")[0], marked(text, "uneven")[0]) == ("*", "_")
