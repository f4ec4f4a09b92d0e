"""Order, label, filter, split and the contracts of the tables."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rella.config import DataConfig
from rella.data.files import locate
from rella.data.movielens import FILES, read_ml1m
from rella.data.raw import RawDataset
from rella.data.samples import assemble, permutation
from rella.data.tables import Histories, Tables, table1

REAL = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "ml-1m"


def raw_of(rows: list[tuple[int, int, float, int]], users: int, items: int) -> RawDataset:
    """Return the data set of (user, item, rating, timestamp) rows."""
    user, item, rating, timestamp = (
        (np.array(column) for column in zip(*rows, strict=True)) if rows else [np.zeros(0)] * 4
    )
    ids = [pa.array(np.arange(n, dtype=np.int32)) for n in (users, items)]
    return RawDataset(
        users=pa.table({"user": ids[0], "user_id": [f"u{n}" for n in range(users)], "age": ["56+"] * users}),
        items=pa.table({"item": ids[1], "item_id": [f"i{n}" for n in range(items)], "title": ["t"] * items}),
        user=user.astype(np.int32),
        item=item.astype(np.int32),
        rating=rating.astype(np.float32),
        timestamp=timestamp.astype(np.int64),
    )


SMALL = raw_of(
    [
        (1, 0, 5, 30),
        (1, 2, 3, 10),
        (0, 1, 4, 20),
        (1, 1, 4, 20),
        (0, 0, 1, 20),
        (2, 0, 5, 1),
        (0, 2, 2, 15),
    ],
    users=4,
    items=3,
)


def rules(**changes: Any) -> DataConfig:
    """Return the rules of most tests here: above 3 stars is positive, one earlier behaviour is enough."""
    return DataConfig(**{"positive_above": 3.0, "min_history": 1, **changes})


def test_a_hand_worked_data_set() -> None:
    tables = assemble(SMALL, rules(split=(2, 1, 1)))
    tables.validate()
    assert tables.users.select(["user", "user_id", "offset", "count", "age"]).to_pydict() == {
        "user": [0, 1, 2, 3],
        "user_id": ["u0", "u1", "u2", "u3"],
        "offset": [0, 3, 6, 7],
        "count": [3, 3, 1, 0],
        "age": ["56+"] * 4,
    }
    assert tables.interactions.to_pydict() == {
        "item": [2, 0, 1, 2, 1, 0, 0],
        "rating": [2.0, 1.0, 4.0, 3.0, 4.0, 5.0, 5.0],
        "timestamp": [15, 20, 20, 10, 20, 30, 1],
    }
    # In time: (20, user 0, item 0), (20, 0, 1), (20, 1, 1), (30, 1, 0): two train, one valid, one test.
    assert tables.samples.to_pydict() == {
        "sample_id": [1, 2, 4, 5],
        "user": [0, 0, 1, 1],
        "item": [0, 1, 1, 0],
        "end": [1, 2, 1, 2],
        "label": [0, 1, 1, 1],
        "split": ["train", "train", "valid", "test"],
        "rank": [0, 1, 2, 3],
    }
    assert table1(tables) == {"users": 4, "items": 3, "samples": 4, "train": 2, "valid": 1, "test": 1}


def test_histories_are_views_of_what_came_before() -> None:
    histories = assemble(SMALL, rules()).histories()
    items, ratings = histories.of(1, 2)
    assert (items.tolist(), ratings.tolist()) == ([2, 1], [3.0, 4.0])
    assert items.base is not None
    assert np.shares_memory(items, histories.item)
    assert histories.of(3, 0)[0].tolist() == []
    assert histories.of(0, 3)[0].tolist() == [2, 0, 1]
    for user, end in ((0, 4), (3, 1), (0, -1), (4, 0), (-1, 0)):
        with pytest.raises(IndexError):
            histories.of(user, end)


def test_histories_of_one_chunk_are_not_copied() -> None:
    tables = assemble(SMALL, rules())
    first = Histories.from_tables(tables.users, tables.interactions)
    second = Histories.from_tables(tables.users, tables.interactions)
    assert np.shares_memory(first.item, second.item)
    assert np.shares_memory(first.rating, second.rating)


ratings = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(1, 5), st.integers(-3, 12)), min_size=1, max_size=60
)


@settings(deadline=None, max_examples=150)
@given(rows=ratings, min_history=st.integers(0, 3), parts=st.tuples(st.integers(1, 8), st.integers(0, 3), st.just(1)))
def test_against_the_rules_written_out(
    rows: list[tuple[int, int, int, int]], min_history: int, parts: tuple[int, int, int]
) -> None:
    raw = raw_of(rows, users=5, items=7)
    behaviours: dict[int, list[tuple[int, int, int, int]]] = {user: [] for user in range(5)}
    kept = []
    for n in sorted(range(len(rows)), key=lambda n: (rows[n][3], rows[n][0], rows[n][1])):
        user, item, rating, _ = rows[n]
        if len(behaviours[user]) >= min_history:
            kept.append((user, len(behaviours[user]), item, rating))
        behaviours[user].append(rows[n])
    if not kept:
        with pytest.raises(ValueError, match="no sample is left"):
            assemble(raw, rules(min_history=min_history, split=parts))
        return
    tables = assemble(raw, rules(min_history=min_history, split=parts))
    tables.validate()
    offset = tables.users["offset"].to_pylist()
    cut = [len(kept) * parts[0] // sum(parts), len(kept) * parts[1] // sum(parts)]
    splits = ["train"] * cut[0] + ["valid"] * cut[1] + ["test"] * (len(kept) - sum(cut))
    expected = sorted(
        (offset[user] + end, user, item, end, int(rating > 3), split)
        for (user, end, item, rating), split in zip(kept, splits, strict=True)
    )
    assert [tuple(row.values())[:6] for row in tables.samples.to_pylist()] == expected
    histories = tables.histories()
    for user, rated in behaviours.items():
        items, stars = histories.of(user, len(rated))
        assert items.tolist() == [row[1] for row in rated]
        assert stars.tolist() == [row[2] for row in rated]


@settings(deadline=None, max_examples=50)
@given(rows=ratings, generator=st.randoms(use_true_random=False))
def test_the_order_of_the_input_does_not_matter(rows: list[tuple[int, int, int, int]], generator) -> None:
    unique = list({(row[0], row[1], row[3]): row for row in rows}.values())
    shuffled = generator.sample(unique, len(unique))
    one, two = (assemble(raw_of(r, 5, 7), rules(min_history=0)) for r in (unique, shuffled))
    assert one == two


@settings(deadline=None, max_examples=50)
@given(rows=ratings)
def test_histories_hold_earlier_behaviours_only(rows: list[tuple[int, int, int, int]]) -> None:
    tables = assemble(raw_of(rows, 5, 7), rules(min_history=0))
    time = tables.interactions["timestamp"].to_numpy()
    times: dict[str, list[int]] = {"train": [], "valid": [], "test": []}
    for sample in tables.samples.to_pylist():
        times[sample["split"]].append(time[sample["sample_id"]])
    filled = [t for t in times.values() if t]
    assert all(max(before) <= min(after) for before, after in pairwise(filled))


def test_times_that_do_not_fit_one_packed_key() -> None:
    far = [(user, item, 4, (item + 1) * 2**61 - user) for user in range(2) for item in range(3)]
    near = [(user, item, 4, (item + 1) * 10 - user) for user in range(2) for item in range(3)]
    wide, narrow = (assemble(raw_of(rows, 2, 3), rules()) for rows in (far, near))
    assert wide.samples == narrow.samples


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"user": SMALL.user[:-1]}, {}, "user: 6 values for 7 ratings"),
        ({"timestamp": SMALL.timestamp[:-1]}, {}, "timestamp: 6 values for 7 ratings"),
        ({"item": SMALL.item + 1}, {}, r"item: values 1\.\.3, but the table has 3 rows"),
        ({"rating": np.where(SMALL.rating == 4, np.nan, 1)}, {}, "rating: row 2 is not a number"),
        ({}, {"min_history": -1}, "min_history is -1"),
        ({}, {"split": (8, -1, 1)}, r"data.split is \(8, -1, 1\)"),
        ({}, {"split": (0, 0, 0)}, r"data.split is \(0, 0, 0\)"),
        ({}, {"min_history": 3}, "no user has more than 3 ratings"),
    ],
)
def test_impossible_requests(change: dict, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assemble(replace(SMALL, **change), rules(**arguments))


def test_no_ratings_at_all() -> None:
    with pytest.raises(ValueError, match="no sample is left"):
        assemble(raw_of([], 2, 2), rules())


def set_value(tables: Tables, table: str, column: str, row: int, value: object) -> Tables:
    """Return `tables` with one value changed."""
    old: pa.Table = getattr(tables, table)
    place = old.schema.get_field_index(column)
    values = old.column(column).to_pylist()
    values[row] = value
    changed = old.set_column(place, old.schema.field(column), pa.array(values, old.schema.field(column).type))
    return replace(tables, **{table: changed})


@pytest.mark.parametrize(
    ("table", "column", "row", "value", "message"),
    [
        ("users", "user", 1, 7, "users: user is not the row number in row 1"),
        ("users", "offset", 1, 2, "users: offset is not the sum of the counts before it in row 1"),
        ("users", "count", 3, 1, "users: the counts sum to 8, but there are 7 interactions"),
        ("users", "count", 3, -1, "users: count is negative in row 3"),
        ("items", "item", 0, 2, "items: item is not the row number in row 0"),
        ("interactions", "item", 2, 3, r"interactions: item is not in 0\.\.2 in row 2"),
        ("interactions", "rating", 2, float("nan"), "interactions: rating is not a number in row 2"),
        ("interactions", "timestamp", 1, 3, "interactions: timestamp is before the same user's previous one in row 1"),
        ("samples", "sample_id", 2, 2, "samples: sample_id does not ascend in row 2"),
        ("samples", "sample_id", 0, -1, "samples: sample_id is negative in row 0"),
        ("samples", "sample_id", 1, 3, "samples: sample_id is not offset . end in row 1"),
        ("samples", "user", 0, 4, r"samples: user is not in 0\.\.3 in row 0"),
        ("samples", "item", 0, 5, r"samples: item is not in 0\.\.2 in row 0"),
        ("samples", "item", 0, 1, "samples: item is not the interaction's in row 0"),
        ("samples", "end", 1, 3, "samples: end is not below the user's count of behaviours in row 1"),
        ("samples", "end", 1, 4, "samples: end is more than the user's behaviours in row 1"),
        ("samples", "end", 0, -1, "samples: end is more than the user's behaviours in row 0"),
        ("samples", "label", 0, 2, r"samples: label \[2\] is none of \[0, 1\]"),
        ("samples", "split", 0, "dev", r"samples: split \['dev'\] is none of"),
    ],
)
def test_validate_names_every_broken_contract(table: str, column: str, row: int, value: object, message: str) -> None:
    tables = assemble(SMALL, rules())
    with pytest.raises(ValueError, match=message):
        set_value(tables, table, column, row, value).validate()


def test_a_pair_to_be_scored_has_its_own_id() -> None:
    tables = assemble(SMALL, rules())
    pair = {"sample_id": [7], "user": [0], "item": [2], "end": [3], "label": [None], "split": ["test"], "rank": [9]}
    more = pa.concat_tables([tables.samples, pa.table(pair, schema=tables.samples.schema)])
    replace(tables, samples=more).validate()


def test_a_missing_column_is_named() -> None:
    tables = assemble(SMALL, rules())
    with pytest.raises(ValueError, match="samples: column 'end' is missing"):
        replace(tables, samples=tables.samples.drop_columns(["end"])).validate()


def test_python_s_shuffle_is_what_it_was() -> None:
    """The authors' data sets are made by it: another Python that shuffles otherwise makes other samples."""
    assert permutation(10, 42).tolist() == [7, 3, 2, 8, 5, 6, 9, 4, 0, 1]
    assert permutation(1, 42).tolist() == [0]


BOOKS = rules(order="shuffle", targets="last", split_by="user", split=(81, 9, 10), min_history=5)


def test_bookcrossing_s_rules_written_out() -> None:
    """Per user a shuffle with seed 42, the last is the target; users by first rating, shuffled with seed 42, cut."""
    rng = np.random.default_rng(3)
    rows = [(int(u), int(i), float(r), 0) for u, i, r in zip(
        rng.integers(0, 60, 900), rng.integers(0, 50, 900), rng.integers(0, 11, 900), strict=True
    )]  # fmt: skip
    rows += [(60, 1, 5.0, 0)] * 5  # one behaviour too few
    raw = raw_of(rows, 61, 50)
    tables = assemble(raw, BOOKS)
    tables.validate()
    by_user: dict[int, list[tuple[int, float]]] = {}
    for user, item, rating, _ in rows:
        by_user.setdefault(user, []).append((item, rating))
    order = []
    for user, rated in by_user.items():
        if len(rated) > 5:
            random.Random(42).shuffle(rated)
            order.append(user)
    random.Random(42).shuffle(order)
    samples = {s["user"]: s for s in tables.samples.to_pylist()}
    assert set(samples) == set(order)
    train, valid = len(order) * 81 // 100, len(order) * 9 // 100
    for place, user in enumerate(order):
        sample, (item, rating) = samples[user], by_user[user][-1]
        assert (sample["item"], sample["label"], sample["rank"]) == (item, int(rating > 3), place)
        assert sample["split"] == ("train" if place < train else "valid" if place < train + valid else "test")
        items, stars = tables.histories().of(user, sample["end"])
        assert list(zip(items.tolist(), stars.tolist(), strict=True)) == by_user[user][:-1]


def test_users_can_be_split_with_every_target() -> None:
    tables = assemble(SMALL, rules(split_by="user", split=(1, 0, 1)))
    splits = {(s["user"], s["split"]) for s in tables.samples.to_pylist()}
    assert len(splits) == 2
    assert {split for _, split in splits} == {"train", "test"}
    assert sorted(tables.samples["rank"].to_pylist()) == [0, 1, 2, 3]


def test_the_file_s_order_can_count() -> None:
    tables = assemble(SMALL, rules(order="file"))
    tables.validate()
    assert tables.interactions["item"].to_pylist() == [1, 0, 2, 0, 2, 1, 0]
    assert tables.interactions["timestamp"].to_pylist() == [0, 1, 2, 0, 1, 2, 0]


def test_labels_and_splits_of_the_source() -> None:
    label = np.array([1, -1, 0, 0, 1, 0, 1], np.int8)
    split = np.array([0, 2, 2, 1, 0, 0, -1], np.int8)
    raw = replace(SMALL, label=label, split=split)
    tables = assemble(raw, rules(split_by="column", min_history=0))
    tables.validate()
    found = {(s["user"], s["item"]): (s["label"], s["split"]) for s in tables.samples.to_pylist()}
    assert found == {
        (1, 0): (1, "train"),
        (0, 1): (0, "test"),
        (1, 1): (0, "valid"),
        (0, 0): (1, "train"),
        (2, 0): (0, "train"),
    }
    assert len(assemble(raw, rules(min_history=0)).samples) == 6, "the split column does not count"
    with pytest.raises(ValueError, match="the data has no split column"):
        assemble(SMALL, rules(split_by="column"))
    with pytest.raises(ValueError, match=r"data\.split_by time: shuffled behaviours have no time"):
        assemble(SMALL, rules(order="shuffle"))


@pytest.fixture(scope="module")
def real() -> Tables:
    if not (REAL / "ratings.dat").is_file():
        pytest.skip("the MovieLens-1M files are not in ../shared/data/ml-1m")
    return assemble(read_ml1m(locate("ml-1m", FILES, REAL)), DataConfig())


def test_table_1_of_movielens_1m(real: Tables) -> None:
    real.validate()
    assert table1(real) == {
        "users": 6040,
        "items": 3706,
        "samples": 970_009,
        "train": 776_007,
        "valid": 97_000,
        "test": 97_002,
    }
    assert len(real.interactions) == 1_000_209
    assert min(real.samples["end"].to_pylist()) == 5


def test_the_real_splits_follow_one_another_in_time(real: Tables) -> None:
    time = real.interactions["timestamp"].to_numpy()[real.samples["sample_id"].to_numpy()]
    split = np.array(real.samples["split"].to_pylist())
    assert time[split == "train"].max() <= time[split == "valid"].min()
    assert time[split == "valid"].max() <= time[split == "test"].min()
