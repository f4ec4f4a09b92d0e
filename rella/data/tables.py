"""The prepared data set: four tables that satisfy `rella.schemas`, and histories as views into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rella.errors import InputError
from rella.schemas import INTERACTIONS, ITEMS, SAMPLES, SPLITS, USERS, check


@dataclass(frozen=True)
class Histories:
    """All behaviours, by user and then oldest first; a history is a prefix of its user's behaviours.

    Three flat arrays: in shared memory every worker of a node reads the same bytes.
    """

    offset: npt.NDArray[np.int64]
    """(U + 1,) user u's behaviours are `[offset[u], offset[u + 1])`."""
    item: npt.NDArray[np.int32]
    """(R,) row of the items table."""
    rating: npt.NDArray[np.float32]
    """(R,) in stars."""

    @classmethod
    def from_tables(cls, users: pa.Table, interactions: pa.Table) -> Histories:
        """Return the histories of a users and an interactions table; columns of one chunk are not copied."""
        offset = np.append(column(users, "offset"), np.int64(len(interactions)))
        return cls(offset, column(interactions, "item"), column(interactions, "rating"))

    def of(self, user: int, end: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Return the (end,) items and ratings of the user's first `end` behaviours, oldest first, as views.

        Raises:
            IndexError: there is no such user, or it has fewer than `end` behaviours.
        """
        if not 0 <= user < len(self.offset) - 1:
            raise IndexError(f"user {user}: there are {len(self.offset) - 1} users")
        start = int(self.offset[user])
        if not 0 <= end <= self.offset[user + 1] - start:
            raise IndexError(f"end {end}: user {user} has {self.offset[user + 1] - start} behaviours")
        return self.item[start : start + end], self.rating[start : start + end]


@dataclass(frozen=True)
class Tables:
    """A prepared data set (§4.1.1, Table 1 of the paper)."""

    users: pa.Table
    """(U rows) `schemas.USERS` and the profile fields."""
    items: pa.Table
    """(I rows) `schemas.ITEMS` and the descriptive fields."""
    interactions: pa.Table
    """(R rows) `schemas.INTERACTIONS`, by user, then oldest first."""
    samples: pa.Table
    """(S rows) `schemas.SAMPLES`, ascending by sample_id."""

    def histories(self) -> Histories:
        """Return the behaviours as flat arrays."""
        return Histories.from_tables(self.users, self.interactions)

    def validate(self) -> None:
        """Verify every contract between the four tables.

        Columns and types; users and items numbered by row; offsets that partition the interactions; behaviours in
        order of time; sample ids ascending; histories inside their user's behaviours. A sample whose id is below the
        number of interactions is that interaction: `end` is its position, its item is the interaction's. Larger ids
        are free for (user, item) pairs to be scored.

        Raises:
            InputError: names the table, the first row that breaks the contract and what is wrong.
        """
        for table, schema, name in (
            (self.users, USERS, "users"),
            (self.items, ITEMS, "items"),
            (self.interactions, INTERACTIONS, "interactions"),
            (self.samples, SAMPLES, "samples"),
        ):
            check(table, schema, name)
        for table, name in ((self.users, "user"), (self.items, "item")):
            rows = column(table, name)
            _refuse(rows != np.arange(len(rows)), f"{name}s", f"{name} is not the row number", rows)
        self._validate_interactions()
        self._validate_samples()

    def _validate_interactions(self) -> None:
        offset, count = column(self.users, "offset"), column(self.users, "count").astype(np.int64)
        item, timestamp = column(self.interactions, "item"), column(self.interactions, "timestamp")
        rating = column(self.interactions, "rating")
        _refuse(count < 0, "users", "count is negative", count)
        _refuse(offset != np.cumsum(count) - count, "users", "offset is not the sum of the counts before it", offset)
        if count.sum() != len(item):
            raise InputError(f"users: the counts sum to {count.sum()}, but there are {len(item)} interactions")
        _refuse(_outside(item, len(self.items)), "interactions", f"item is not in 0..{len(self.items) - 1}", item)
        _refuse(~np.isfinite(rating), "interactions", "rating is not a number", rating)
        earlier = np.zeros(len(item), dtype=bool)
        earlier[1:] = timestamp[1:] < timestamp[:-1]
        earlier[offset[count > 0]] = False
        _refuse(earlier, "interactions", "timestamp is before the same user's previous one", timestamp)

    def _validate_samples(self) -> None:
        ids, user = column(self.samples, "sample_id"), column(self.samples, "user")
        item, end = column(self.samples, "item"), column(self.samples, "end").astype(np.int64)
        offset, count = column(self.users, "offset"), column(self.users, "count")
        interactions = column(self.interactions, "item")
        _refuse(np.append(False, ids[1:] <= ids[:-1])[: len(ids)], "samples", "sample_id does not ascend", ids)
        _refuse(ids < 0, "samples", "sample_id is negative", ids)
        _refuse(_outside(user, len(offset)), "samples", f"user is not in 0..{len(offset) - 1}", user)
        _refuse(_outside(item, len(self.items)), "samples", f"item is not in 0..{len(self.items) - 1}", item)
        _refuse((end < 0) | (end > count[user]), "samples", "end is more than the user's behaviours", end)
        own = ids < len(interactions)
        _refuse(own & (end >= count[user]), "samples", "end is not below the user's count of behaviours", end)
        _refuse(own & (offset[user] + end != ids), "samples", "sample_id is not offset + end", ids)
        row = np.where(own, ids, 0)
        wrong = own & (interactions[row] != item) if len(interactions) else own
        _refuse(wrong, "samples", "item is not the interaction's", item)
        for name, values in (("label", [0, 1]), ("split", list(SPLITS))):
            found = set(pc.unique(self.samples.column(name)).drop_null().to_pylist())
            if not found <= set(values):
                raise InputError(f"samples: {name} {sorted(found - set(values))} is none of {values}")


def column(table: pa.Table, name: str) -> npt.NDArray[Any]:
    """Return a column as a numpy array, without a copy when it is one chunk without nulls."""
    return table.column(name).to_numpy()


def table1(tables: Tables) -> dict[str, int]:
    """Return the counts of Table 1 with the samples of each split: users, items, samples, train, valid, test."""
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(tables.samples.column("split")).to_pylist()}
    sizes = {"users": len(tables.users), "items": len(tables.items), "samples": len(tables.samples)}
    return sizes | {split: int(counts.get(split, 0)) for split in SPLITS}


def _outside(rows: npt.NDArray[Any], size: int) -> npt.NDArray[np.bool_]:
    return (rows < 0) | (rows >= size)


def _refuse(wrong: npt.NDArray[np.bool_], table: str, what: str, values: npt.NDArray[Any]) -> None:
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InputError(f"{table}: {what} in row {row}, where it is {values[row]} ({int(wrong.sum())} rows in all)")
