"""What the LM-based baselines read (§4.1.3, Appendix C.2): a sample's fields and history as text, and as token ids.

CTR-BERT and PTab read all fields of Table 1 as sentences, `{field} is {value}.`, with the history among them, oldest
first: `History is Heat (1995) (4 stars), Alien (1979) (1 star).` CTR-BERT reads the user's part and the item's part
apart, PTab both as one text. P5 reads the prompt that the LLM reads. Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rella.data.questions import Question
from rella.data.selection import SubsetRule, split_ids, split_subset
from rella.data.tables import Histories
from rella.errors import InputError
from rella.prompts import ChatWrapper, Display, names_of, rating_text, shown_fields
from rella.wording import Wording, fill

HISTORY = "History"
"""What the sequence of behaviours is called among the fields."""

ANSWERS = ("no", "yes")
"""P5's targets, by label."""

_BARE = ChatWrapper("bare", "", "", "")
_ROWS = 8192
"""Texts that the tokenizer gets at a time."""


class Text(Protocol):
    """A text that can be had without its oldest behaviours."""

    @property
    def behaviours(self) -> Sequence[str]:
        """What it tells of the history, oldest first."""

    @property
    def subject(self) -> str:
        """What it is about, for messages."""

    def text(self, skip: int = 0) -> str:
        """Return it without the `skip` oldest behaviours."""


@dataclass(frozen=True)
class FieldText:
    """Sentences about a user, the history, and sentences about a target; any of them may be empty."""

    user: str
    behaviours: Sequence[str]
    """`title (r stars)` each, oldest first."""
    item: str = ""
    """Empty in CTR-BERT's text of a user."""

    @property
    def subject(self) -> str:
        """The target's sentences, else the user's."""
        return self.item or self.user

    def text(self, skip: int = 0) -> str:
        """Return the sentences on one line, without the `skip` oldest behaviours."""
        shown = self.behaviours[skip:]
        history = f"{HISTORY} is {', '.join(shown)}." if shown else ""
        return " ".join(part for part in (self.user, history, self.item) if part)


@dataclass(frozen=True)
class PromptText:
    """P5's input: the LLM's prompt without a conversation around it."""

    question: Question
    wording: Wording

    @property
    def behaviours(self) -> Sequence[str]:
        """What the behaviours' items are called, oldest first."""
        return self.question.names

    @property
    def subject(self) -> str:
        """What the target is called."""
        return self.question.target

    def text(self, skip: int = 0) -> str:
        """Return the prompt (Figures 9 and 10) without the `skip` oldest behaviours.

        Raises:
            InputError: a profile value for which the wording has no words.
        """
        return self.question.text(self.wording, _BARE, skip)


@dataclass(frozen=True)
class FieldTexts:
    """The sentences of every user and item of a data set, and what texts of samples are made of."""

    users: Sequence[str]
    """By user: `User ID is 1. Gender is female.`; empty without user fields."""
    items: Sequence[str]
    """By item: `Movie ID is 3. Movie title is Heat (1995).`"""
    names: Sequence[str]
    """By item: what it is called in a history."""
    histories: Histories
    wording: Wording
    """Says how a behaviour and its rating are written; without `{rating}` where there are none."""

    @staticmethod
    def from_tables(
        users: pa.Table,
        items: pa.Table,
        histories: Histories,
        fields: Mapping[str, str],
        wording: Wording,
        display: Display,
    ) -> FieldTexts:
        """Word all users and items, each value made fit to be shown.

        Args:
            users: the users table, (U rows).
            items: the items table, (I rows).
            histories: the behaviours.
            fields: field's name → `users.<column>` or `items.<column>`, as in `RawDataset.fields`.
            wording: of the data set.
            display: how values are made fit; its `special` should hold the tokenizer's special tokens.

        Raises:
            InputError: a field's column is in neither table.
        """
        parts = {"users": users, "items": items}
        worded: dict[str, list[list[str]]] = {name: [] for name in parts}
        for name, place in fields.items():
            table, _, column = place.partition(".")
            if table not in parts or column not in parts[table].schema.names:
                raise InputError(
                    f"field {name!r}: there is no column {place!r}; name one as users.COLUMN, items.COLUMN"
                )
            values = parts[table].column(column).to_pylist()
            worded[table].append([f"{name} is {text}." for text in _shown(values, display)])
        columns = {n: items.column(n).to_pylist() for n in items.schema.names if n != "item"}
        return FieldTexts(
            _joined(worded["users"], len(users)),
            _joined(worded["items"], len(items)),
            names_of(wording, columns, display),
            histories,
            wording,
        )

    def row_text(
        self, user: int, item: int | None, end: int, positions: npt.NDArray[np.integer] | None, k: int
    ) -> FieldText:
        """Return a sample's text: the user's fields, the history and the target's fields.

        Args:
            user: row of the users table.
            item: the target, row of the items table; None for CTR-BERT's text of the user alone.
            end: behaviours that the sample may see.
            positions: ascending indices below `end`; None for the `k` most recent ones.
            k: K.
        """
        target = "" if item is None else self.items[item]
        return FieldText(self.users[user], self._behaviours(user, end, positions, k), target)

    def item_texts(self, items: Iterable[int]) -> list[FieldText]:
        """Return CTR-BERT's texts of items (rows of the items table)."""
        return [FieldText("", (), self.items[item]) for item in items]

    def _behaviours(self, user: int, end: int, positions: npt.NDArray[np.integer] | None, k: int) -> list[str]:
        items, ratings = self.histories.of(user, end)
        chosen = np.arange(max(0, end - k), end) if positions is None else positions
        return [
            fill(self.wording.behaviour, {"name": self.names[item], "rating": rating_text(self.wording, float(rating))})
            for item, rating in zip(items[chosen], ratings[chosen], strict=True)
        ]


def _shown(values: Sequence[object], display: Display) -> list[str]:
    """Return values made fit to be shown; those that occur often are treated once."""
    known: dict[object, str] = {}
    found = []
    for value in values:
        key = tuple(value) if isinstance(value, list) else value
        if key not in known:
            known[key] = shown_fields({"": value}, display)[""]
        found.append(known[key])
    return found


def _joined(columns: Sequence[Sequence[str]], rows: int) -> list[str]:
    return [" ".join(row) for row in zip(*columns, strict=True)] if columns else [""] * rows


@dataclass(frozen=True)
class PackedIds:
    """Token ids of many texts, one behind the other: millions of texts without an object for each."""

    tokens: npt.NDArray[np.uint16] | npt.NDArray[np.int32]
    """(offset[-1],) of 16 bits where the ids fit."""
    offset: npt.NDArray[np.int64]
    """(N + 1,) text n's ids are `[offset[n], offset[n + 1])`."""

    @staticmethod
    def of(rows: Sequence[Sequence[int]]) -> PackedIds:
        """Return the ids of N texts."""
        offset = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offset[1:])
        tokens = np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=int(offset[-1]))
        return PackedIds(_narrow(tokens), offset)

    @staticmethod
    def joined(parts: Sequence[PackedIds]) -> PackedIds:
        """Return the texts of several as one, in order."""
        lengths = np.concatenate([np.zeros(1, np.int64), *(p.lengths for p in parts)])
        # 16 bits stay 16 bits: the whole may be gigabytes.
        return PackedIds(np.concatenate([np.zeros(0, np.uint16), *(p.tokens for p in parts)]), np.cumsum(lengths))

    def __len__(self) -> int:
        return len(self.offset) - 1

    def __getitem__(self, row: int) -> npt.NDArray[np.int32]:
        """Return the int32 ids of one text."""
        return self.tokens[self.offset[row] : self.offset[row + 1]].astype(np.int32)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(N,) tokens of each text."""
        return np.diff(self.offset)

    def digest(self) -> str:
        """Return the SHA-256 of all ids and of where texts begin, as 64 hex digits: what a cache may be keyed by."""
        found = hashlib.sha256(self.offset.astype("<i8").tobytes())
        found.update(self.tokens.astype("<i4").tobytes())
        return found.hexdigest()


def _narrow(tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.uint16] | npt.NDArray[np.int32]:
    return tokens.astype(np.uint16) if not len(tokens) or int(tokens.max()) < 2**16 else tokens


@dataclass
class TextEncoder:
    """Tokenises texts; what does not fit loses its oldest behaviours and is counted, and nothing else is ever cut."""

    tokenizer: Any
    max_tokens: int
    """Special tokens included."""
    option: str = "max_tokens"
    """The setting that limits the tokens, for messages."""
    truncated: int = field(default=0, init=False)
    """Texts that lost behaviours so far."""
    dropped: int = field(default=0, init=False)
    """Behaviours lost so far."""

    def encode(self, texts: Sequence[Text]) -> PackedIds:
        """Return each text's ids, at most `max_tokens`, with the special tokens that the tokenizer adds.

        Raises:
            InputError: texts that are too long without any behaviour; names the longest and what it needs.
        """
        rows: list[Sequence[int]] = []
        for start in range(0, len(texts), _ROWS):
            part = texts[start : start + _ROWS]
            rows += [
                ids if len(ids) <= self.max_tokens else self._fit(text)
                for text, ids in zip(part, self._ids([text.text() for text in part]), strict=True)
            ]
        longest = max(range(len(rows)), key=lambda n: len(rows[n]), default=0)
        if rows and len(rows[longest]) > self.max_tokens:
            raise InputError(
                f"the text of {texts[longest].subject[:60]!r} has {len(rows[longest])} tokens even without behaviours, "
                f"over {self.option} = {self.max_tokens}: raise {self.option} as far as the model reads, or lower "
                "--prompt.title-chars"
            )
        return PackedIds.of(rows)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(list(texts), verbose=False)["input_ids"]
        return found

    def _fit(self, text: Text) -> list[int]:
        """Find the fewest behaviours to drop, by bisection: length falls with every one of them."""
        low, high = 1, len(text.behaviours)
        best = self._ids([text.text(high)])[0]
        if len(best) > self.max_tokens:
            return best
        while low < high:
            skip = (low + high) // 2
            ids = self._ids([text.text(skip)])[0]
            if len(ids) <= self.max_tokens:
                best, high = ids, skip
            else:
                low = skip + 1
        self.truncated += 1
        self.dropped += high
        return best


@dataclass(frozen=True)
class TrainingRows:
    """The samples that a baseline is trained on."""

    ids: npt.NDArray[np.int64]
    """Sample ids, ascending."""
    of: int
    """Samples of the training split."""

    @property
    def caption(self) -> str:
        """What a table says of them: `all 776,007 training rows`, or `8,192 of 776,007 training rows`."""
        n = len(self.ids)
        return f"all {n:,} training rows" if n == self.of else f"{n:,} of {self.of:,} training rows"


def training_rows(samples: pa.Table, at_most: int | Literal["all"], rule: SubsetRule) -> TrainingRows:
    """Return the training samples, at most so many: the LLM's few-shot set of that size, so sets of more hold it.

    Raises:
        InputError: `at_most` is below 1, or more than the authors draw where `rule` repeats their draws.
    """
    of = len(split_ids(samples, "train"))
    n: int | Literal["all"] = "all" if at_most == "all" or at_most >= of else at_most
    return TrainingRows(split_subset(samples, "train", n, rule), of)
