"""Rows with a signal that a small model can learn, and the fits that several test files run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rella.baselines import TextBaselineConfig
from rella.lm.checkpoints import TrainingState
from rella.lm.tuning import Progress
from rella.textctr.ctr_bert import CtrBert
from rella.textctr.examples import Examples, PairExamples, TextExamples
from rella.textctr.fit import FitResult, TextFitter
from rella.textctr.model import TextModel
from rella.textctr.predict import Validation
from rella.textctr.texts import FieldText, PackedIds, TextEncoder

COLOURS = ("red", "green", "blue", "black")


def quiet(progress: Progress) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Planted:
    """Who likes red clicks on anything, and everybody clicks on blue things; texts differ in length."""

    users: list[str]
    items: list[str]
    item: np.ndarray[Any, np.dtype[np.int64]]
    labels: np.ndarray[Any, np.dtype[np.float64]]

    @staticmethod
    def rows(n: int, seed: int) -> Planted:
        rng = np.random.default_rng(seed)
        likes, item = rng.integers(0, 4, n), rng.integers(0, 4, n)
        users = [f"the user likes {COLOURS[c]}.{' Action' * int(rng.integers(0, 9))}" for c in likes]
        items = [f"the item is {colour}." for colour in COLOURS]
        return Planted(users, items, item, ((likes == 0) | (item == 2)).astype(np.float64))

    def pairs(self, tokenizer: Any) -> PairExamples:
        encoder = TextEncoder(tokenizer, 128)
        users, items = ([FieldText("", (), text) for text in texts] for texts in (self.users, self.items))
        return PairExamples(encoder.encode(users), encoder.encode(items), self.item, self.labels)

    def texts(self, tokenizer: Any) -> TextExamples:
        whole = [FieldText(user, (), self.items[i]) for user, i in zip(self.users, self.item, strict=True)]
        return TextExamples(TextEncoder(tokenizer, 128).encode(whole), self.labels)


def sequences(n: int, seed: int) -> PackedIds:
    """Texts in which a token follows from the one before it, for stage A."""
    rng = np.random.default_rng(seed)
    starts, lengths = rng.integers(10, 20, n), rng.integers(8, 20, n)
    return PackedIds.of(
        [[2, *((start + np.arange(size)) % 10 + 10).tolist(), 3] for start, size in zip(starts, lengths, strict=True)]
    )


def fitted(
    model: TextModel[Any],
    examples: Examples,
    config: TextBaselineConfig,
    valid: Examples | None = None,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    save: Callable[[TrainingState], None] | None = None,
    start: TrainingState | None = None,
    report: Callable[[Progress], None] = quiet,
) -> FitResult:
    validate = None
    if valid is not None:
        validate = Validation(model, valid, config.batch_tokens, config.precision, rank, world)  # type: ignore[arg-type]
    return TextFitter(model, examples, config, seed, report, validate, save, start, rank, world).run()


def small_ctr_bert(dropout: float = 0.0, vocabulary: int = 300) -> CtrBert:
    """Two towers from a configuration, the same weights at every call."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    towers = [BertModel(config, add_pooling_layer=False) for _ in range(2)]
    return CtrBert(*towers, pad=0, dropout=dropout, seed=0)


def numbered(n: int, seed: int) -> PairExamples:
    """Rows of random tokens; the label follows from the first one."""
    rng = np.random.default_rng(seed)
    users = [[2, *rng.integers(5, 90, rng.integers(1, 30)).tolist()] for _ in range(n)]
    items = [[2, *rng.integers(5, 90, size).tolist()] for size in (3, 7, 5)]
    labels = np.array([float(row[1] > 45) for row in users])
    return PairExamples(PackedIds.of(users), PackedIds.of(items), rng.integers(0, 3, n), labels)
