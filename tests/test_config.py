"""The presets hold the paper's values, and every value in them is a field of the right type."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

from rella.cli import build, resolve
from rella.config import DATASETS, MODELS, PRESETS, SOURCES, STAGES, TOGETHER, Experiment, leaves

LEAVES = {name: value for name, value, _ in leaves(Experiment())}


def test_movielens_1m() -> None:
    """§4.1.4, §4.2 and Appendix B."""
    e = resolve({"dataset": "ml-1m", "model": "vicuna-13b"}).experiment
    assert e.k == 30
    assert e.data.positive_above == 3.0
    assert e.data.min_history == 5
    assert e.data.split == (8, 1, 1)
    assert e.tune.max_epochs == 5
    assert e.tune.batch_size in {128, 256}
    assert e.tune.learning_rate in {1e-3, 1.5e-3}
    assert (e.tune.lora_rank, e.tune.lora_alpha, e.tune.lora_targets) == (8, 16, ("q_proj", "v_proj"))
    assert (e.mix, e.history, e.distance, e.prompt.wrapper) == ("mixed", "retrieved", "cosine", "vicuna")
    assert (e.tune.select_on, e.test_rows, e.tune.clip) == ("valid", "all", 1.0)


def test_the_settings_below_one_and_ten_per_cent() -> None:
    shots = {name: resolve({}, name).experiment.shots for name in PRESETS if name.startswith("ml-1m-")}
    assert shots == {"ml-1m-n8192": 8192, "ml-1m-n65536": 65536}
    for name in PRESETS:
        e = resolve({}, name).experiment
        assert (e.dataset, e.model, e.tune.learning_rate, e.k) == ("ml-1m", "vicuna-13b", 1e-3, 30)


def test_the_backbones_are_the_paper_s() -> None:
    assert SOURCES["vicuna-7b"] == "lmsys/vicuna-7b-v1.3"
    assert SOURCES["vicuna-13b"] == "lmsys/vicuna-13b-v1.3"
    for name in SOURCES:
        assert MODELS[name]["precision"] == "float16", "V100s have no bfloat16"


@pytest.mark.parametrize(
    ("where", "layer"),
    [
        *((f"data set {n}", v) for n, v in DATASETS.items()),
        *((f"model {n}", v) for n, v in MODELS.items()),
        *((f"together {n}", v) for n, v in TOGETHER.items()),
        *((f"preset {n}", v) for n, v in PRESETS.items()),
    ],
)
def test_every_preset_s_values_are_fields(where: str, layer: dict[str, object]) -> None:
    assert set(layer) <= set(LEAVES), where
    built = {name: value for name, value, _ in leaves(build(layer))}
    assert {name: built[name] for name in layer} == layer


def test_together_names_what_there_is() -> None:
    assert all(dataset in DATASETS and model in MODELS for dataset, model in TOGETHER)


def test_fields_name_known_stages_only() -> None:
    assert STAGES == ("prepare", "embed", "pca", "retrieve", "reit", "score")
    for name, _, stages in leaves(Experiment()):
        assert set(stages) <= set(STAGES), name


def test_an_experiment_does_not_change() -> None:
    e = Experiment()
    with pytest.raises(FrozenInstanceError):
        e.k = 3  # type: ignore[misc]
    assert replace(e, k=3) != e
    assert Experiment() == e
