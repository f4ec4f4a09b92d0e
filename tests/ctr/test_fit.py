"""Fitting: one curve on any number of workers, resumed to the bit, the best step kept, signals learnt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rella.artifacts import Artifact
from rella.baselines import BaselineConfig
from rella.ctr.batches import Batches, Recent, Retrieved
from rella.ctr.features import Features
from rella.ctr.fit import Fitted, Fitter, load_weights, predict, share, weights_of
from rella.ctr.models import MODELS, build
from rella.data.selection import Chosen
from rella.data.tables import Tables
from rella.errors import ArtifactError, InputError, TrainingError
from rella.lm.checkpoints import Checkpoints
from rella.lm.tuning import Progress
from rella.metrics import evaluate
from rella.storage import Storage
from tests.ctr.fit_script import KEY, fit_config
from tests.ctr.worlds import FIELDS, everything, sample_world, tables_of

CPU = torch.device("cpu")
REPO = Path(__file__).resolve().parents[2]
Report = Callable[[Progress], None]


class Killed(Exception):
    """Stands for a process that dies."""


def quiet(progress: Progress) -> None:
    pass


def states(folder: Path) -> Checkpoints:
    return Checkpoints(Artifact(Storage(str(folder)), f"d/ctr/x-{KEY[:12]}", KEY))


def fitter(config: BaselineConfig, report: Report = quiet, checkpoints: Checkpoints | None = None) -> Fitter:
    world = sample_world()
    model = build(config, world.features, 6, seed=0)
    train, valid = world.batches(config, "train", 6), world.batches(config, "valid", 6)
    return Fitter(model, train, valid, config, 3, CPU, report, checkpoints=checkpoints)


def same(a: Fitted, b: Fitted) -> bool:
    return (
        (a.course.losses, a.course.valid, a.course.best_step) == (b.course.losses, b.course.valid, b.course.best_step)
        and a.best.keys() == b.best.keys()
        and all(torch.equal(a.best[n], b.best[n]) for n in a.best)
    )


def on_workers(folder: Path, world: int, model: str, storages: list[str]) -> list[list[dict[str, Any]]]:
    """Return, for every worker, what it found with each storage."""
    folder.mkdir()
    script = str(REPO / "tests" / "ctr" / "fit_script.py")
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(world):
        arguments = [str(folder / "meeting"), str(rank), str(world), model, str(folder / "out"), *storages]
        command = [sys.executable, script, *arguments]
        processes.append(subprocess.Popen(command, env=environment, cwd=REPO, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    return [json.loads((folder / f"out.{rank}").read_text()) for rank in range(world)]


@pytest.mark.groups
def test_two_workers_have_the_curve_of_one_and_go_on_from_its_state(tmp_path: Path) -> None:
    alone = fitter(fit_config("din"))
    course = alone.run().course
    _, logits = predict(alone.model, alone.valid, CPU)
    with pytest.raises(Killed):
        fitter(fit_config("din"), killing(course.steps // 2), states(tmp_path / "s")).run()
    first, second = on_workers(tmp_path / "two", 2, "din", ["none", str(tmp_path / "s")])
    assert first == second
    for found, resumed in zip(first, ([], [course.steps // 2]), strict=True):
        assert found["resumed"] == resumed
        np.testing.assert_allclose(found["losses"], course.losses, rtol=0, atol=1e-5)
        assert (found["best"], found["rows"]) == (course.best_step, course.rows)
        for metrics, expected in zip(found["valid"], course.valid, strict=True):
            assert metrics == pytest.approx(expected, abs=1e-4)
        np.testing.assert_allclose(found["logits"], logits, rtol=0, atol=1e-3)


def killing(step: int) -> Report:
    def report(progress: Progress) -> None:
        # Not at a validation's own report: there the state is not written yet.
        if progress.step > step and progress.valid is None:
            raise Killed

    return report


@pytest.mark.parametrize("model", ["sasrec", "gru4rec", "deepfm"])
def test_a_killed_run_goes_on_to_the_bit(model: Any, tmp_path: Path) -> None:
    config = replace(fit_config(model), dropout=0.2, batch_size=40, max_epochs=1, gru_layers=2, weight_decay=0.01)
    config = replace(config, checkpoint_seconds=0.0)
    whole = fitter(config).run()
    assert whole.course.steps > 60
    kept = states(tmp_path)
    for step in (25, 45):
        with pytest.raises(Killed):
            fitter(config, killing(step), kept).run()
    resumed = fitter(config, checkpoints=kept).run()
    assert len(resumed.course.resumed_at) == 2
    assert same(resumed, whole)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    config = replace(fit_config("deepfm"), patience=1, max_epochs=50, valid_per_epoch=4, learning_rate=0.05)
    first = fitter(config, checkpoints=states(tmp_path)).run()
    assert first.course.since_best == 1
    assert first.course.steps < 50 * 10
    again = fitter(config, checkpoints=states(tmp_path)).run()
    assert same(first, again)


def test_every_row_is_trained_once_an_epoch() -> None:
    config = replace(fit_config("deepfm"), batch_size=1000)
    one = fitter(config)
    one.steps_per_epoch = -(-len(one.train) // 1000)
    plan = [rows.tolist() for rows in one._plan(0, 2 * one.steps_per_epoch)]
    for epoch in (plan[: one.steps_per_epoch], plan[one.steps_per_epoch :]):
        assert sorted(row for rows in epoch for row in rows) == list(range(len(one.train)))
    assert plan[0] != plan[one.steps_per_epoch]
    assert next(one._plan(3, 5)).tolist() == plan[3]
    shared = [replace(one, rank=rank, world=3) for rank in range(3)]
    for worker in shared:
        worker.steps_per_epoch = one.steps_per_epoch
    parts = [[rows.tolist() for rows in w._plan(0, len(plan))] for w in shared]
    assert [[row for part in step for row in part] for step in zip(*parts, strict=True)] == plan


@pytest.mark.parametrize(("rows", "world"), [(10, 3), (2, 4), (0, 2)])
def test_shares_are_a_partition(rows: int, world: int) -> None:
    shares = [share(rows, rank, world) for rank in range(world)]
    assert [n for s in shares for n in range(rows)[s]] == list(range(rows))
    assert max(s.stop - s.start for s in shares) - min(s.stop - s.start for s in shares) <= 1


def test_the_best_step_is_kept_and_reported() -> None:
    seen: list[Progress] = []
    config = replace(fit_config("deepfm"), learning_rate=0.05, max_epochs=4, valid_per_epoch=3)
    one = fitter(config, seen.append)
    fitted = one.run()
    aucs = {v["step"]: v["auc"] for v in fitted.course.valid}
    assert len(aucs) == 12
    assert aucs[fitted.course.best_step] == max(aucs.values())
    assert fitted.course.best_step < fitted.course.steps, "the case at hand overfits"
    probabilities, logits = predict(one.model, one.valid, CPU)
    assert (probabilities.dtype, logits.dtype) == (np.float64, np.float32)
    found = evaluate(one.valid.samples.label, probabilities)
    assert found.auc == pytest.approx(max(aucs.values()), abs=1e-12)
    assert [p.valid["step"] if p.valid and "step" in p.valid else p.step for p in seen if p.valid] == sorted(aucs)
    assert seen[-1].rows == seen[-1].total_rows == 4 * len(one.train)
    assert fitted.best.keys() == weights_of(one.model).keys()


def test_prediction_leaves_the_mode_and_takes_any_rows() -> None:
    config = replace(fit_config("din"), dropout=0.5)
    one = fitter(config)
    rows = np.array([7, 3, 3, 100])
    whole, _ = predict(one.model.train(), one.valid, CPU)
    part, _ = predict(one.model, one.valid, CPU, rows)
    assert one.model.training
    np.testing.assert_allclose(part, whole[rows], rtol=0, atol=1e-7)
    assert len(predict(one.model, one.valid, CPU, np.zeros(0, np.int64))[0]) == 0


def test_faults_are_named() -> None:
    one = fitter(fit_config("din"))
    with pytest.raises(ArtifactError, match="another model"):
        load_weights(one.model, weights_of(fitter(fit_config("deepfm")).model))
    unlabelled = replace(one.train.samples, label=np.full(len(one.train), np.nan))
    one.train.samples = unlabelled
    with pytest.raises(InputError, match="has no label"):
        one.run()
    two = fitter(fit_config("din"))
    two.train.samples = two.train.samples.rows(0, 0)
    with pytest.raises(InputError, match="0 training"):
        two.run()
    with pytest.raises(InputError, match="max_epochs is 0"):
        fitter(replace(fit_config("din"), max_epochs=0)).run()


def test_a_loss_that_is_no_number_ends_the_run() -> None:
    one = fitter(fit_config("din"))
    with torch.no_grad():
        one.model.get_parameter("dnn.0.weight").fill_(torch.nan)
    with pytest.raises(TrainingError, match="loss is nan at epoch 1, step 1"):
        one.run()


def planted(rows: int, seed: int) -> Tables:
    """Whether the target is of the kind that this user watches; only the history knows, each user has one sample."""
    rng = np.random.default_rng(seed)
    kind, target = rng.integers(0, 2, rows), rng.integers(0, 20, rows)
    histories = [[(int(i), float(s)) for i, s in zip(rng.integers(0, 10, 6) * 2 + k, [3, 4] * 3)] for k in kind]  # noqa: B905
    samples = [(n, int(target[n]), 6, float(target[n] % 2 == kind[n])) for n in range(rows)]
    return tables_of(histories, samples, [f"g{n}" for n in range(20)])


def learnt(model: Any, see_nothing: bool = False) -> float:
    """Return the validation AUC of a short run on the planted signal."""
    tables = planted(3000, 0)
    fields = {name: place for name, place in FIELDS.items() if name != "User ID"}
    features, samples = Features.of(tables, fields), everything(tables)
    nothing = np.zeros((len(samples), 2), dtype=np.int64)
    source = Retrieved(nothing, np.zeros(1, np.uint8)) if see_nothing else Recent()

    def part(start: int, stop: int) -> Batches:
        chosen: Chosen = samples.rows(start, stop)
        cut = Retrieved(nothing[start:stop], np.zeros(1, np.uint8)) if see_nothing else source
        return Batches(features, tables.histories(), chosen, cut, 6)

    config = replace(fit_config(model), batch_size=100, max_epochs=12, learning_rate=1e-2, init_std=0.1)
    made: nn.Module = build(config, features, 6, seed=0)
    valid = Fitter(made, part(0, 2400), part(2400, 3000), config, 0, CPU, quiet).run().course.valid
    return max(v["auc"] for v in valid)


@pytest.mark.parametrize("model", MODELS)
def test_a_signal_in_the_history_is_learnt(model: str) -> None:
    assert learnt(model) > 0.8


def test_without_the_history_there_is_nothing_to_learn() -> None:
    assert learnt("din", see_nothing=True) < 0.6
