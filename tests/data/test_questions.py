"""Which behaviours a question shows, and in which order."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from rella.data.questions import Catalogue, Neighbours, Question, questions
from rella.data.selection import Chosen
from rella.data.tables import Histories
from rella.prompts import ML_1M, WRAPPERS, Display, prompt_text
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
    with pytest.raises(KeyError, match=f"sample {sample} has no neighbours"):
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
    with pytest.raises(KeyError):
        cut.top(7, 1)


def test_the_text_and_what_is_skipped() -> None:
    question = questions(CATALOGUE, SAMPLES, "recent", None, 3)[0]
    text = question.text(ML_1M, WRAPPERS["vicuna"])
    assert text == WRAPPERS["vicuna"].wrap(prompt_text(ML_1M, question.profile, ["B", "A", "C"], [1, 5, 2], "B"))
    # The oldest go first, and the rest is numbered anew.
    assert "['0. A (5 stars)', '1. C (2 stars)']" in question.text(ML_1M, WRAPPERS["plain"], skip=1)
    assert "\n[]\n" in question.text(ML_1M, WRAPPERS["plain"], skip=3)
