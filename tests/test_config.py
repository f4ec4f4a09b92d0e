"""The presets hold the paper's values, and every value in them is a field of the right type."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

from rella.backbones import BACKBONES, LORA_TARGETS
from rella.cli import build, resolve
from rella.config import CHOICES, DATASETS, LISTS, MODELS, PRESETS, TOGETHER, Experiment, leaves
from rella.stages import STAGES

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
    assert (e.tune.lora_rank, e.tune.lora_alpha, LORA_TARGETS["llama"]) == (8, 16, ("q_proj", "v_proj"))
    assert (e.mix, e.history, e.distance, e.prompt.wrapper) == ("mixed", "retrieved", "cosine", "vicuna")
    assert (e.tune.select_on, e.test_rows, e.tune.clip) == ("valid", "all", 1.0)


def test_the_other_data_sets() -> None:
    """§4.1.4, §4.2 and Appendix B; 81:9:10 is 9:1 with a tenth of the training users for validation."""
    books = resolve({"dataset": "bookcrossing", "model": "vicuna-13b"}).experiment
    assert (books.k, books.tune.max_epochs, books.data.positive_above) == (60, 10, 5.0)
    assert (books.data.order, books.data.targets, books.data.split_by) == ("shuffle", "last", "user")
    assert [17_714 * part // 100 for part in books.data.split[:2]] == [14_348, 15_942 // 10]
    large = resolve({"dataset": "ml-25m", "model": "vicuna-13b"}).experiment
    assert (large.k, large.tune.max_epochs, large.data.positive_above) == (30, 5, 3.0)
    assert large.data.split == (8, 1, 1)


def test_the_settings_below_one_and_ten_per_cent() -> None:
    few = {name: resolve({}, name).experiment for name in PRESETS if "-n" in name}
    assert {name: (e.dataset, e.shots, e.k) for name, e in few.items()} == {
        "ml-1m-n8192": ("ml-1m", 8192, 30),
        "ml-1m-n65536": ("ml-1m", 65536, 30),
        "ml-25m-n8192": ("ml-25m", 8192, 30),
        "ml-25m-n65536": ("ml-25m", 65536, 30),
        "bookcrossing-n256": ("bookcrossing", 256, 60),
        "bookcrossing-n1024": ("bookcrossing", 1024, 60),
    }
    assert {(e.model, e.tune.learning_rate) for e in few.values()} == {("vicuna-13b", 1e-3)}


def test_what_the_authors_code_does() -> None:
    """Where paper and code disagree, each is a field, and these presets take the code's side."""
    authors = {name.removesuffix("-authors"): resolve({}, name).experiment for name in PRESETS if "authors" in name}
    assert set(authors) == {"ml-1m", "ml-25m", "bookcrossing"}
    for e in authors.values():
        assert (e.prompt.variant, e.embed.wrapped, e.embed.pooling) == ("authors", True, "generated")
        assert (e.data.subsets, e.data.seed, e.tune.select_on, e.tune.stop_after) == ("authors", 42, "test", 1)
    assert {name: (e.distance, e.pca_dim) for name, e in authors.items()} == {
        "ml-1m": ("cosine", "auto"),
        "ml-25m": ("dot", "auto"),
        "bookcrossing": ("dot", "none"),
    }
    assert authors["ml-25m"].test_rows == 70_000
    assert (
        authors["bookcrossing"].data.positive_above
        < 5
        <= resolve({"dataset": "bookcrossing"}).experiment.data.positive_above
    )
    assert authors["bookcrossing"].data.split == (9, 0, 1)


def test_the_lists_of_the_figures() -> None:
    assert LISTS["bookcrossing"]["k"] == tuple(range(10, 61, 10))
    assert LISTS["ml-1m"]["k"] == LISTS["ml-25m"]["k"] == tuple(range(5, 31, 5))
    assert LISTS["bookcrossing"]["shots"] == (128, 256, 512, 1024, 2048, 4096)
    assert LISTS["ml-1m"]["shots"] == (512, 1024, 2048, 4096, 8192, 65536)
    for values in LISTS.values():
        assert set(values) <= set(LEAVES)
    for name, choices in CHOICES.items():
        assert LEAVES[name] in choices


def test_the_backbones_are_the_paper_s() -> None:
    assert {name: b.source for name, b in BACKBONES.items()} == {
        "vicuna-7b": "lmsys/vicuna-7b-v1.3",
        "vicuna-13b": "lmsys/vicuna-13b-v1.3",
        "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.1",
        "falcon-7b": "tiiuae/falcon-7b-instruct",
        "llama-2-70b-chat": "meta-llama/Llama-2-70b-chat-hf",
    }
    assert set(BACKBONES) | {"tiny"} == set(MODELS)
    for name in BACKBONES:
        assert MODELS[name]["precision"] == "float16", "V100s have no bfloat16"
    assert resolve({"dataset": "ml-1m", "model": "llama-2-70b-chat"}).experiment.test_rows == 10_000


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
    assert STAGES == ("prepare", "embed", "pca", "retrieve", "reit", "baseline", "mlm", "textctr", "score")
    for name, _, stages in leaves(Experiment()):
        assert set(stages) <= set(STAGES), name


def test_an_experiment_does_not_change() -> None:
    e = Experiment()
    with pytest.raises(FrozenInstanceError):
        e.k = 3  # type: ignore[misc]
    assert replace(e, k=3) != e
    assert Experiment() == e
