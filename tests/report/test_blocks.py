"""A report's numbers, recomputed from the scores by a few lines of their own; stars, ranks and improvements."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from rella.cli import resolve
from rella.metrics import bootstrap_users, delong, mcnemar, paired_t
from rella.paper.experiments import Maker, Run, exhibits, paper_scale
from rella.paper.numbers import printed
from rella.report.blocks import Comparison, Measured, best_line, block
from rella.report.contents import Chart, Table, Value

ROWS, USERS = 400, 40


def world(dataset: str = "sample") -> tuple[Maker, dict[Run, np.ndarray], np.ndarray, np.ndarray]:
    """Scores of every run: the truth and noise, less of it for ReLLa with many shots."""
    base = resolve({"dataset": dataset, "model": "tiny"}).experiment
    scale = replace(paper_scale(dataset), backbones=("tiny",), titles={})
    maker = Maker(base, scale)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, ROWS)
    runs = dict.fromkeys(run for e in exhibits(["table2", "table3", "table4", "figure7"], maker) for run in e.runs())
    probability = {}
    for run in runs:
        e = run.experiment
        noise = 3.0 if run.baseline or e.adapter == "none" else (0.5 if e.shots == scale.few[-1] else 1.5)
        probability[run] = 1 / (1 + np.exp(-(2 * labels - 1 + noise * rng.normal(size=ROWS))))
    return maker, probability, labels, rng.integers(0, USERS, ROWS)


def pairs_auc(labels: np.ndarray, p: np.ndarray) -> float:
    above, below = p[labels == 1][:, None], p[labels == 0][None, :]
    return float(((above > below) + 0.5 * (above == below)).mean())


def measured(probability: dict[Run, np.ndarray], labels: np.ndarray, users: np.ndarray) -> dict[Run, Measured]:
    return {run: Measured([bootstrap_users(users, labels, p)]) for run, p in probability.items()}


def comparison(probability, labels, ours, baseline) -> Comparison:
    first, second = probability[ours.runs[0]], probability[baseline.runs[0]]
    return Comparison(ours, baseline, [test(labels, first, second) for test in (delong, paired_t, mcnemar)])


def test_every_cell_is_what_the_scores_say() -> None:
    maker, probability, labels, users = world()
    results = measured(probability, labels, users)
    for exhibit in exhibits(["table2", "table3"], maker):
        table = block(exhibit, results, "caption")
        assert isinstance(table, Table)
        for line, row in zip(exhibit.lines, table.rows, strict=True):
            p = probability[line.runs[0]]
            assert row.cells["auc"].value == pytest.approx(pairs_auc(labels, p), abs=1e-12)
            loss = -np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p))
            assert row.cells["log_loss"].value == pytest.approx(loss, abs=1e-12)
            assert row.cells["accuracy"].value == pytest.approx(np.mean((p >= 0.5) == labels), abs=1e-12)


def test_relative_improvement_is_over_the_better_few_shot_row() -> None:
    maker, probability, labels, users = world()
    (exhibit,) = exhibits(["table2"], maker)
    table = block(exhibit, measured(probability, labels, users), "caption")
    best = max(pairs_auc(labels, probability[line.runs[0]]) for line in exhibit.lines if line.group == "Few-shot")
    for line, row in zip(exhibit.lines, table.rows, strict=True):
        if line.title.startswith("ReLLa"):
            assert "rel_impr" not in row.cells
        else:
            expected = best / pairs_auc(labels, probability[line.runs[0]]) - 1
            assert row.cells["rel_impr"].value == pytest.approx(expected, abs=1e-12)


def test_the_star_is_delong_s_at_the_paper_s_level() -> None:
    maker, probability, labels, users = world()
    results = measured(probability, labels, users)
    (exhibit,) = exhibits(["table2"], maker)
    few, full = ([line for line in exhibit.lines if line.group == g] for g in ("Few-shot", "Full-shot"))
    ours, baseline = best_line(few, results), best_line(full, results)
    found = comparison(probability, labels, ours, baseline)
    table = block(exhibit, results, "caption", found)
    starred = [row.title for row in table.rows if any(isinstance(c, Value) and c.star for c in row.cells.values())]
    assert starred == [ours.title]
    assert "DeLong" in table.notes[0]
    # The other way round nothing is starred, however small p is.
    other = comparison(probability, labels, baseline, ours)
    assert not other.significant
    assert other.note().startswith("No *")
    # A pair that differs by chance alone is none either.
    rng = np.random.default_rng(1)
    near = {**probability, ours.runs[0]: np.clip(probability[baseline.runs[0]] + 1e-3 * rng.normal(size=ROWS), 0, 1)}
    assert not comparison(near, labels, ours, baseline).significant


def test_several_seeds_give_mean_and_standard_deviation() -> None:
    rng = np.random.default_rng(2)
    labels, users = rng.integers(0, 2, 200), rng.integers(0, 20, 200)
    seeds = [rng.random(200) for _ in range(3)]
    value = Measured([bootstrap_users(users, labels, p) for p in seeds]).value("auc", paper=0.5)
    aucs = [pairs_auc(labels, p) for p in seeds]
    assert value.value == pytest.approx(np.mean(aucs))
    assert value.spread == pytest.approx(stats.tstd(aucs))
    assert value.seeds == pytest.approx(tuple(aucs))
    assert value.difference == pytest.approx(np.mean(aucs) - 0.5)


def test_the_paper_s_number_stands_beside_ours() -> None:
    maker, probability, labels, users = world("ml-1m")
    (exhibit,) = exhibits(["table2"], maker)
    table = block(exhibit, measured(probability, labels, users), "caption")
    sim = next(row for row in table.rows if row.title == "SIM")
    paper = printed("table2", "ml-1m", "full-shot", "SIM")
    assert [sim.cells[m].paper for m in ("auc", "log_loss", "accuracy")] == [paper.auc, paper.log_loss, paper.accuracy]
    assert sim.cells["rel_impr"].paper == pytest.approx(0.0051)


def test_figure_7_is_a_curve_over_n_with_the_full_shot_level() -> None:
    maker, probability, labels, users = world()
    (exhibit,) = exhibits(["figure7"], maker)
    chart = block(exhibit, measured(probability, labels, users), "caption")
    assert isinstance(chart, Chart)
    assert chart.log_x
    for line, series in zip(exhibit.lines, chart.series, strict=True):
        assert [point.x for point in series.points] == list(exhibit.x)
        expected = [pairs_auc(labels, probability[run]) for run in line.runs]
        assert [point.y for point in series.points] == pytest.approx(expected, abs=1e-12)
    assert chart.level is not None
    assert chart.level[1] == pytest.approx(pairs_auc(labels, probability[exhibit.level.runs[0]]), abs=1e-12)


def test_baselines_alone_have_no_improvement_over_them() -> None:
    maker, probability, labels, users = world()
    (exhibit,) = exhibits(["table2"], maker, "baselines")
    assert all(line.runs[0].baseline for line in exhibit.lines)
    table = block(exhibit, measured(probability, labels, users), "caption")
    assert [c.key for c in table.columns] == ["auc", "log_loss", "accuracy"]
    (exhibit,) = exhibits(["table2"], maker, "llm")
    assert {line.group for line in exhibit.lines} == {"Zero-shot", "Few-shot"}
