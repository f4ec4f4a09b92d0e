"""Texts against examples typed by hand; what is too long loses its oldest behaviours and nothing else."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rella.config import PromptConfig
from rella.data.questions import Question
from rella.data.selection import SubsetRule
from rella.prompts import ML_1M, ML_25M, Display
from rella.textctr.examples import display_for
from rella.textctr.texts import FieldText, FieldTexts, PackedIds, PromptText, TextEncoder, training_rows
from rella.wording import Wording
from tests.textctr.conftest import small_tables
from tests.textctr.small_models import TITLES


def test_a_row_as_text(texts: FieldTexts) -> None:
    assert texts.row_text(1, 2, 2, None, 30).text() == (
        "User ID is 8. Gender is male. History is Heat (1995) (4 stars), Alien (1979) (1 star). "
        "Movie ID is m2. Movie title is Amélie (2001). Movie genre is Romance."
    )


def test_the_two_texts_of_ctr_bert(texts: FieldTexts) -> None:
    assert texts.row_text(1, None, 2, None, 30).text() == (
        "User ID is 8. Gender is male. History is Heat (1995) (4 stars), Alien (1979) (1 star)."
    )
    assert [t.text() for t in texts.item_texts([4, 0])] == [
        "Movie ID is m4. Movie title is Big (1988). Movie genre is Comedy.",
        "Movie ID is m0. Movie title is Heat (1995). Movie genre is Crime.",
    ]


def test_which_behaviours(texts: FieldTexts) -> None:
    recent = texts.row_text(2, None, 4, None, 2).text()
    assert recent == "User ID is 9. Gender is unknown. History is Amélie (2001) (4 stars), Alien (1979) (5 stars)."
    chosen = texts.row_text(2, None, 5, np.array([0, 4]), 2).text()
    assert chosen == "User ID is 9. Gender is unknown. History is Big (1988) (2 stars), Heat (1995) (1 star)."
    assert texts.row_text(0, None, 0, None, 30).text() == "User ID is 7. Gender is female."


def test_ratings_are_written_as_the_data_set_writes_them() -> None:
    users, items, histories = small_tables()
    halves = FieldTexts.from_tables(users, items, histories, {}, ML_25M, Display())
    assert halves.row_text(1, None, 2, None, 9).text() == "History is Heat (1995) (4.0 stars), Alien (1979) (1.0 star)."
    none = FieldTexts.from_tables(users, items, histories, {}, Wording(behaviour="{name}"), Display())
    assert none.row_text(1, 0, 2, None, 9).text() == "History is Heat (1995), Alien (1979)."
    assert none.row_text(0, 0, 0, None, 9).text() == ""


def test_hostile_titles(bert_tokenizer: Any) -> None:
    titles = ("[SEP] [MASK]", "two\nlines\t", "{title} {rating}", " ", "Tom &amp; \\Jerry")
    display = display_for(bert_tokenizer, PromptConfig())
    made = FieldTexts.from_tables(*small_tables(titles), {"Title": "items.title"}, ML_1M, display)
    assert made.items == [
        "Title is [ SEP] [ MASK].",
        "Title is two lines.",
        "Title is {title} {rating}.",
        "Title is untitled.",
        "Title is Tom & \\Jerry.",
    ]
    assert made.row_text(2, 0, 5, None, 2).text() == (
        "History is two lines (5 stars), [ SEP] [ MASK] (1 star). Title is [ SEP] [ MASK]."
    )
    ids = TextEncoder(bert_tokenizer, 128).encode([made.row_text(2, 0, 5, None, 5)])[0].tolist()
    assert [ids.count(t) for t in (bert_tokenizer.sep_token_id, bert_tokenizer.mask_token_id)] == [1, 0]


@pytest.mark.parametrize("place", ["users.title", "films.title", "title"])
def test_a_field_without_a_column(place: str) -> None:
    with pytest.raises(ValueError, match=r"users\.COLUMN, items\.COLUMN"):
        FieldTexts.from_tables(*small_tables(), {"Title": place}, ML_1M, Display())


PROFILE = {"gender": "female", "occupation": "writer", "age": "25-34"}


def test_p5_reads_the_prompt() -> None:
    prompt = PromptText(Question(PROFILE, TITLES[:2], [4, 1], TITLES[2]), ML_1M)
    assert prompt.text() == (
        "The user is a female. Her job is writer. Her age is 25-34.\n"
        "She watched the following movies in order in the past, and rated them:\n"
        "['0. Heat (1995) (4 stars)', '1. Alien (1979) (1 star)']\n"
        "Based on the movies she has watched, deduce if she will like the movie ***Amélie (2001)***.\n"
        "Note that more stars the user rated the movie, the more the user liked the movie.\n"
        "You should ONLY tell me yes or no."
    )
    assert "['0. Alien (1979) (1 star)']" in prompt.text(1)


def by_trial(tokenizer: Any, text: Any, limit: int) -> tuple[list[int], int]:
    """The slow way: drop one behaviour after the other."""
    for skip in range(len(text.behaviours) + 1):
        ids = tokenizer(text.text(skip))["input_ids"]
        if len(ids) <= limit:
            return ids, skip
    raise AssertionError


def test_the_oldest_behaviours_are_dropped_first(texts: FieldTexts, bert_tokenizer: Any, t5_tokenizer: Any) -> None:
    rows = [texts.row_text(2, 2, 5, None, 30), texts.row_text(1, 2, 2, None, 30), texts.row_text(0, 2, 0, None, 30)]
    prompts = [PromptText(Question(PROFILE, TITLES[:n], [4] * n, TITLES[4]), ML_1M) for n in (4, 2, 0)]
    for tokenizer, some in ((bert_tokenizer, rows), (t5_tokenizer, prompts)):
        least, most = (len(tokenizer(some[0].text(skip))["input_ids"]) for skip in (9, 0))
        least = max(least, *(len(tokenizer(t.text(9))["input_ids"]) for t in some))
        for limit in range(least, most + 2):
            encoder = TextEncoder(tokenizer, limit)
            found, wanted = encoder.encode(some), [by_trial(tokenizer, t, limit) for t in some]
            assert [found[n].tolist() for n in range(len(some))] == [ids for ids, _ in wanted]
            assert (encoder.truncated, encoder.dropped) == (
                sum(skip > 0 for _, skip in wanted),
                sum(skip for _, skip in wanted),
            )
            assert found.lengths.max() <= limit


def test_the_target_is_never_cut(texts: FieldTexts, bert_tokenizer: Any) -> None:
    item = texts.item_texts([2])[0]
    needed = len(bert_tokenizer(item.text())["input_ids"])
    with pytest.raises(ValueError, match=rf"'Movie ID is m2\..* has {needed} tokens .* over max_item_tokens = 9"):
        TextEncoder(bert_tokenizer, 9, "max_item_tokens").encode([texts.item_texts([0])[0], item])
    row = texts.row_text(2, 2, 5, None, 30)
    with pytest.raises(ValueError, match="even without behaviours, over max_tokens = 20"):
        TextEncoder(bert_tokenizer, 20).encode([row])


def test_nothing_to_encode(bert_tokenizer: Any) -> None:
    assert len(TextEncoder(bert_tokenizer, 9).encode([])) == 0
    assert TextEncoder(bert_tokenizer, 9).encode([FieldText("", ())])[0].tolist() == [2, 3]


@given(st.lists(st.lists(st.integers(0, 70_000), max_size=5), max_size=6), st.integers(0, 6))
def test_packed_ids(rows: list[list[int]], cut: int) -> None:
    packed = PackedIds.of(rows)
    assert [packed[n].tolist() for n in range(len(packed))] == rows
    assert packed.lengths.tolist() == [len(row) for row in rows]
    assert packed.tokens.dtype == (np.int32 if any(t > 65_535 for row in rows for t in row) else np.uint16)
    joined = PackedIds.joined([PackedIds.of(rows[:cut]), PackedIds.of(rows[cut:])])
    assert joined.digest() == packed.digest()
    assert joined.tokens.dtype == packed.tokens.dtype
    assert [joined[n].tolist() for n in range(len(joined))] == rows


def test_a_digest_is_of_ids_and_bounds() -> None:
    digests = {PackedIds.of(rows).digest() for rows in ([[1, 2], [3]], [[1], [2, 3]], [[1, 2], [4]], [[1, 2, 3]])}
    assert len(digests) == 4


def test_training_rows_are_nested_and_named() -> None:
    n = 1500
    samples = pa.table(
        {
            "sample_id": np.arange(n),
            "user": np.zeros(n, np.int32),
            "item": np.zeros(n, np.int32),
            "end": np.zeros(n, np.int32),
            "label": pa.array([0] * n, pa.int8()),
            "split": ["train"] * 1200 + ["test"] * 300,
        }
    )
    rule = SubsetRule(42)
    few, more = training_rows(samples, 100, rule), training_rows(samples, 1100, rule)
    assert set(few.ids) < set(more.ids)
    assert more.ids.max() < 1200
    assert few.caption == "100 of 1,200 training rows"
    for everything in (training_rows(samples, "all", rule), training_rows(samples, 5000, rule)):
        assert everything.ids.tolist() == list(range(1200))
        assert everything.caption == "all 1,200 training rows"
    assert training_rows(samples, 100, SubsetRule(1)).ids.tolist() != few.ids.tolist()
    with pytest.raises(ValueError, match="0 train samples"):
        training_rows(samples, 0, rule)


def test_texts_are_made_without_torch() -> None:
    code = "import sys, rella.textctr.examples; assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
