"""P5 (Appendix C.2): T5 reads the LLM's prompt and is trained to write "yes" or "no"; its structure is unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rella.baselines import TextBaselineConfig
from rella.errors import InputError
from rella.models import ModelIdentity
from rella.textctr.examples import Rows, TextExamples
from rella.textctr.model import ScoringModel, load_pretrained, padded
from rella.textctr.texts import ANSWERS

_IGNORED = -100
"""Stands in targets where there is no token."""


@dataclass(frozen=True)
class Targets:
    """The answers as tokens, each with the end token; their first tokens differ."""

    no: tuple[int, ...]
    yes: tuple[int, ...]

    @property
    def pair(self) -> tuple[int, int]:
        """The first tokens of yes and no, whose logits are compared (as in Eq. 2)."""
        return self.yes[0], self.no[0]

    def of(self, label: float) -> tuple[int, ...]:
        """Return the tokens for label 1 or 0."""
        return self.yes if label else self.no


def targets_for(tokenizer: Any) -> Targets:  # noqa: ANN401
    """Return "no" and "yes" as this tokenizer writes them, with the end token.

    Raises:
        InputError: it has no end token, or both begin with the same token, so that one step could not tell them apart.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise InputError("this tokenizer has no end token, which ends P5's answers: take a T5")
    found = []
    for word in ANSWERS:
        ids: list[int] = tokenizer(word, add_special_tokens=False)["input_ids"]
        found.append((*ids, end))
    no, yes = found
    if no[0] == yes[0]:
        raise InputError(f"this tokenizer begins both answers with token {yes[0]} ({yes}, {no}): take a T5")
    return Targets(no, yes)


class P5(ScoringModel[TextExamples]):
    """T5 with its LM head.

    Args:
        model: `T5ForConditionalGeneration`.
        targets: the answers.
        pad: token id that pads.

    Raises:
        InputError: the model's configuration names no token that decoding starts from.
    """

    def __init__(self, model: nn.Module, targets: Targets, pad: int) -> None:
        super().__init__()
        self.model, self.targets, self.pad = model, targets, pad
        start = model.config.decoder_start_token_id  # type: ignore[union-attr]
        if start is None:
            raise InputError("this model's configuration has no decoder_start_token_id: take a T5")
        self.start = int(start)  # type: ignore[arg-type]

    def loss(self, examples: TextExamples, rows: Rows, epoch: int) -> tuple[torch.Tensor, float]:
        """Return the sum over rows of the mean cross-entropy of a row's target tokens, and the number of rows."""
        del epoch
        answers = [self.targets.of(float(examples.labels[row])) for row in rows]
        longest = max(map(len, answers))
        wanted = torch.tensor([[*a, *[_IGNORED] * (longest - len(a))] for a in answers], device=self.device)
        read = torch.tensor([[self.start, *a, *[self.pad] * (longest - len(a))][:-1] for a in answers])
        logits = self._decoded(examples, rows, read.to(self.device))
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=_IGNORED, reduction="none")
        return (losses.sum(1) / (wanted != _IGNORED).sum(1)).sum(), float(len(rows))

    def logits(self, examples: TextExamples, rows: Rows) -> torch.Tensor:
        """Return (B, 2) float32, the logits of the first tokens of yes and no after one step of the decoder."""
        read = torch.full((len(rows), 1), self.start, device=self.device)
        return self._decoded(examples, rows, read)[:, 0, list(self.targets.pair)]

    def _decoded(self, examples: TextExamples, rows: Rows, read: torch.Tensor) -> torch.Tensor:
        """Return the vocabulary's logits (B, T, V) float32 behind the decoder's input `read` (B, T)."""
        inputs = padded([examples.texts[int(row)] for row in rows], self.pad, self.device)
        logits: torch.Tensor = self.model(**inputs, decoder_input_ids=read, use_cache=False).logits.float()
        return logits


def load_p5(
    model: ModelIdentity,
    tokenizer: Any,  # noqa: ANN401
    config: TextBaselineConfig,
    seed: int,
    device: torch.device,
) -> P5:
    """Return P5, all of whose weights are pretrained. T5's positions are relative: `max_tokens` is one of memory.

    Raises:
        MissingError: the model cannot be loaded.
        InputError: it is no T5; or float16, in which T5's activations overflow.
    """
    from transformers import T5ForConditionalGeneration

    if model.model_type != "t5":
        raise InputError(f"P5 is built on T5, but {model.name} is {model.model_type!r}: give t5-base or another T5")
    if config.precision == "float16":
        raise InputError("T5's activations overflow in float16: set precision to bfloat16, or float32 on older cards")
    loaded = load_pretrained(T5ForConditionalGeneration, model, config.dropout, seed, device)
    return P5(loaded, targets_for(tokenizer), tokenizer.pad_token_id)
