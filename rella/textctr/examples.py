"""From samples to rows of token ids: what each baseline is trained on and scores. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rella.baselines import TextBaseline, TextBaselineConfig
from rella.config import History, PromptConfig
from rella.data.questions import Catalogue, Neighbours, questions
from rella.data.selection import Chosen
from rella.data.tables import Tables
from rella.errors import InputError
from rella.models import ModelIdentity
from rella.prompts import Display
from rella.textctr.texts import FieldTexts, PackedIds, PromptText, Text, TextEncoder
from rella.wording import Wording

Rows = npt.NDArray[np.int64]
"""(B,) numbers of examples."""


class Examples(Protocol):
    """N rows that a model can be trained on or score."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(N,) tokens of each row, by which batches are made."""

    @property
    def labels(self) -> npt.NDArray[np.float64]:
        """(N,) 1, 0, or NaN where the label is unknown."""


@dataclass(frozen=True)
class TextExamples:
    """Rows of one text each: PTab's and P5's."""

    texts: PackedIds
    """N texts."""
    labels: npt.NDArray[np.float64]
    """(N,) 1, 0, or NaN where the label is unknown."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(N,) tokens of each text."""
        return self.texts.lengths


@dataclass(frozen=True)
class PairExamples:
    """Rows of two texts each: N users' texts, and I items' texts that rows share."""

    users: PackedIds
    """N texts."""
    items: PackedIds
    """I texts, by row of the items table."""
    item: npt.NDArray[np.int64]
    """(N,) which item's text."""
    labels: npt.NDArray[np.float64]
    """(N,) 1, 0, or NaN where the label is unknown."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(N,) tokens of both texts."""
        return self.users.lengths + self.items.lengths[self.item]


_ROWS = 8192
"""Samples that are worded at a time."""


@dataclass
class Reader:
    """Turns samples into one baseline's examples; its encoder counts the texts that lost behaviours."""

    word: Callable[[Chosen], list[Text]]
    """Returns each sample's text: the user's for CTR-BERT, else the whole row's."""
    encoder: TextEncoder
    items: PackedIds | None = None
    """CTR-BERT: the ids of all I items' texts."""

    def examples(self, samples: Chosen) -> TextExamples | PairExamples:
        """Return N samples as examples, in their order.

        Raises:
            InputError: a text that is too long without any behaviour, or a sample without neighbours.
        """
        texts = PackedIds.joined([self.encoder.encode(self.word(part)) for part in _parts(samples)])
        if self.items is None:
            return TextExamples(texts, samples.label)
        return PairExamples(texts, self.items, samples.item.astype(np.int64), samples.label)


def _parts(samples: Chosen) -> Iterator[Chosen]:
    for start in range(0, len(samples), _ROWS):
        yield samples.rows(start, start + _ROWS)


def reader_for(
    baseline: TextBaseline,
    tables: Tables,
    fields: Mapping[str, str],
    wording: Wording,
    prompt: PromptConfig,
    model: ModelIdentity,
    tokenizer: Any,  # noqa: ANN401 - transformers is untyped here
    config: TextBaselineConfig,
    k: int,
    history: History = "recent",
    neighbours: Neighbours | None = None,
) -> Reader:
    """Return what turns samples of a data set into a baseline's examples; words all users and items once.

    Args:
        baseline: which one.
        tables: the prepared data set.
        fields: field's name → `users.<column>` or `items.<column>`, as in `RawDataset.fields`; P5 does without.
        wording: of the data set.
        prompt: how long a title may be, and whether escapes of the dump stay.
        model: the base model, for the limit of `max_item_tokens: auto`.
        tokenizer: its tokenizer.
        config: the limits on tokens.
        k: K of the paper, behaviours in a text.
        history: the K most recent behaviours, or the K retrieved ones (SUBR).
        neighbours: of all samples, for `retrieved`.

    Raises:
        InputError: a field without a column, an item's text that is too long, or no neighbours where they are needed.
    """
    if history == "retrieved" and neighbours is None:
        raise InputError("retrieved behaviours need the neighbours of a retrieve stage")
    display = display_for(tokenizer, prompt)
    encoder = TextEncoder(tokenizer, config.max_tokens)
    if baseline == "p5":
        catalogue = Catalogue.from_tables(tables.users, tables.items, tables.histories(), wording, display)
        return Reader(
            lambda part: [PromptText(q, wording) for q in questions(catalogue, part, history, neighbours, k)], encoder
        )
    texts = FieldTexts.from_tables(tables.users, tables.items, tables.histories(), fields, wording, display)
    found = neighbours if history == "retrieved" else None
    pair = baseline == "ctr-bert"

    def word(part: Chosen) -> list[Text]:
        return [
            texts.row_text(int(u), None if pair else int(i), int(e), None if found is None else found.top(int(s), k), k)
            for s, u, i, e in zip(part.sample_id, part.user, part.item, part.end, strict=True)
        ]

    return Reader(word, encoder, encode_items(texts, item_encoder(tokenizer, model, config)) if pair else None)


def display_for(tokenizer: Any, prompt: PromptConfig) -> Display:  # noqa: ANN401
    """Return what makes values fit to be shown to this tokenizer: its special tokens in a title are taken apart."""
    special = {token for token in tokenizer.all_special_tokens if len(token) > 1}
    special |= {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special and len(str(t)) > 1}
    return Display(prompt.title_chars, prompt.variant != "authors", tuple(sorted(special)))


def item_encoder(tokenizer: Any, model: ModelIdentity, config: TextBaselineConfig) -> TextEncoder:  # noqa: ANN401
    """Return what tokenises items' texts for CTR-BERT."""
    limit = config.max_item_tokens
    return TextEncoder(tokenizer, model.max_positions if limit == "auto" else limit, "max_item_tokens")


def encode_items(texts: FieldTexts, encoder: TextEncoder) -> PackedIds:
    """Return the ids of all I items' texts.

    Raises:
        InputError: a text is too long; names the longest.
    """
    return encoder.encode(texts.item_texts(range(len(texts.items))))
