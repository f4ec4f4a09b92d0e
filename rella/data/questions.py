"""From sample columns to the question that the model is asked: which behaviours, in which order, in which words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rella.config import History
from rella.data.selection import Chosen
from rella.data.tables import Histories
from rella.errors import InputError
from rella.prompts import ChatWrapper, Display, names_of, prompt_text
from rella.wording import Wording


@dataclass(frozen=True)
class Question:
    """One sample's content before it is worded."""

    profile: Mapping[str, str]
    names: Sequence[str]
    """What the K behaviours' items are called, oldest first."""
    ratings: Sequence[float]
    target: str
    retrieved: bool = False
    """Whether the behaviours were retrieved (SUBR) or are the most recent ones."""

    def text(self, wording: Wording, wrapper: ChatWrapper, skip: int = 0) -> str:
        """Return the wrapped prompt without the `skip` oldest behaviours."""
        shown = self.names[skip:], self.ratings[skip:]
        return wrapper.wrap(prompt_text(wording, self.profile, *shown, self.target, self.retrieved))


@dataclass(frozen=True)
class Neighbours:
    """The retrieved positions of many samples (SUBR, §3.2)."""

    sample_id: npt.NDArray[np.int64]
    """(S,) ascending."""
    offsets: npt.NDArray[np.int64]
    """(S + 1,)."""
    positions: npt.NDArray[np.integer]
    """(offsets[-1],) indices into each sample's own history, most similar first."""

    @staticmethod
    def from_table(table: pa.Table) -> Neighbours:
        """Read the neighbours table of an artifact."""
        chunks = [c for c in table.column("positions").chunks if len(c)]
        counts = [c.value_lengths().to_numpy().astype(np.int64, copy=False) for c in chunks]
        # By hand: joined lists of Arrow's would count their positions in 32 bits.
        offsets = np.concatenate([[0], np.cumsum(np.concatenate([*counts, np.zeros(0, np.int64)]))]).astype(np.int64)
        values = [c.flatten().to_numpy(zero_copy_only=False) for c in chunks]
        positions = np.concatenate(values) if values else np.zeros(0, np.uint8)
        return Neighbours(table.column("sample_id").to_numpy(), offsets, positions)

    def top(self, sample_id: int, k: int) -> npt.NDArray[np.integer]:
        """Return the K most similar behaviours' positions in chronological order.

        Raises:
            InputError: the sample was not retrieved for.
        """
        row = int(np.searchsorted(self.sample_id, sample_id))
        if row == len(self.sample_id) or self.sample_id[row] != sample_id:
            raise InputError(f"sample {sample_id} has no neighbours: run retrieve with --retrieve.samples all")
        start = int(self.offsets[row])
        stop = min(start + k, int(self.offsets[row + 1]))
        return np.sort(self.positions[start:stop])


@dataclass(frozen=True)
class Catalogue:
    """What questions are made of: users' profiles, items' names, behaviours."""

    profiles: Mapping[str, Sequence[str]]
    """Profile field → its value by user."""
    names: Sequence[str]
    """What each item is called, by item."""
    histories: Histories

    @staticmethod
    def from_tables(
        users: pa.Table, items: pa.Table, histories: Histories, wording: Wording, display: Display
    ) -> Catalogue:
        """Take the columns that prompts show, each text made fit to be shown once and for all."""
        own = {"user", "user_id", "offset", "count"}
        profiles = {n: _shown(users.column(n), display) for n in users.schema.names if n not in own}
        columns = {n: items.column(n).to_pylist() for n in items.schema.names if n != "item"}
        return Catalogue(profiles, names_of(wording, columns, display), histories)

    def question(self, user: int, item: int, end: int, positions: npt.NDArray[np.integer] | None, k: int) -> Question:
        """Return a sample's question with the behaviours at `positions`, or with the K most recent where it is None.

        Args:
            user: row of the users table.
            item: the target, row of the items table.
            end: behaviours that the sample may see.
            positions: ascending indices below `end`.
            k: K.
        """
        items, ratings = self.histories.of(user, end)
        chosen = np.arange(max(0, end - k), end) if positions is None else positions
        return Question(
            {name: values[user] for name, values in self.profiles.items()},
            [self.names[i] for i in items[chosen]],
            [float(r) for r in ratings[chosen]],
            self.names[item],
            positions is not None,
        )


def _shown(column: pa.ChunkedArray, display: Display) -> list[str]:
    """Return a profile column's texts; its few different values are treated once."""
    coded = column.combine_chunks().dictionary_encode()
    values = [display(value) for value in coded.dictionary.to_pylist()]
    return [values[code] for code in coded.indices.to_pylist()]


def questions(
    catalogue: Catalogue, samples: Chosen, history: History, neighbours: Neighbours | None, k: int
) -> list[Question]:
    """Return each sample's question with its K most recent or K retrieved behaviours.

    Raises:
        InputError: retrieved behaviours are asked for without neighbours.
    """
    if history == "retrieved" and neighbours is None:
        raise InputError("retrieved behaviours need the neighbours of a retrieve stage")
    found = neighbours if history == "retrieved" else None
    return [
        catalogue.question(int(u), int(i), int(e), None if found is None else found.top(int(s), k), k)
        for s, u, i, e in zip(samples.sample_id, samples.user, samples.item, samples.end, strict=True)
    ]
