"""What every data source hands over: users, items and ratings, before order, filter, label and split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

HISTORY_FIELDS = ("history ID", "history rating")
"""The two fields of Table 1 that are sequences; the second one only where there are ratings."""


@dataclass(frozen=True)
class RawDataset:
    """The ratings of one data set as columns, with the tables they point into.

    Users and items are numbered in the order of their original ids where these are numbers, so that ties in time that
    are broken by user and item number are broken by the ids as well.
    """

    users: pa.Table
    """`user` int32 (= row number), `user_id` string, then profile fields as the text that prompts show."""
    items: pa.Table
    """`item` int32 (= row number), `item_id` string, `title`, then descriptive fields (`genre`, `genres`)."""
    user: npt.NDArray[np.int32]
    """(R,) row of `users`."""
    item: npt.NDArray[np.int32]
    """(R,) row of `items`."""
    rating: npt.NDArray[np.float32]
    """(R,) in stars, or whatever a behaviour shows in their place; zeros where `rated` is False."""
    timestamp: npt.NDArray[np.int64]
    """(R,) seconds since the epoch; the rank in the file where there is no time."""
    label: npt.NDArray[np.int8] | None = None
    """(R,) 0, 1, or -1 for a behaviour that is no sample, where the source has labels; None: the rating decides."""
    split: npt.NDArray[np.int8] | None = None
    """(R,) index into `schemas.SPLITS` where the source says which part a row belongs to, -1 for behaviour only."""
    rated: bool = True
    """Whether behaviours carry ratings."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Table 1: name of a field of the ID-based baselines → its column, `users.<column>` or `items.<column>`."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Reason → rows of the original files that were left out."""


def field_vocabularies(raw: RawDataset) -> dict[str, int]:
    """Return how many distinct values each field has, by its name; together they are Table 1's features.

    `Rating` counts the levels that occur: ratings of the history are features too, while its items share the target's
    vocabulary. On MovieLens-1M: 6040, 2, 7, 21, 3439, 3706, 3706, 18 and 5, in all 16,944.
    """
    tables = {"users": raw.users, "items": raw.items}
    sizes = {}
    for name, place in raw.fields.items():
        table, _, column = place.partition(".")
        sizes[name] = len(tables[table].column(column).unique())
    return sizes | ({"Rating": len(np.unique(raw.rating))} if raw.rated else {})


def field_count(raw: RawDataset) -> int:
    """Return Table 1's number of fields: those of `fields` and the history's."""
    return len(raw.fields) + (len(HISTORY_FIELDS) if raw.rated else 1)
