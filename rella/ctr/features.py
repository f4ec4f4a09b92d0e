"""One-hot features of users, items and ratings: one space of ids for all fields (§4.1.3, Table 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rella.data.tables import Tables, column
from rella.errors import InputError

Ints = npt.NDArray[np.int32]
PADDING = 0
"""The id that stands for no feature."""
MAX_LEVELS = 50
"""Ratings of more different values (plays, minutes) are cut into this many levels of about equal share."""
RATING = "Rating"
_ITEM_ID = "items.item_id"
_CATEGORIES = ("items.genre", "items.author", "items.category")


@dataclass(frozen=True)
class FeatureSpace:
    """What a model must know of the features to lay out its parameters."""

    count: int
    """Features with the padding: rows of the embedding table."""
    fields: int
    """F, fields of a sample: the user's, then the target item's."""
    item_at: int
    """Which of the F fields is the target's item id; behaviours share its features."""
    first_level: int
    """Feature of the lowest rating level; the others follow it."""
    levels: int
    """L, rating levels; 0 where behaviours carry no ratings."""


@dataclass(frozen=True)
class Features:
    """Every field of every user and item as feature ids, in flat arrays that workers share without a copy.

    Field f has the ids [first_f, first_f + sizes_f); id 0 is the padding. The ids of a history's items are those of the
    target's item field, its rating levels are features of their own. Users and items that the training split lacks
    have ids, too: nothing ever trains their embeddings, which stay as small as they began (`init_std`), so that they
    add next to nothing to a prediction and their other fields decide.
    """

    user_fields: Ints
    """(U, Fu) by row of the users table."""
    item_fields: Ints
    """(I, Fi) by row of the items table."""
    item_at: int
    """Column of `item_fields` that is the item id."""
    level: npt.NDArray[np.uint8]
    """(R,) rating level of every behaviour, 1 to L (0 is no behaviour); empty where there are no ratings. Its feature
    is `space.first_level + level - 1`."""
    names: tuple[str, ...]
    """Of the fields: the user's, the item's, then `Rating` where there are ratings."""
    sizes: tuple[int, ...]
    """Vocabulary of each; their sum is Table 1's number of features."""
    category_at: int | None
    """Column of `item_fields` that is the genre, author or category, whichever comes first."""

    @property
    def count(self) -> int:
        """Features without the padding: Table 1's number."""
        return sum(self.sizes)

    @property
    def space(self) -> FeatureSpace:
        """The layout that models are built from."""
        users, items = self.user_fields.shape[1], self.item_fields.shape[1]
        levels = self.sizes[-1] if len(self.level) else 0
        return FeatureSpace(self.count + 1, users + items, users + self.item_at, self.count + 1 - levels, levels)

    @property
    def item_ids(self) -> Ints:
        """(I,) feature of every item's id."""
        return np.ascontiguousarray(self.item_fields[:, self.item_at])

    def category(self, name: str = "auto") -> Ints:
        """Return the (I,) feature of every item's category, for SIM's hard search.

        Args:
            name: one of `names`; `auto` for the genre, the author or the category.

        Raises:
            InputError: no item field of that name, or none that `auto` knows.
        """
        item_names = list(self.names[self.user_fields.shape[1] :][: self.item_fields.shape[1]])
        at = self.category_at if name == "auto" else item_names.index(name) if name in item_names else None
        if at is None:
            what = "no genre, author or category" if name == "auto" else f"no item field {name!r}"
            raise InputError(f"hard search: {what}; name one of {item_names} as the category, or take another search")
        return np.ascontiguousarray(self.item_fields[:, at])

    @staticmethod
    def of(tables: Tables, fields: Mapping[str, str]) -> Features:
        """Return the features of a data set: on MovieLens-1M 16,944 (Table 1).

        Vocabularies are those of the users and items tables, in the order of first appearance. Ratings have a level
        per value (`MAX_LEVELS` at most); where all are equal, as in data without ratings, they are no feature.

        Args:
            tables: the prepared data set.
            fields: name → `users.<column>` or `items.<column>`, as `RawDataset.fields`; the item's id is among them.

        Raises:
            InputError: a field's column does not exist, or no field is the item's id.
        """
        users = {name: place for name, place in fields.items() if place.startswith("users.")}
        items = {name: place for name, place in fields.items() if place not in users.values()}
        if _ITEM_ID not in items.values():
            raise InputError(f"fields {dict(fields)}: none is {_ITEM_ID}, whose features the history shares")
        sizes: list[int] = []
        user_fields = _encode(tables.users, users, sizes)
        item_fields = _encode(tables.items, items, sizes)
        level, levels = _levels(column(tables.interactions, "rating"))
        places = list(items.values())
        category = next((places.index(c) for c in _CATEGORIES if c in places), None)
        names = (*users, *items, *([RATING] if levels else []))
        found = (*sizes, *([levels] if levels else []))
        return Features(user_fields, item_fields, places.index(_ITEM_ID), level, names, found, category)


def _encode(table: pa.Table, fields: Mapping[str, str], sizes: list[int]) -> Ints:
    """Return (rows, fields) ids, each field's after those counted in `sizes`, which is extended."""
    columns = []
    for name, place in fields.items():
        kind, _, source = place.partition(".")
        if source not in table.schema.names:
            raise InputError(f"field {name!r}: {kind} have no column {source!r}, only {table.schema.names}")
        coded = table.column(source).combine_chunks().dictionary_encode(null_encoding="encode")
        columns.append(coded.indices.to_numpy(zero_copy_only=False).astype(np.int32) + np.int32(1 + sum(sizes)))
        sizes.append(len(coded.dictionary))
    return np.stack(columns, axis=1) if columns else np.zeros((len(table), 0), dtype=np.int32)


def _levels(rating: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], int]:
    """Return the (R,) levels, from 1, and their number; nothing and 0 where the ratings are all equal."""
    values = np.unique(rating)
    if len(values) < 2:
        return np.zeros(0, dtype=np.uint8), 0
    if len(values) > MAX_LEVELS:
        edges = np.arange(MAX_LEVELS) / MAX_LEVELS
        values = np.unique(np.quantile(rating, edges, method="lower"))
    return np.searchsorted(values, rating, side="right").astype(np.uint8), len(values)
