"""Which behaviours a question shows, and in which order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rella.config import DataConfig
from rella.data.questions import Catalogue, Neighbours, Question, questions
from rella.data.raw import RawDataset
from rella.data.samples import assemble
from rella.data.selection import Chosen, choose
from rella.data.tables import Histories
from rella.errors import InputError
from rella.prompts import ML_1M, ML_25M, WRAPPERS, Display, prompt_text
from rella.schemas import neighbours as neighbours_schema

# User 0 saw items 3, 1, 0, 2 (rated 3, 1, 5, 2); user 1 saw item 1 (rated 4); user 2 nothing.
USERS = pa.table(
    {
        "user": pa.array([0, 1, 2], pa.int32()),
        "user_id": ["a", "b", "c"],
        "offset": pa.array([0, 4, 5]),
        "count": pa.array([4, 1, 0], pa.int32()),
        "gender": ["female", "male", "male"],
        "age": ["25-34", "56+", "18-24"],
        "occupation": ["writer", "lawyer", "artist"],
    }
)
ITEMS = pa.table({"item": pa.array(range(4), pa.int32()), "item_id": ["x"] * 4, "title": ["A", "B", "C", "D"]})
HISTORIES = Histories(
    np.array([0, 4, 5, 5]), np.array([3, 1, 0, 2, 1], np.int32), np.array([3, 1, 5, 2, 4], np.float32)
)
CATALOGUE = Catalogue.from_tables(USERS, ITEMS, HISTORIES, ML_1M, Display())

# Sample 7: user 0, all four behaviours; sample 9: user 0, the first two; sample 12: user 1; sample 15: user 2.
SAMPLES = Chosen(
    np.array([7, 9, 12, 15]),
    np.array([0, 0, 1, 2], np.int32),
    np.array([1, 2, 0, 3], np.int32),
    np.array([4, 2, 1, 0], np.int32),
    np.array([1.0, 0.0, 1.0, np.nan]),
)
TABLE = pa.table(
    [pa.array([7, 9, 12, 15]), pa.array([[2, 0, 3, 1], [1, 0], [0], []], pa.list_(pa.uint8()))],
    schema=neighbours_schema(pa.uint8()),
)


def shown(found: list[Question]) -> list[tuple[list[str], list[float], str]]:
    return [(list(q.names), list(q.ratings), q.target) for q in found]


def test_recent_behaviours_are_the_last_k_oldest_first() -> None:
    assert shown(questions(CATALOGUE, SAMPLES, "recent", None, 3)) == [
        (["B", "A", "C"], [1.0, 5.0, 2.0], "B"),
        (["D", "B"], [3.0, 1.0], "C"),
        (["B"], [4.0], "A"),
        ([], [], "D"),
    ]


def test_retrieved_behaviours_are_the_top_k_oldest_first() -> None:
    found = Neighbours.from_table(TABLE)
    assert shown(questions(CATALOGUE, SAMPLES, "retrieved", found, 2)) == [
        (["D", "A"], [3.0, 5.0], "B"),
        (["D", "B"], [3.0, 1.0], "C"),
        (["B"], [4.0], "A"),
        ([], [], "D"),
    ]
    assert shown(questions(CATALOGUE, SAMPLES, "retrieved", found, 1))[0] == (["A"], [5.0], "B")


def test_recent_ignores_neighbours_that_are_there() -> None:
    found = Neighbours.from_table(TABLE)
    assert shown(questions(CATALOGUE, SAMPLES, "recent", found, 2)) == shown(
        questions(CATALOGUE, SAMPLES, "recent", None, 2)
    )


def test_with_no_more_than_k_behaviours_the_twins_are_the_same() -> None:
    found = Neighbours.from_table(TABLE)
    retrieved, recent = (questions(CATALOGUE, SAMPLES, h, found, 4) for h in ("retrieved", "recent"))
    assert [q.text(ML_1M, WRAPPERS["vicuna"]) for q in retrieved] == [q.text(ML_1M, WRAPPERS["vicuna"]) for q in recent]
    assert [q.retrieved for q in retrieved + recent] == [True] * 4 + [False] * 4


def test_the_profile_is_the_user_s() -> None:
    found = questions(CATALOGUE, SAMPLES, "recent", None, 3)
    assert found[0].profile == {"gender": "female", "age": "25-34", "occupation": "writer"}
    assert [q.profile["occupation"] for q in found] == ["writer", "writer", "lawyer", "artist"]


def test_top_is_sorted_by_position_and_bounded() -> None:
    found = Neighbours.from_table(TABLE)
    assert [found.top(7, k).tolist() for k in (1, 2, 3, 4, 99)] == [[2], [0, 2], [0, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert found.top(15, 3).tolist() == []


@pytest.mark.parametrize("sample", [0, 8, 16])
def test_a_sample_without_neighbours_is_an_error_not_an_empty_history(sample: int) -> None:
    with pytest.raises(InputError, match=f"sample {sample} has no neighbours"):
        Neighbours.from_table(TABLE).top(sample, 3)


def test_retrieved_without_neighbours_is_an_error() -> None:
    with pytest.raises(ValueError, match="need the neighbours"):
        questions(CATALOGUE, SAMPLES, "retrieved", None, 3)


def test_neighbours_of_several_parts() -> None:
    """As a table read from shards: chunks, and slices of longer arrays."""
    pieces = pa.concat_tables([TABLE.slice(1, 1), TABLE.slice(2)])
    found = Neighbours.from_table(pieces.combine_chunks())
    assert [found.top(s, 9).tolist() for s in (9, 12, 15)] == [[0, 1], [0], []]
    cut = Neighbours.from_table(TABLE.slice(1, 2))
    assert [cut.top(s, 9).tolist() for s in (9, 12)] == [[0, 1], [0]]
    with pytest.raises(InputError):
        cut.top(7, 1)


def test_the_text_and_what_is_skipped() -> None:
    question = questions(CATALOGUE, SAMPLES, "recent", None, 3)[0]
    text = question.text(ML_1M, WRAPPERS["vicuna"])
    assert text == WRAPPERS["vicuna"].wrap(prompt_text(ML_1M, question.profile, ["B", "A", "C"], [1, 5, 2], "B"))
    # The oldest go first, and the rest is numbered anew.
    assert "['0. A (5 stars)', '1. C (2 stars)']" in question.text(ML_1M, WRAPPERS["plain"], skip=1)
    assert "\n[]\n" in question.text(ML_1M, WRAPPERS["plain"], skip=3)


ratings = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 6), st.integers(1, 5), st.integers(0, 9)), min_size=1, max_size=40
)


@settings(deadline=None, max_examples=100)
@given(rows=ratings, k=st.integers(1, 6), data=st.data())
def test_a_prompt_knows_nothing_of_the_target_s_rating_and_after(
    rows: list[tuple[int, int, int, int]], k: int, data: st.DataObject
) -> None:
    """Histories hold earlier behaviours only, oldest first; other ratings from the target on change no word."""
    user, item, rating, time = (np.array(column) for column in zip(*rows, strict=True))
    names = pa.table({"user": pa.array(range(4), pa.int32()), "user_id": list("abcd")})
    items = pa.table({"item": pa.array(range(7), pa.int32()), "item_id": list("0123456"), "title": list("ABCDEFG")})
    raw = RawDataset(
        names, items, user.astype(np.int32), item.astype(np.int32), rating.astype(np.float32), time.astype(np.int64)
    )
    tables = assemble(raw, DataConfig(min_history=0))
    samples = choose(tables.samples, tables.samples["sample_id"].to_numpy())
    lists = [data.draw(st.permutations(range(e)))[:5] for e in samples.end.tolist()]
    found = Neighbours.from_table(
        pa.table(
            [pa.array(samples.sample_id), pa.array(lists, pa.list_(pa.uint8()))],
            schema=neighbours_schema(pa.uint8()),
        )
    )
    histories = tables.histories()
    for row in range(len(samples)):
        sample = samples.rows(row, row + 1)
        start, end = int(histories.offset[sample.user[0]]), int(sample.end[0])
        later = histories.rating.copy()
        later[start + end :] = 99
        earlier = tables.interactions["timestamp"].to_numpy()[start : start + end]
        assert (np.diff(earlier) >= 0).all()
        for history in ("recent", "retrieved"):
            texts = []
            for known in (histories.rating, later):
                changed = replace(histories, rating=known)
                catalogue = Catalogue.from_tables(tables.users, tables.items, changed, ML_25M, Display())
                question = questions(catalogue, sample, history, found, k)[0]
                texts.append(question.text(ML_25M, WRAPPERS["plain"]))
            assert texts[0] == texts[1]
            shown = min(k, end) if history == "recent" else min(k, len(lists[row]))
            assert len(question.names) == shown
