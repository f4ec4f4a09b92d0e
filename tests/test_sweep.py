"""Spaces to trials, the best of each N, and files that run it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from rella.baselines import Baseline
from rella.cli import parse, resolve
from rella.errors import InputError, MissingError
from rella.sweep import Finished, Trial, best_by_shots, read_space, trials_of, yaml_of
from rella.sweep_config import SweepConfig

ML_1M = resolve({"dataset": "ml-1m", "model": "vicuna-13b"}).experiment
SAMPLE = resolve({}).experiment


def test_the_papers_grid() -> None:
    trials = trials_of(SweepConfig(), ML_1M)
    settings = {(t.experiment.tune.learning_rate, t.experiment.tune.batch_size, t.shots) for t in trials}
    shots = (512, 1024, 2048, 4096, 8192, 65536)
    assert settings == {(r, b, n) for r in (1e-3, 1.5e-3) for b in (128, 256) for n in shots}
    assert len(trials) == 24
    assert {t.experiment.dataset for t in trials} == {"ml-1m"}


def test_without_a_list_n_is_the_experiment_s() -> None:
    assert {t.shots for t in trials_of(SweepConfig(), SAMPLE)} == {512}
    assert [t.shots for t in trials_of(SweepConfig(shots=(8, "all")), SAMPLE)] == [8] * 4 + ["all"] * 4


@pytest.mark.parametrize("method", get_args(Baseline))
def test_every_baseline_has_a_grid(method: Any) -> None:
    trials = trials_of(SweepConfig(method=method), ML_1M)
    assert {t.experiment.baseline.model for t in trials} == {method}
    assert len(trials) == len({t.experiment for t in trials})
    if method == "din":
        # Embedding, dropout, batch, attention layers, layers, width: Appendix C.1.
        assert len(trials) == 2 * 3 * 2 * 3 * 3 * 3


def test_drawn_settings_are_the_same_for_every_n_and_every_run() -> None:
    config = SweepConfig(space="wide", trials=5, shots=(64, 128), seed=3)
    trials = trials_of(config, SAMPLE)
    assert [t.experiment for t in trials] == [t.experiment for t in trials_of(config, SAMPLE)]
    own = [{k: v for k, v in t.values.items() if k != "shots"} for t in trials]
    assert own[:5] == own[5:]
    assert len({v["tune.learning_rate"] for v in own}) == 5
    assert all(1e-4 <= v["tune.learning_rate"] <= 1e-2 for v in own)
    other = trials_of(SweepConfig(space="wide", trials=5, shots=(64,), seed=4), SAMPLE)
    assert [t.values for t in other] != [t.values for t in trials[:5]]


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text("tune.lora-rank: [4, 8]\nk: [5]\ntune.clip: {low: 0.1, high: 1.0}\n")
    trials = trials_of(SweepConfig(space=str(file), trials=3), SAMPLE)
    assert len(trials) == 3
    assert {t.experiment.k for t in trials} == {5}
    assert all(0.1 <= t.experiment.tune.clip <= 1.0 for t in trials)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tune.learning-rat: [1]", "tune.learning_rat is no field"),
        ("storage: [a]", "storage is no field that changes a result"),
        ("k: 5", "k is 5; give a list"),
        ("k: []", "give a list"),
        ("tune.clip: {low: 1.0}", "has the keys low, high and log"),
        ("tune.clip: {low: 1, high: 2, base: 10}", "has the keys low, high and log"),
        ("tune.clip: {low: 2, high: 1}", "low must be less than high"),
        ("tune.clip: {low: 0, high: 1, log: true}", "above 0 with log"),
        ("- k", "give field: "),
        ("k: [", "not YAML"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=rf"space\.yaml: .*{said}"):
        read_space(SweepConfig(space=str(file)), "sample")


def test_a_wrong_value_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    file.write_text("tune.batch_size: [big]")
    with pytest.raises(InputError, match="batch_size"):
        trials_of(SweepConfig(space=str(file)), SAMPLE)


def test_no_such_space() -> None:
    with pytest.raises(MissingError, match="no such file"):
        read_space(SweepConfig(space="nowhere.yaml"), "sample")
    with pytest.raises(InputError, match="din has the paper's grid only"):
        read_space(SweepConfig(method="din", space="wide"), "sample")


def finished(trial: Trial, auc: float, loss: float = 0.6, stopped: bool = False) -> Finished:
    return Finished(trial, {"auc": auc, "log_loss": loss, "step": 1}, stopped=stopped)


def test_the_best_of_each_n() -> None:
    trials = trials_of(SweepConfig(shots=("all", 64)), SAMPLE)
    said = [0.7, 0.8, 0.8, 0.9, 0.5, 0.6, 0.4, 0.6]
    losses = [0.5, 0.6, 0.5, 0.5, 0.5, 0.5, 0.5, 0.4]
    all_ = [finished(t, a, x, stopped=a == 0.9) for t, a, x in zip(trials, said, losses, strict=True)]
    best = best_by_shots(all_)
    assert list(best) == [64, "all"]
    assert best[64] is all_[7], "of equals the one with the lower log loss"
    assert best["all"] is all_[2], "what was stopped early is not chosen"


def test_a_file_runs_the_setting_again(tmp_path: Path) -> None:
    words = ["--dataset", "sample", "--k", "5", "--tune.max-epochs", "2", "--sweep.shots", "[32, 64]"]
    resolved = parse(words, "jobs/sweep.py", "", group="sweep")
    assert resolved.sweep == SweepConfig(shots=(32, 64))
    trial = trials_of(resolved.sweep, resolved.experiment)[6]
    file = tmp_path / "best.yaml"
    file.write_text(yaml_of(trial, {"dataset": "sample", "k": 5, "tune.max_epochs": 2}, "a note"))
    assert file.read_text().startswith("# a note\n")
    assert parse(["--config", str(file)], "jobs/reit.py", "").experiment == trial.experiment
    # A file may hold the sweep's own settings too, in a sweep.
    both = tmp_path / "both.yaml"
    both.write_text("k: 7\nsweep:\n  trials: 3\n")
    found = parse(["--config", str(both)], "jobs/sweep.py", "", group="sweep")
    assert (found.experiment.k, found.sweep) == (7, SweepConfig(trials=3))


@pytest.mark.parametrize(
    "words",
    [["--sweep.trial", "3"], ["--sweep.method", "vicuna"], ["--sweep.shots", "[few]"], ["--sweep.at-once", "x"]],
)
def test_unknown_flags_of_a_sweep_leave(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(words, "jobs/sweep.py", "", group="sweep")
    assert left.value.code == 2
    assert words[0].split(".")[1].replace("-", "_") in capsys.readouterr().err


def test_other_jobs_have_no_flags_of_a_sweep() -> None:
    with pytest.raises(SystemExit):
        parse(["--sweep.trials", "3"], "jobs/reit.py", "")
