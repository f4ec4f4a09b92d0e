"""P(yes) of the scoring job against the whole vocabulary's logits, for every row, however the job is laid out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from rella.artifacts import Artifact
from rella.cli import resolve
from rella.config import Experiment
from rella.models import ModelIdentity

pytestmark = [pytest.mark.ray, pytest.mark.timeout(420)]

ROWS = 60
LAYOUTS: dict[str, dict[str, Any]] = {
    "one actor": {"workers": 1},
    "two actors": {"workers": 2, "shard_rows": 7},
    "one prompt a batch": {"workers": 1, "batch_tokens": 1},
    "small batches": {"workers": 2, "batch_tokens": 900},
    "as they come": {"workers": 1, "batch_tokens": 2500, "bucketing": False},
}


@pytest.fixture(scope="module")
def adapter(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT folder whose layers are far from zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tuned = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    folder = tmp_path_factory.mktemp("adapters") / "random"
    tuned.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def experiment(model_folder: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    values = {
        "precision": "float32",
        "k": 6,
        "test_rows": ROWS,
        "data.sample_users": 40,
        "model": str(model_folder),
        "adapter": str(adapter),
        "storage": str(tmp_path_factory.mktemp("storage")),
        "cluster.gpu": False,
    }
    return resolve(values).experiment


@pytest.fixture(scope="module")
def cluster(experiment: Experiment) -> Iterator[None]:
    from rella.dist.session import session

    with session(experiment.cluster):
        yield


def scores(experiment: Experiment, layout: dict[str, Any]) -> Artifact:
    from rella.dist.run import Runner

    score = {k: v for k, v in layout.items() if k != "workers"}
    chosen = replace(
        experiment,
        restart="score",
        score=replace(experiment.score, **score),
        cluster=replace(experiment.cluster, workers=layout["workers"]),
    )
    with Runner(chosen, lambda line: None) as runner:
        pipeline = runner.pipeline(chosen)
        runner.run([pipeline])
        return pipeline.score.artifact(runner.storage)


@pytest.fixture(scope="module")
def found(experiment: Experiment, cluster: None) -> dict[str, dict[str, npt.NDArray[Any]]]:
    """Layout → columns of the score table, and how many parts there were."""
    tables = {}
    for name, layout in LAYOUTS.items():
        artifact = scores(experiment, layout)
        table = artifact.read()
        tables[name] = {c: table[c].to_numpy() for c in table.column_names}
        tables[name]["parts"] = np.array(len(artifact.manifest().parts))
    return tables


@pytest.fixture(scope="module")
def prompts(experiment: Experiment, found: dict[str, Any], identity: ModelIdentity) -> list[str]:
    """The wrapped prompts of the scored rows, in the order of the table."""
    from rella.data.questions import Neighbours
    from rella.dist.dataset import catalogue_of, read_tables
    from rella.dist.run import Runner
    from rella.prompts import ML_1M, WRAPPERS, Display, prompt_text

    with Runner(experiment, lambda line: None) as runner:
        pipeline = runner.pipeline(experiment)
        tables = read_tables(pipeline.prepare.artifact(runner.storage))
        assert pipeline.retrieve is not None
        neighbours = Neighbours.from_table(pipeline.retrieve.artifact(runner.storage).read())
    catalogue = catalogue_of(tables, ML_1M, Display())
    rows = {row["sample_id"]: row for row in tables.samples.to_pylist()}
    texts = []
    for sample_id in found["one actor"]["sample_id"].tolist():
        sample = rows[sample_id]
        positions = neighbours.top(sample_id, 6)
        asked = catalogue.question(sample["user"], sample["item"], sample["end"], positions, 6)
        text = prompt_text(ML_1M, asked.profile, asked.names, asked.ratings, asked.target)
        texts.append(WRAPPERS["vicuna"].wrap(text))
    return texts


@pytest.fixture(scope="module")
def expected(prompts: list[str], model_folder: Path, adapter: Path) -> dict[str, npt.NDArray[np.float64]]:
    """How padded → P(yes) by transformers and PEFT alone: every logit of the vocabulary, softmax over two of them."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval()
    pair = [tokenizer(f"ASSISTANT: {word}")["input_ids"][-1] for word in ("Yes", "No")]
    answers: dict[str, npt.NDArray[np.float64]] = {}
    for side, size in (("left", 8), ("right", 8), ("none", 1)):
        odds: list[float] = []
        for start in range(0, len(prompts), size):
            batch = tokenizer(
                prompts[start : start + size],
                return_tensors="pt",
                padding=size > 1,
                **({"padding_side": side} if size > 1 else {}),
            )
            with torch.no_grad():
                logits = model(**batch).logits
            last = batch["attention_mask"].flip(1).argmax(1)
            rows = logits[torch.arange(len(logits)), logits.shape[1] - 1 - last]
            odds += torch.softmax(rows[:, pair].double(), dim=1)[:, 0].tolist()
        answers[side] = np.array(odds)
    return answers


def test_the_rows_mean_something(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert len(found["one actor"]["probability"]) == ROWS
    assert np.std(expected["none"]) > 0.05, "equal probabilities would hide a mistake"
    assert len(np.unique(np.round(expected["none"], 6))) > ROWS * 0.9


@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_is_that_of_the_full_logits(
    layout: str, side: str, found: dict[str, Any], expected: dict[str, Any]
) -> None:
    np.testing.assert_allclose(found[layout]["probability"], expected[side], rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_row_is_lost_or_doubled(layout: str, found: dict[str, Any]) -> None:
    assert np.array_equal(found[layout]["sample_id"], found["one actor"]["sample_id"])
    assert len(np.unique(found[layout]["sample_id"])) == ROWS


def test_the_layouts_are_different_ones(found: dict[str, Any]) -> None:
    assert int(found["two actors"]["parts"]) == 9
    assert int(found["one actor"]["parts"]) == 1
