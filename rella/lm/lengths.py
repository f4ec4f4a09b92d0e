"""How many tokens an experiment's real prompts and item sentences have: counted on a sample, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rella.config import PromptConfig
from rella.data.questions import Question
from rella.lm.encoding import token_rows
from rella.lm.loading import load_tokenizer
from rella.lm.reading import Reader
from rella.models import TINY, ModelIdentity, identify
from rella.prompts import ChatWrapper, Display, item_text, shown_fields, wrapper_for
from rella.wording import Wording

Lengths = npt.NDArray[np.int64]

CHARACTERS = 3.0
"""Of one token, where the tokenizer is not to be had: few, as titles are rare words and numbers go digit by digit."""


@dataclass(frozen=True)
class Counter:
    """Counts tokens as one experiment's model reads them; by characters where its tokenizer is not to be had."""

    wording: Wording
    display: Display
    wrapper: ChatWrapper
    max_tokens: int
    reader: Reader | None

    @property
    def how(self) -> str:
        """Where the numbers come from."""
        if self.reader is not None:
            return "counted by the model's tokenizer"
        return f"estimated from {CHARACTERS:g} characters a token, as the model's tokenizer is not to be had here"

    def prompts(self, asked: Sequence[Question]) -> Lengths:
        """Return the tokens of each wrapped prompt, cut to the context: (questions,) int64."""
        if self.reader is not None:
            return np.array([len(ids) for ids in self.reader.encoder().encode(asked)], dtype=np.int64)
        return np.minimum(_by_characters([q.text(self.wording, self.wrapper) for q in asked]), self.max_tokens)

    def items(self, rows: Sequence[Mapping[str, object]], wrapped: bool) -> Lengths:
        """Return the tokens of each item's sentence: (rows,) int64."""
        texts = [item_text(self.wording, shown_fields(row, self.display)) for row in rows]
        texts = [self.wrapper.wrap(t) if wrapped else t for t in texts]
        if self.reader is None:
            return _by_characters(texts)
        return np.array([len(ids) for ids in token_rows(self.reader.tokenizer, texts)], dtype=np.int64)


def _by_characters(texts: Sequence[str]) -> Lengths:
    return np.array([1 + round(len(t) / CHARACTERS) for t in texts], dtype=np.int64)


def counter_for(model: ModelIdentity, config: PromptConfig, wording: Wording) -> Counter:
    """Return what counts for an experiment; its `prompt.max_tokens` must be resolved.

    Args:
        model: whose tokenizer counts, where it can be loaded.
        config: template and limits.
        wording: the data set's.
    """
    tokenizer: Any
    try:
        tokenizer = load_tokenizer(model)
    except Exception:  # whatever the hub's library raises when it cannot be reached
        stand_in = Reader(load_tokenizer(identify(str(TINY))), model, config, wording)
        wrapper = wrapper_for("vicuna" if config.wrapper == "native" else config.wrapper)
        return Counter(wording, stand_in.display, wrapper, int(config.max_tokens), None)
    reader = Reader(tokenizer, model, config, wording)
    return Counter(wording, reader.display, reader.wrapper, int(config.max_tokens), reader)
