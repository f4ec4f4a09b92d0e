"""Features: Table 1's numbers, one space of ids, histories that share the target's item field."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rella.config import DataConfig
from rella.ctr.features import MAX_LEVELS, PADDING, Features
from rella.data.raw import field_vocabularies
from rella.data.samples import assemble
from rella.data.sources import Source
from rella.data.tables import Tables
from rella.errors import InputError
from tests.ctr.worlds import FIELDS, random_tables, sample_world, tables_of

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "ml-1m"


def with_ratings(tables: Tables, ratings: np.ndarray) -> Tables:
    at = tables.interactions.schema.get_field_index("rating")
    changed = tables.interactions.set_column(at, "rating", pa.array(ratings.astype(np.float32)))
    return Tables(tables.users, tables.items, changed, tables.samples)


def test_every_value_of_a_field_has_its_own_id() -> None:
    tables = random_tables(0, items=12)
    found = Features.of(tables, FIELDS)
    assert found.names == ("User ID", "Item ID", "Genre", "Rating")
    assert found.sizes == (9, 12, 4, 5)
    assert found.count == 30
    assert (found.space.count, found.space.fields, found.space.item_at) == (31, 3, 1)
    assert (found.space.first_level, found.space.levels) == (26, 5)
    seen: set[int] = {PADDING}
    for columns, table, names in (
        (found.user_fields, tables.users, ["user_id"]),
        (found.item_fields, tables.items, ["item_id", "genre"]),
    ):
        assert columns.dtype == np.int32
        for n, name in enumerate(names):
            pairs = set(zip(table.column(name).to_pylist(), columns[:, n].tolist(), strict=True))
            ids = {i for _, i in pairs}
            assert len(pairs) == len(ids) == len({value for value, _ in pairs})
            assert not ids & seen
            seen |= ids
    assert seen == set(range(26))


def test_rating_levels_ascend() -> None:
    tables = random_tables(1)
    rating = tables.interactions.column("rating").to_numpy()
    found = Features.of(tables, FIELDS)
    assert found.level.dtype == np.uint8
    assert found.level.tolist() == rating.astype(int).tolist()


def test_without_ratings_there_are_no_levels() -> None:
    tables = random_tables(2)
    found = Features.of(with_ratings(tables, np.zeros(len(tables.interactions))), FIELDS)
    assert (found.names, len(found.level)) == (("User ID", "Item ID", "Genre"), 0)
    assert (found.space.levels, found.space.count) == (0, found.count + 1)


def test_many_different_ratings_are_cut_into_levels() -> None:
    tables = random_tables(3, users=200, longest=60)
    minutes = np.random.default_rng(0).exponential(100, len(tables.interactions))
    found = Features.of(with_ratings(tables, minutes), FIELDS)
    share = np.bincount(found.level)[1:] / len(minutes)
    assert found.space.levels == len(share) == MAX_LEVELS
    assert share.min() > 0.5 / MAX_LEVELS
    order = np.argsort(minutes)
    assert (np.diff(found.level[order].astype(int)) >= 0).all()


def test_the_sample_data_set_has_its_vocabularies() -> None:
    raw = Source("sample", None).load(DataConfig(sample_users=60))
    found = sample_world(60).features
    assert dict(zip(found.names, found.sizes, strict=True)) == field_vocabularies(raw)


def test_categories_are_found_or_named() -> None:
    features = Features.of(random_tables(4), FIELDS)
    assert features.category().tolist() == features.item_fields[:, 1].tolist()
    assert features.category("Genre").tolist() == features.category().tolist()
    assert features.category("Item ID").tolist() == features.item_ids.tolist()
    with pytest.raises(InputError, match="no item field 'User ID'"):
        features.category("User ID")
    plain = Features.of(random_tables(4), {"Item ID": "items.item_id", "Title": "items.title"})
    assert plain.user_fields.shape == (9, 0)
    with pytest.raises(InputError, match="no genre, author or category"):
        plain.category()


def test_nulls_are_a_value() -> None:
    tables = tables_of([[(0, 1.0), (1, 2.0)]], [(0, 0, 1, 1.0)], ["a", "b"])
    genres = pa.array(["a", None])
    items = tables.items.set_column(tables.items.schema.get_field_index("genre"), "genre", genres)
    found = Features.of(Tables(tables.users, items, tables.interactions, tables.samples), FIELDS)
    assert found.sizes == (1, 2, 2, 2)


def test_fields_that_do_not_fit_are_refused() -> None:
    tables = random_tables(5)
    with pytest.raises(InputError, match=r"items\.item_id"):
        Features.of(tables, {"User ID": "users.user_id"})
    with pytest.raises(InputError, match="no column 'author'"):
        Features.of(tables, FIELDS | {"Author": "items.author"})


@pytest.mark.skipif(not SHARED.exists(), reason="MovieLens-1M is not here")
def test_movielens_1m_has_table_1s_features() -> None:
    raw = Source("ml-1m", str(SHARED), None).load(DataConfig())
    found = Features.of(assemble(raw, DataConfig()), raw.fields)
    assert found.sizes == (6040, 2, 7, 21, 3439, 3706, 3706, 18, 5)
    assert found.count == 16_944
    assert len(found.names) + 1 == 10, "Table 1's 8 + 2 fields: the history's items share a vocabulary"
