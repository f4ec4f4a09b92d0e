"""Prompts to tokens: what is too long loses its oldest behaviours; batches cover every row within their budget."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rella.data.questions import Question
from rella.lm.encoding import PromptEncoder, pad_right, token_batches
from rella.prompts import ML_1M, WRAPPERS, prompt_text

PROFILE = {"gender": "female", "age": "25-34", "occupation": "writer"}


def question(behaviours: int, target: str = "Aliens (1986)") -> Question:
    titles = [f"Film Number {n} of a Long Series ({1950 + n})" for n in range(behaviours)]
    return Question(PROFILE, titles, [float(n % 5 + 1) for n in range(behaviours)], target)


def encoder(tokenizer: Any, max_tokens: int = 10_000) -> PromptEncoder:
    return PromptEncoder(tokenizer, ML_1M, WRAPPERS["vicuna"], max_tokens)


def test_what_fits_is_the_wrapped_prompt(tokenizer: Any) -> None:
    made = encoder(tokenizer)
    asked = [question(3), question(0), question(12)]
    found = made.encode(asked)
    for q, ids in zip(asked, found, strict=True):
        assert ids.dtype == np.int32
        assert (
            ids.tolist()
            == tokenizer(WRAPPERS["vicuna"].wrap(prompt_text(ML_1M, PROFILE, q.names, q.ratings, q.target)))[
                "input_ids"
            ]
        )
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]).endswith("You should ONLY tell me yes or no. ASSISTANT:")
    assert (made.truncated, made.dropped) == (0, 0)
    assert made.encode([]) == []


@pytest.mark.parametrize("kept", [0, 1, 5, 11])
def test_what_is_too_long_loses_its_oldest_behaviours(kept: int, tokenizer: Any) -> None:
    q = question(12)
    whole = encoder(tokenizer).encode([q])[0]
    rest = dataclasses.replace(q, names=q.names[12 - kept :], ratings=q.ratings[12 - kept :])
    right = encoder(tokenizer).encode([rest])
    limit = len(right[0])
    assert limit < len(whole)
    for spare in (0, 3):
        made = encoder(tokenizer, limit + spare)
        short, exact = made.encode([q, question(0)])
        assert short.tolist() == right[0].tolist()
        assert (made.truncated, made.dropped) == (1, 12 - kept)
        assert len(exact) <= limit
    text = tokenizer.decode(short)
    assert "deduce if she will like the movie ***Aliens (1986)***" in text
    assert text.endswith("ASSISTANT:")


def test_the_limit_itself_still_fits(tokenizer: Any) -> None:
    q = question(12)
    whole = encoder(tokenizer).encode([q])[0]
    made = encoder(tokenizer, len(whole))
    assert made.encode([q])[0].tolist() == whole.tolist()
    assert made.truncated == 0
    made = encoder(tokenizer, len(whole) - 1)
    assert len(made.encode([q, q])[1]) < len(whole)
    assert (made.truncated, made.dropped) == (2, 2)


@pytest.mark.parametrize("behaviours", [0, 1, 6])
def test_a_question_that_never_fits_is_an_error(behaviours: int, tokenizer: Any) -> None:
    limit = len(encoder(tokenizer).encode([question(0)])[0]) - 1
    with pytest.raises(ValueError, match=rf"'Aliens \(1986\)' has over {limit} tokens even without behaviours"):
        encoder(tokenizer, limit).encode([question(behaviours)])


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 2000))
def test_batches_cover_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    found = list(token_batches(lengths, budget))
    assert sorted(row for batch in found for row in batch) == list(range(len(lengths)))
    for batch in found:
        longest = max(lengths[row] for row in batch)
        assert longest * len(batch) <= budget or len(batch) == 1
    # Longest first, so that a card that is too small says so at once.
    flat = [lengths[row] for batch in found for row in batch]
    assert flat == sorted(flat, reverse=True)
    # No batch is cut before it must be.
    for batch in found[:-1]:
        assert lengths[batch[0]] * (len(batch) + 1) > budget


def test_batches_of_equal_rows() -> None:
    assert list(token_batches([5] * 7, 15)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(token_batches([5] * 3, 4)) == [[0], [1], [2]]


def test_padding_is_on_the_right() -> None:
    rows = [np.array(r, np.int32) for r in ([5, 6, 7], [8], [9, 10])]
    ids, lengths = pad_right(rows, 2, torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [8, 2, 2], [9, 10, 2]]
    assert lengths.tolist() == [3, 1, 2]
    assert (ids.dtype, lengths.dtype) == (torch.int64, torch.int64)
