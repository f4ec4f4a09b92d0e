"""From the samples of a data set to examples: the texts are those put together by hand from the tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rella.baselines import TextBaseline, TextBaselineConfig, text_baseline
from rella.config import DataConfig, PromptConfig
from rella.data.bookcrossing import FIELDS as BOOK_FIELDS
from rella.data.movielens import FIELDS
from rella.data.questions import Neighbours
from rella.data.raw import RawDataset
from rella.data.samples import assemble
from rella.data.selection import Chosen, choose, split_ids
from rella.data.synthetic import sample_dataset
from rella.data.tables import Tables
from rella.lm.loading import load_tokenizer
from rella.models import ModelIdentity
from rella.prompts import ML_1M, Display, prompt_text
from rella.textctr.baselines import load_baseline
from rella.textctr.examples import PairExamples, Reader, TextExamples, reader_for
from rella.textctr.fit import TextFitter
from rella.textctr.predict import Validation, predict
from tests.textctr.planted import quiet

CONFIG = replace(text_baseline("ctr-bert"), max_tokens=128, max_item_tokens="auto", precision="float32")


@pytest.fixture(scope="module")
def raw() -> RawDataset:
    return sample_dataset(users=40)


@pytest.fixture(scope="module")
def tables(raw: RawDataset) -> Tables:
    return assemble(raw, DataConfig())


@pytest.fixture(scope="module")
def samples(tables: Tables) -> Chosen:
    return choose(tables.samples, split_ids(tables.samples, "train")[::40])


def reader(
    name: TextBaseline,
    tables: Tables,
    model: ModelIdentity,
    config: TextBaselineConfig = CONFIG,
    k: int = 3,
    **changes: Any,
) -> Reader:
    tokenizer = load_tokenizer(model)
    return reader_for(name, tables, FIELDS, ML_1M, PromptConfig(), model, tokenizer, config, k, **changes)


def by_hand(tables: Tables, samples: Chosen, n: int, positions: list[int]) -> tuple[str, str, str]:
    """A sample's user text, item text and prompt."""
    user = tables.users.slice(int(samples.user[n]), 1).to_pylist()[0]
    item = tables.items.slice(int(samples.item[n]), 1).to_pylist()[0]
    show = Display()
    seen = tables.interactions.slice(user["offset"], int(samples.end[n])).to_pylist()
    behaviours = [(show(tables.items.column("title")[seen[p]["item"]].as_py()), seen[p]["rating"]) for p in positions]
    listed = ", ".join(f"{title} ({stars:.0f} {'stars' if stars > 1 else 'star'})" for title, stars in behaviours)
    user_text = (
        f"User ID is {user['user_id']}. Gender is {user['gender']}. Age is {user['age']}. Job is {user['occupation']}. "
        f"Zipcode is {user['zipcode']}. History is {listed}."
    )
    item_text = f"Movie ID is {item['item_id']}. Movie title is {show(item['title'])}. Movie genre is {item['genre']}."
    profile = {name: user[name] for name in ("gender", "age", "occupation", "zipcode")}
    names, stars = [title for title, _ in behaviours], [rating for _, rating in behaviours]
    return user_text, item_text, prompt_text(ML_1M, profile, names, stars, show(item["title"]))


def last(samples: Chosen, n: int, k: int = 3) -> list[int]:
    end = int(samples.end[n])
    return list(range(max(0, end - k), end))


def test_each_baseline_reads_its_text(tables: Tables, samples: Chosen, bert: ModelIdentity, t5: ModelIdentity) -> None:
    bert_ids, t5_ids = (load_tokenizer(model) for model in (bert, t5))
    loose = replace(CONFIG, max_tokens=2000)
    pair, row, prompt = (
        reader(name, tables, model, loose).examples(samples)
        for name, model in (("ctr-bert", bert), ("ptab", bert), ("p5", t5))
    )
    assert isinstance(pair, PairExamples)
    assert isinstance(row, TextExamples)
    assert isinstance(prompt, TextExamples)
    assert len(samples) > 20
    for n in range(len(samples)):
        user, item, question = by_hand(tables, samples, n, last(samples, n))
        assert pair.users[n].tolist() == bert_ids(user)["input_ids"]
        assert pair.items[int(pair.item[n])].tolist() == bert_ids(item)["input_ids"]
        assert row.texts[n].tolist() == bert_ids(f"{user} {item}")["input_ids"]
        assert prompt.texts[n].tolist() == t5_ids(question)["input_ids"]
    assert len(pair.items) == len(tables.items)
    for examples in (pair, row, prompt):
        assert np.array_equal(examples.labels, samples.label)
    assert np.array_equal(pair.lengths, pair.users.lengths + pair.items.lengths[samples.item])


def test_retrieved_behaviours(tables: Tables, samples: Chosen, bert: ModelIdentity, t5: ModelIdentity) -> None:
    """The two oldest behaviours stand for retrieved ones, the more similar one second."""
    offsets = 2 * np.arange(len(samples) + 1)
    found = Neighbours(samples.sample_id, offsets, np.tile(np.array([2, 0]), len(samples)))
    loose = replace(CONFIG, max_tokens=2000)
    for name, model in (("ctr-bert", bert), ("ptab", bert), ("p5", t5)):
        made = reader(name, tables, model, loose, history="retrieved", neighbours=found).examples(samples.rows(0, 5))
        texts = made.users if isinstance(made, PairExamples) else made.texts
        for n in range(5):
            user, item, question = by_hand(tables, samples, n, [0, 2])
            wanted = {"ctr-bert": user, "ptab": f"{user} {item}", "p5": question}[name]
            assert texts[n].tolist() == load_tokenizer(model)(wanted)["input_ids"]
        with pytest.raises(ValueError, match="need the neighbours"):
            reader(name, tables, model, history="retrieved")


def test_what_is_too_long_is_counted(tables: Tables, samples: Chosen, bert: ModelIdentity) -> None:
    made = reader("ctr-bert", tables, bert, k=20)
    examples = made.examples(samples)
    assert isinstance(examples, PairExamples)
    assert examples.users.lengths.max() <= 128
    assert 0 < made.encoder.truncated <= len(samples)
    assert made.encoder.dropped > made.encoder.truncated


def test_parts_make_no_difference(
    tables: Tables, samples: Chosen, bert: ModelIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = reader("ptab", tables, bert).examples(samples)
    monkeypatch.setattr("rella.textctr.examples._ROWS", 7)
    monkeypatch.setattr("rella.textctr.texts._ROWS", 3)
    parts = reader("ptab", tables, bert).examples(samples)
    assert isinstance(whole, TextExamples)
    assert isinstance(parts, TextExamples)
    assert parts.texts.digest() == whole.texts.digest()
    assert len(reader("ptab", tables, bert).examples(samples.rows(0, 0)).labels) == 0


def test_the_fields_are_table_1_s() -> None:
    """Two more are the history's IDs and ratings."""
    assert (len(FIELDS) + 2, len(BOOK_FIELDS) + 2) == (10, 10)


@pytest.mark.parametrize("name", ["ctr-bert", "ptab", "p5"])
def test_from_samples_to_scores(name: TextBaseline, tables: Tables, bert: ModelIdentity, t5: ModelIdentity) -> None:
    """The calls that a job makes, in their order."""
    model = t5 if name == "p5" else bert
    tokenizer = load_tokenizer(model)
    config = replace(text_baseline(name), max_tokens=400 if name == "p5" else 128, max_item_tokens="auto")
    config = replace(config, batch_size=8, max_epochs=1, valid_per_epoch=1, precision="bfloat16")
    config = replace(config, micro_batch_tokens=2000)
    read = reader(name, tables, model, config)
    train, valid, test = (
        read.examples(choose(tables.samples, split_ids(tables.samples, split)[:16]))
        for split in ("train", "valid", "test")
    )
    baseline = load_baseline(name, model, tokenizer, config, 0, torch.device("cpu"))
    validate = Validation(baseline, valid, config.batch_tokens, config.precision)
    course = TextFitter(baseline, train, config, 0, quiet, validate).run().course
    assert course.steps == 2
    assert course.best_step == 2
    scores = predict(baseline, test, config.batch_tokens, config.precision)
    assert scores.logits.shape == (16, 2)
    assert ((scores.probability > 0) & (scores.probability < 1)).all()
    exact = predict(baseline, test, config.batch_tokens)
    np.testing.assert_allclose(scores.probability, exact.probability, atol=0.1)
    assert not np.array_equal(scores.logits, exact.logits)
