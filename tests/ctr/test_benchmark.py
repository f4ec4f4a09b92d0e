"""benchmarks/ctr.py: both sides get the same data, rounds begin and end where they should, and our side runs."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import ctr, ctr_data, peers_ctr
from benchmarks.rounds import MARK, Finished, Gate
from rella.baselines import BaselineConfig
from rella.ctr.batches import batches_of

K = 30


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[ctr_data.Prepared, Path]:
    folder = tmp_path_factory.mktemp("ctr")
    ctr_data.write_raw(folder / "raw", users=40)
    ctr_data.prepare(folder / "raw", folder / "store")
    prepared = ctr_data.read(folder / "store")
    ctr_data.export(prepared, folder / "export", K)
    return prepared, folder


def test_the_made_up_data_set_has_the_shape_of_the_original(world: tuple[ctr_data.Prepared, Path]) -> None:
    lengths = np.diff(world[0].tables.histories().offset)
    assert len(lengths) == 40
    assert lengths.sum() == round(ctr_data.RATINGS * 40 / ctr_data.USERS)
    assert ctr_data.SHORTEST <= lengths.min() < 60 < 300 < lengths.max() <= ctr_data.LONGEST
    assert 0.3 < world[0].samples("train").label.mean() < 0.7


def test_peers_get_the_data_that_our_models_get(world: tuple[ctr_data.Prepared, Path]) -> None:
    prepared, folder = world
    samples = prepared.samples("train")
    histories, config = prepared.tables.histories(), BaselineConfig(model="din")
    ours = batches_of(config, prepared.features, histories, samples, K).take(np.arange(len(samples)))
    theirs, export = peers_ctr.columns(folder / "export"), peers_ctr.Export.of(folder / "export")
    firsts = np.cumsum([1, *export.sizes])

    fields = np.stack([theirs[name] for name in export.names[:-1]], axis=1)
    assert np.array_equal(fields + firsts[:8] - 1, ours.fields.numpy())
    assert np.array_equal(theirs["label"], ours.label.numpy())
    assert ours.lengths.min() < K  # There is padding to get wrong.
    for row, length in enumerate(ours.lengths.tolist()):
        items, ratings = theirs["history"][row], theirs["rating"][row]
        assert not items[: K - length].any()
        assert not ratings[: K - length].any()
        first = firsts[export.item_at]
        assert np.array_equal(items[K - length :] + first - 1, ours.items[row, :length].numpy())
        assert np.array_equal(ratings[K - length :], ours.ratings[row, :length].numpy())


def test_a_loop_stops_at_the_ends_of_rounds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("go\nstop\n"))
    gate, done = Gate(warm_up=2, steps=3), []

    def loop() -> None:
        for batch in gate.through(range(100)):
            done.append(batch)
            gate.losses.append(float(batch))

    with pytest.raises(Finished):
        loop()
    assert done == [0, 1, 2, 3, 4]
    warm, first = (json.loads(x[len(MARK) :]) for x in capsys.readouterr().out.splitlines() if x.startswith(MARK))
    assert (warm["loss"], first["loss"], first["first_loss"]) == (0.5, 3.0, 2.0)


def test_data_that_ends_too_early_ends_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("go\n"))
    gate = Gate(warm_up=2, steps=3)
    gate.losses.append(0.0)
    assert list(gate.through(range(4))) == [0, 1, 2, 3]


@pytest.mark.slow
def test_our_side_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--quick --users 400 --steps 20 --rounds 2 --threads 1 --device cpu"
    ctr.main([*words.split(), "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    for model in ("din", "deepfm"):
        assert figures[f"{model}_samples_per_s"] > 0
        assert figures[f"{model}_loss"] < figures[f"{model}_first_loss"]
    assert not [name for name in figures if "ratio" in name]
    assert "peers: not measured" in capsys.readouterr().out


def test_rounds_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    plan = ctr.Plan(tmp_path, "cpu", 40, 60, 3, 1, BaselineConfig())
    ours, theirs = plan.ours("din"), plan.peer(Path("python"), "din", "npz:1")
    ours.facts, theirs.facts = {"samples": 220 * 512}, {"samples": 220 * 512}
    with pytest.raises(SystemExit, match=r"too few for 220 steps"):
        ctr.check(plan, theirs, ours)
    ours.facts = {"samples": 10**6}
    with pytest.raises(SystemExit, match=r"trains on 112640 samples, ours on 1000000"):
        ctr.check(plan, theirs, ours)
