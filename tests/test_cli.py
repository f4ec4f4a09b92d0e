"""The words that all jobs share: which layer wins, where a value came from, and that nothing unknown gets through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

import rella.cli as cli
from rella.cli import Resolved, build, flatten, nest, parse, resolve
from rella.config import PRESETS, Experiment, leaves
from rella.errors import InputError

JOBS = ("prepare", "embed", "retrieve", "reit", "score")


def job(*argv: str) -> Resolved:
    return parse(list(argv), "jobs/reit.py", "What it does.")


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., str]:
    def write(text: str, name: str = "experiment.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def values_of(resolved: Resolved) -> dict[str, Any]:
    return {name: value for name, value, _ in leaves(resolved.experiment)}


def test_without_flags_it_is_the_demo() -> None:
    resolved = job()
    assert (resolved.experiment.dataset, resolved.experiment.model) == ("sample", "tiny")
    assert resolved.experiment.precision == "float32"
    assert resolved.sources["precision"] == "model tiny"
    changed = {n for n, v in values_of(resolved).items() if v != {m: w for m, w, _ in leaves(Experiment())}[n]}
    assert changed <= set(resolved.sources)


def test_each_layer_wins_over_the_one_before(monkeypatch: pytest.MonkeyPatch, config: Callable[..., str]) -> None:
    names = ["k", "shots", "seed", "pca_dim", "seeds", "mix", "distance"]
    layers = {n: i for i, n in enumerate(names)}
    assert layers["k"] == 0
    monkeypatch.setitem(cli.DATASETS, "sample", dict.fromkeys(["shots", "seed", "pca_dim", "seeds"], 11))
    monkeypatch.setitem(cli.MODELS, "tiny", dict.fromkeys(["seed", "pca_dim", "seeds"], 12))
    monkeypatch.setitem(cli.TOGETHER, ("sample", "tiny"), dict.fromkeys(["pca_dim", "seeds"], 13))
    monkeypatch.setitem(cli.PRESETS, "named", {"seeds": 14, "mix": "original", "distance": "dot"})
    file = config("mix: retrieved\ndistance: l1\n")
    # jsonargparse took the names of presets when the parser was made; this one is new.
    resolved = job("--preset", "named", "--config", file, "--distance", "l2")
    e = resolved.experiment
    assert (e.k, e.shots, e.seed, e.pca_dim, e.seeds, e.mix, e.distance) == (30, 11, 12, 13, 14, "retrieved", "l2")
    assert {n: resolved.sources.get(n, "default") for n in names} == {
        "k": "default",
        "shots": "data set sample",
        "seed": "model tiny",
        "pca_dim": "sample with tiny",
        "seeds": "preset named",
        "mix": f"file {file}",
        "distance": "flag",
    }


def test_a_preset_names_data_set_and_model() -> None:
    resolved = job("--preset", "ml-1m-n65536")
    e = resolved.experiment
    assert (e.dataset, e.model, e.shots, e.precision) == ("ml-1m", "vicuna-13b", 65536, "float16")
    assert (resolved.sources["shots"], resolved.sources["precision"]) == ("preset ml-1m-n65536", "model vicuna-13b")
    over = job("--preset", "ml-1m-n65536", "--shots", "64", "--model", "tiny")
    assert (over.experiment.shots, over.experiment.precision, over.sources["shots"]) == (64, "float32", "flag")


def test_a_file_may_name_the_preset(config: Callable[..., str]) -> None:
    e = job("--config", config("preset: ml-1m-n65536\nk: 5\n")).experiment
    assert (e.dataset, e.shots, e.k) == ("ml-1m", 65536, 5)


def test_files_and_flags_in_the_order_in_which_they_are_given(config: Callable[..., str]) -> None:
    first, second = config("k: 1\nseed: 1\n", "a.yaml"), config("k: 2\n", "b.yaml")
    resolved = job("--config", first, "--config", second)
    assert (resolved.experiment.k, resolved.experiment.seed) == (2, 1)
    assert (resolved.sources["k"], resolved.sources["seed"]) == (f"file {second}", f"file {first}")
    assert job("--config", first, "--k", "3").experiment.k == 3
    same = config("k: 2\n", "c.yaml")
    assert job("--config", second, "--config", same).sources["k"] == f"file {same}"


def test_values_have_their_types() -> None:
    argv = "--tune.learning_rate 1e-3 --data.positive_above 3 --data.split [7,2,1] --shots all --tune.stop_after null"
    e = job(
        *argv.split(), "--tune.lora_targets", '["k_proj"]', "--pca-dim", "64", "--embed.pool_bos", "false"
    ).experiment
    assert (e.tune.learning_rate, e.data.split, e.shots, e.tune.stop_after) == (0.001, (7, 2, 1), "all", None)
    assert (e.tune.lora_targets, e.pca_dim, e.embed.pool_bos) == (("k_proj",), 64, False)
    # 3 and 3.0 are one value: keys are made of their text.
    assert isinstance(e.data.positive_above, float)
    assert isinstance(build({"tune.clip": 1}).tune.clip, float)


@pytest.mark.parametrize(
    "argv",
    [
        ["--kk", "3"],
        ["--tune.kk", "3"],
        ["--learning_rate", "1"],
        ["--k", "many"],
        ["--k", "1.5"],
        ["--mix", "both"],
        ["--tune", "3"],
        ["--preset", "ml-1m-n1"],
        ["extra"],
        ["--config", "/no/such/file.yaml"],
    ],
)
def test_a_wrong_flag_is_an_error(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        job(*argv)
    assert left.value.code == 2
    assert argv[-1] in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["kk: 3", "tune:\n  kk: 3", "k: many", "k: [", "tune: 3", "mix: both", "data.splitt: 1"]
)
def test_a_wrong_file_is_an_error(text: str, config: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, InputError)) as left:
        job("--config", config(text))
    if isinstance(left.value, SystemExit):
        assert left.value.code == 2
        assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kk": 3}, "there is no field 'kk'"),
        ({"tune.kk": 3, "k": 4}, r"there is no field 'tune\.kk'"),
        ({"tune": 3}, "there is no field 'tune'"),
        ({"k": "many"}, '"k"'),
        ({"k": 1.5}, '"k"'),
        ({"mix": "both"}, '"mix"'),
        ({"data.split": [8, 1]}, r"data\.split"),
        ({"precision": "float64"}, '"precision"'),
        ({"dataset": "netflix"}, "unknown data set 'netflix'; there are"),
    ],
)
def test_a_wrong_call_is_an_error(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve(values)


def test_an_unknown_preset_is_an_error_in_a_call_too() -> None:
    with pytest.raises(InputError, match=r"unknown preset 'ml-1m-n1'; there are .*ml-1m-n8192"):
        resolve({}, "ml-1m-n1")
    with pytest.raises(InputError, match="unknown preset ''"):
        resolve({}, "")


def test_a_call_says_where_its_values_came_from() -> None:
    resolved = resolve({"k": 5, "seed": 3}, "ml-1m-n8192", {"seed": "sweep"})
    assert (resolved.experiment.k, resolved.experiment.seed, resolved.experiment.dataset) == (5, 3, "ml-1m")
    assert (resolved.sources["k"], resolved.sources["seed"]) == ("call", "sweep")


def test_every_resolved_value_is_described_with_its_layer(config: Callable[..., str]) -> None:
    text = job("--k", "17", "--raw-dir", "/data/raw").describe()
    words = text.split()
    for name, value in values_of(job("--k", "17", "--raw-dir", "/data/raw")).items():
        assert any(w.startswith(f"{name}=") for w in words), name
        if isinstance(value, str):
            assert f"{name}={value}" in words
    flags = text.split("set by flag:")[1].split("set by")[0]
    assert flags.split() == ["raw_dir=/data/raw", "k=17"]
    assert max(map(len, text.splitlines())) <= 120


def test_show_config_prints_and_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        job("--show-config", "--k", "17")
    assert left.value.code == 0
    assert "k=17" in capsys.readouterr().out


@pytest.mark.parametrize("name", JOBS)
def test_help_names_every_field(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(["--help"], f"jobs/{name}.py", f"What {name} does.")
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert f"What {name} does." in text
    assert f"jobs/{name}.py" in text
    for field in fields(Experiment):
        assert f"--{field.name}" in text.replace("-dim", "_dim"), field.name
    for leaf, _, _ in leaves(Experiment()):
        assert f"--{leaf}" in text, leaf
    # The docstring under a field is its help.
    assert "Neighbours kept per sample" in text
    assert "Rank of the LoRA update." in text
    for preset in PRESETS:
        assert preset in text


def test_every_field_has_a_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    """It is all that a user sees of it."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser()
    parser.add_class_arguments(Experiment, nested_key=None)
    bare = [
        a.dest for a in parser._actions if a.dest in dict.fromkeys(n for n, _, _ in leaves(Experiment())) and not a.help
    ]
    assert bare == []


def test_flatten_and_nest_undo_each_other() -> None:
    flat = {"k": 1, "tune.clip": 2.0, "tune.lora_rank": 8, "data.split": (8, 1, 1)}
    assert nest(flat) == {"k": 1, "tune": {"clip": 2.0, "lora_rank": 8}, "data": {"split": (8, 1, 1)}}
    assert flatten(nest(flat)) == flat
    assert flatten({"tune": {}}) == {}


def test_building_from_all_of_an_experiment_s_values_gives_it_back() -> None:
    e = job("--preset", "ml-1m-n8192", "--tune.patience", "2", "--cluster.workers", "3").experiment
    again = build({name: value for name, value, _ in leaves(e)})
    assert again == e
    assert asdict(again) == asdict(e)
