from __future__ import annotations

import time

import numpy as np
import pytest

from rella.data.raw import RawDataset
from rella.data.synthetic import catalogue, pretraining_dataset, sample_dataset
from rella.data.synthetic_words import AGES, GENRES, OCCUPATIONS, WORDS
from rella.prompts import ML_1M, prompt_text
from rella.schemas import ITEMS, check


@pytest.fixture(scope="module")
def sample() -> RawDataset:
    return sample_dataset()


def test_same_seed_gives_the_same_data(sample: RawDataset) -> None:
    again = sample_dataset()
    assert again.users.equals(sample.users)
    assert again.items.equals(sample.items)
    for name in ("user", "item", "rating", "timestamp"):
        assert np.array_equal(getattr(again, name), getattr(sample, name)), name


def test_another_seed_gives_other_ratings_of_the_same_catalogue(sample: RawDataset) -> None:
    other = sample_dataset(seed=1)
    assert other.items.equals(sample.items)
    assert len(other.item) != len(sample.item) or not np.array_equal(other.item, sample.item)


def test_columns_have_the_agreed_types(sample: RawDataset) -> None:
    check(sample.items, ITEMS, "items")
    assert sample.users.schema.names == ["user", "user_id", "gender", "age", "occupation", "zipcode"]
    assert sample.items.schema.names == ["item", "item_id", "title", "genre", "genres"]
    assert str(sample.users.schema.field("user").type) == "int32"
    assert str(sample.items.schema.field("genres").type.value_type) == "string"
    dtypes = [getattr(sample, name).dtype for name in ("user", "item", "rating", "timestamp")]
    assert dtypes == [np.int32, np.int32, np.float32, np.int64]


@pytest.mark.parametrize(("table", "key"), [("users", "user_id"), ("items", "item_id")])
def test_rows_are_numbered_in_the_order_of_their_ids(sample: RawDataset, table: str, key: str) -> None:
    rows = getattr(sample, table)
    ids = rows.column(key).to_pylist()
    assert ids == sorted(set(ids))
    assert rows.column(key[:4]).to_pylist() == list(range(len(ids)))


def test_profile_values_are_movielens_words_and_fit_the_prompt(sample: RawDataset) -> None:
    profiles = sample.users.drop_columns(["user"]).to_pylist()
    assert {p["gender"] for p in profiles} == {"female", "male"}
    assert {p["age"] for p in profiles} <= set(AGES)
    assert {p["occupation"] for p in profiles} <= set(OCCUPATIONS)
    assert all(len(p["zipcode"]) == 5 for p in profiles)
    prompt_text(ML_1M, profiles[0], ["A (1990)"], [4.0], "B (1991)")


def test_sizes_are_those_of_a_small_benchmark(sample: RawDataset) -> None:
    assert sample.users.num_rows == 400
    assert 550 <= sample.items.num_rows <= 650
    assert 20_000 <= len(sample.user) <= 27_000
    counts = np.bincount(sample.user)
    assert counts.min() >= 40
    assert counts.max() <= 100
    assert set(np.unique(sample.rating)) == {1.0, 2.0, 3.0, 4.0, 5.0}
    assert 0.4 < (sample.rating >= 4).mean() < 0.6


def test_nobody_watches_an_item_twice(sample: RawDataset) -> None:
    assert len(np.unique(sample.user.astype(np.int64) * sample.items.num_rows + sample.item)) == len(sample.user)


def test_titles_carry_their_genre_and_every_awkward_form_occurs(sample: RawDataset) -> None:
    for row in sample.items.to_pylist():
        adjectives, nouns = WORDS[row["genre"]]
        assert any(word in row["title"] for word in (*adjectives, *nouns)), row
        assert row["genres"][0] == row["genre"]
    titles = sample.items.column("title").to_pylist()
    for part in ("'s ", ", The (", " II (", ": Part 3 (", "Return of the "):
        assert any(part in title for title in titles), part
    assert any(len(genres) > 1 for genres in sample.items.column("genres").to_pylist())


def test_no_word_belongs_to_two_genres() -> None:
    words = [word for genre in GENRES for part in WORDS[genre] for word in part]
    assert len(words) == len(set(words))


def test_some_movies_are_listed_twice_under_two_ids(sample: RawDataset) -> None:
    rows = sample.items.to_pylist()
    seen: dict[str, dict[str, object]] = {}
    twins = [(seen[row["title"]], row) for row in rows if seen.setdefault(row["title"], row) is not row]
    assert len(twins) >= 5
    assert all(a["genre"] == b["genre"] and a["genres"] == b["genres"] for a, b in twins)
    quality = catalogue().quality
    assert all(quality[a["item"]] == quality[b["item"]] for a, b in twins)


def test_pretraining_users_are_other_users_of_the_same_catalogue(sample: RawDataset) -> None:
    other = pretraining_dataset(seed=2024, users=400)
    assert other.items.equals(sample.items)
    assert not set(other.users.column("user_id").to_pylist()) & set(sample.users.column("user_id").to_pylist())
    ours = {tuple(sample.item[sample.user == user][:10]) for user in range(400)}
    theirs = {tuple(other.item[other.user == user][:10]) for user in range(400)}
    assert not ours & theirs


def test_time_runs_forward_in_a_history_and_a_split_by_time_cuts_through_users(sample: RawDataset) -> None:
    same = sample.user[1:] == sample.user[:-1]
    assert (np.diff(sample.timestamp)[same] >= 0).all()
    order = np.lexsort((sample.item, sample.user, sample.timestamp))
    train, test = order[: int(0.8 * len(order))], order[int(0.9 * len(order)) :]
    users = set(sample.user[test])
    assert len(users & set(sample.user[train])) == len(users) > 300
    position = np.arange(len(sample.user)) - np.searchsorted(sample.user, sample.user)
    assert np.median(position[test]) > 35


def _agreements(data: RawDataset, k: int) -> tuple[float, float, float]:
    """Shares of rows: target's genre among the last k; label equal to the last old relevant one; to the last one."""
    genre, liked = catalogue().genre[data.item], data.rating >= 4
    first = np.searchsorted(data.user, data.user)
    near, old, recent = [], [], []
    for row in np.flatnonzero(np.arange(len(first)) - first >= 30):
        near.append((genre[row - k : row] == genre[row]).any())
        relevant = np.flatnonzero(genre[first[row] : row - k] == genre[row])
        if len(relevant):
            old.append(liked[first[row] + relevant[-1]] == liked[row])
            recent.append(liked[row - 1] == liked[row])
    return float(np.mean(near)), float(np.mean(old)), float(np.mean(recent))


def test_an_old_relevant_behaviour_beats_a_recent_one(sample: RawDataset) -> None:
    near, old, recent = _agreements(sample, k=8)
    assert near < 0.35
    assert old > recent + 0.12


def test_it_is_made_in_seconds() -> None:
    started = time.perf_counter()
    sample_dataset(seed=3)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("make", [sample_dataset, pretraining_dataset])
def test_no_users_is_an_error(make: type) -> None:
    with pytest.raises(ValueError, match="at least 1 user"):
        make(users=0)
