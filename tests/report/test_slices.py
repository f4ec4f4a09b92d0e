"""Slices and calibration against plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from rella.report.contents import Value
from rella.report.slices import FEWEST, Scored, calibration, calibration_chart, counts, cuts, slice_table


def test_cuts_cover_every_row_once() -> None:
    rng = np.random.default_rng(0)
    for values in (rng.integers(0, 50, 500), rng.zipf(1.5, 300), np.zeros(5, int), np.full(7, 3), np.array([1, 9])):
        found = cuts(values)
        assert (sum(members.astype(int) for _, members in found) == 1).all()
        assert ("0 (cold)" in [name for name, _ in found]) == (values == 0).any()


def test_names_say_what_is_in_them() -> None:
    values = np.array([0, 0, 1, 2, 3, 4, 5, 6, 7, 8])
    found = {name: values[members].tolist() for name, members in cuts(values, parts=2)}
    assert found == {"0 (cold)": [0, 0], "1 to 3": [1, 2, 3], "4 to 8": [4, 5, 6, 7, 8]}


def world(rows: int = 600) -> tuple[Scored, dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, rows)
    scored = Scored(labels, rng.integers(5, 90, rows), rng.integers(0, 30, rows), rng.integers(0, 3, rows))
    return scored, {"base": rng.random(rows), "ours": np.clip(labels * 0.3 + rng.random(rows) * 0.7, 0, 1)}


def test_slices_are_the_auc_of_their_rows() -> None:
    scored, models = world()
    table = slice_table(scored, models, "caption")
    assert [c.key for c in table.columns] == ["rows", "positive", "base", "ours"]
    whole = table.rows[0]
    above, below = (models["ours"][scored.labels == y] for y in (1, 0))
    expected = float(((above[:, None] > below) + 0.5 * (above[:, None] == below)).mean())
    assert whole.cells["ours"].value == pytest.approx(expected)
    cold = next(row for row in table.rows if row.title == "0 (cold)" and row.group.startswith("User"))
    rows = scored.activity == 0
    assert cold.cells["rows"].value == rows.sum()
    assert cold.cells["positive"].value == pytest.approx(scored.labels[rows].mean())
    for feature in scored.features():
        assert sum(r.cells["rows"].value for r in table.rows if r.group == feature) == len(scored.labels)


def test_a_slice_with_too_few_of_a_class_has_no_auc() -> None:
    scored, models = world()
    labels = np.where(scored.activity == 2, 1, scored.labels)
    labels[np.flatnonzero(scored.activity == 2)[: FEWEST - 1]] = 0
    table = slice_table(Scored(labels, scored.history, scored.popularity, scored.activity), models, "")
    (row,) = [r for r in table.rows if r.group.startswith("User") and r.title == "2"]
    assert "ours" not in row.cells
    assert isinstance(row.cells["rows"], Value)


def test_calibration_by_hand() -> None:
    # Ten parts of two rows each: of the lower ones none is positive, of the upper ones all are.
    probabilities = np.repeat(np.arange(10) / 10 + 0.05, 2)
    labels = (probabilities > 0.5).astype(int)
    points, error = calibration(labels, probabilities)
    assert [p.y for p in points] == [0] * 5 + [1] * 5
    assert [p.x for p in points] == pytest.approx(np.arange(10) / 10 + 0.05)
    assert error == pytest.approx(np.mean(np.abs(labels - probabilities)))


def test_right_probabilities_have_a_small_error() -> None:
    rng = np.random.default_rng(3)
    p = rng.random(20_000)
    labels = (rng.random(20_000) < p).astype(int)
    assert calibration(labels, p)[1] < 0.02
    assert calibration(labels, np.full(20_000, 0.9))[1] == pytest.approx(0.4, abs=0.02)
    chart = calibration_chart(labels, {"right": p}, "")
    assert chart.diagonal
    assert "ECE" in chart.series[0].title


def test_counts_of_training_samples() -> None:
    assert counts(np.array([2, 0, 2, 3]), np.array([2, 2, 0]), 4).tolist() == [2, 1, 2, 0]
