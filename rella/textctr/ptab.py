"""PTab (Appendix C.2): BERT is pre-trained further on the rows' texts by masked language modelling, then classifies.

Stage A's result is a folder like a hub model's. What it depends on is its rows' ids (`PackedIds.digest`), the model
(`ModelIdentity.digest`), the seed and the `mlm` fields of the configuration, so a caller can keep it under a key of
these and use it for any number of stages B. `rella.models.identify` names the folder for `load_ptab`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from rella.baselines import TextBaselineConfig
from rella.data.fewshot import mix64
from rella.errors import InputError
from rella.lm.encoding import pad_right
from rella.lm.loading import quiet_libraries
from rella.models import ModelIdentity
from rella.textctr.examples import Rows, TextExamples
from rella.textctr.model import ClickModel, TextModel, check_reach, load_pretrained, padded

MASKED, REPLACED = 0.8, 0.1
"""Of the predicted tokens: shares that become the mask and a random token; the rest stay."""


@dataclass(frozen=True)
class Masking:
    """Which tokens are predicted and what stands in their place: a function of (seed, epoch, row) alone."""

    probability: float
    mask: int
    """The mask's token id."""
    vocabulary: int
    """Random tokens are below it."""
    special: npt.NDArray[np.int64]
    """Token ids that are never predicted: begin, end, padding and the like."""
    seed: int

    def __call__(
        self, ids: npt.NDArray[np.int64], rows: Rows, epoch: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return what the model reads, (B, L), and which tokens it predicts, (B, L) bool.

        Args:
            ids: (B, L) padded token ids.
            rows: (B,) numbers of the rows in the training set; a row's masks do not depend on the others beside it.
            epoch: 0 is the first.
        """
        chosen = (self._uniform(rows, ids.shape[1], epoch, 0) < self.probability) & ~np.isin(ids, self.special)
        kind = self._uniform(rows, ids.shape[1], epoch, 1)
        words = (self._uniform(rows, ids.shape[1], epoch, 2) * self.vocabulary).astype(np.int64)
        shown = np.where(chosen & (kind < MASKED), self.mask, ids)
        return np.where(chosen & (kind >= MASKED) & (kind < MASKED + REPLACED), words, shown), chosen

    def _uniform(self, rows: Rows, length: int, epoch: int, use: int) -> npt.NDArray[np.float64]:
        """Return (B, length) numbers in [0, 1), each a hash of seed, epoch, use, row and position."""
        state = np.zeros(1, dtype=np.uint64)
        for value in (self.seed, epoch, use):
            state = mix64(state ^ np.uint64(value % 2**64))
        cells = mix64(rows.astype(np.uint64) ^ state)[:, None] ^ np.arange(length, dtype=np.uint64)
        return np.ldexp((mix64(mix64(cells)) >> np.uint64(11)).astype(np.float64), -53)


class MaskedLm(TextModel[TextExamples]):
    """Stage A: a masked LM whose head is applied at predicted tokens only.

    Args:
        model: of transformers' `AutoModelForMaskedLM`.
        pad: token id that pads.
        masking: what is predicted.
    """

    def __init__(self, model: nn.Module, pad: int, masking: Masking) -> None:
        super().__init__()
        self.model, self.pad, self.masking = model, pad, masking

    def loss(self, examples: TextExamples, rows: Rows, epoch: int) -> tuple[torch.Tensor, float]:
        """Return the summed cross-entropy of the predicted tokens and their number."""
        whole, lengths = pad_right([examples.texts[int(row)] for row in rows], self.pad, torch.device("cpu"))
        shown, chosen = self.masking(whole.numpy(), rows, epoch)
        # Also of a padding token that is not among the special ones.
        chosen &= np.arange(whole.shape[1]) < lengths.numpy()[:, None]
        at = torch.from_numpy(chosen)
        seen = torch.from_numpy(shown).to(self.device)
        mask = (torch.arange(whole.shape[1]) < lengths[:, None]).long().to(self.device)
        logits = self.logits_at(seen, mask, at.to(self.device))
        summed = nn.functional.cross_entropy(logits.float(), whole[at].to(self.device), reduction="sum")
        return summed, float(chosen.sum())

    def logits_at(self, ids: torch.Tensor, mask: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Return the vocabulary's logits at T positions, (T, V): a (B, L, V) tensor exists for no BERT.

        Args:
            ids: (B, L) int64.
            mask: (B, L) int64, 0 at padding.
            at: (B, L) bool, T of them true.
        """
        model: Any = self.model
        head = getattr(model, "cls", None) or getattr(model, "lm_head", None)
        if head is None:
            whole: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
            return whole[at]
        states = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        logits: torch.Tensor = head(states[at])
        return logits

    def save(self, tokenizer: Any, folder: Path) -> None:  # noqa: ANN401
        """Write stage A's result, weights as safetensors with configuration and tokenizer: `load_ptab` takes it."""
        with quiet_libraries():
            self.model.save_pretrained(folder)  # type: ignore[operator]
            tokenizer.save_pretrained(folder)


class PTab(ClickModel[TextExamples]):
    """Stage B: sequence classification with one output.

    Args:
        model: of transformers' `AutoModelForSequenceClassification`, one label.
        pad: token id that pads.
    """

    def __init__(self, model: nn.Module, pad: int) -> None:
        super().__init__()
        self.model, self.pad = model, pad

    def click_logits(self, examples: TextExamples, rows: Rows) -> torch.Tensor:
        """Return (B,) logits."""
        texts = [examples.texts[int(row)] for row in rows]
        logits: torch.Tensor = self.model(**padded(texts, self.pad, self.device)).logits[:, 0]
        return logits


def load_masked_lm(
    model: ModelIdentity,
    tokenizer: Any,  # noqa: ANN401
    config: TextBaselineConfig,
    seed: int,
    device: torch.device,
) -> MaskedLm:
    """Return stage A's model, all of whose weights are pretrained.

    Raises:
        MissingError: the model cannot be loaded.
        InputError: it is no masked LM, or reads fewer than `max_tokens`.
    """
    from transformers import AutoModelForMaskedLM

    check_reach(model, config.max_tokens)
    if tokenizer.mask_token_id is None:
        raise InputError(f"model {model.name}: its tokenizer has no mask token; take a BERT")
    loaded = load_pretrained(AutoModelForMaskedLM, model, config.dropout, seed, device)
    special = np.array(sorted(set(tokenizer.all_special_ids)), dtype=np.int64)
    size = min(len(tokenizer), int(loaded.config.vocab_size))
    masking = Masking(config.mlm_probability, tokenizer.mask_token_id, size, special, seed)
    return MaskedLm(loaded, tokenizer.pad_token_id, masking)


def load_ptab(
    model: ModelIdentity,
    tokenizer: Any,  # noqa: ANN401
    config: TextBaselineConfig,
    seed: int,
    device: torch.device,
) -> PTab:
    """Return stage B's model from stage A's folder (or any encoder); only pooler and classifier are new.

    Raises:
        MissingError: the model cannot be loaded.
        InputError: it is no encoder, or reads fewer than `max_tokens`.
    """
    from transformers import AutoModelForSequenceClassification

    def new(name: str) -> bool:
        return "pooler" in name or name.split(".")[0] in {"classifier", "pre_classifier"}

    check_reach(model, config.max_tokens)
    kind = AutoModelForSequenceClassification
    return PTab(load_pretrained(kind, model, config.dropout, seed, device, new, num_labels=1), tokenizer.pad_token_id)
