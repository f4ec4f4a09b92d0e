"""CTR-BERT (Appendix C.2): a BERT for the user and a BERT for the item, and a small network on their first states."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from rella.baselines import TextBaselineConfig
from rella.errors import InputError
from rella.lm.encoding import token_batches
from rella.models import ModelIdentity
from rella.textctr.examples import PairExamples, Rows
from rella.textctr.model import ClickModel, Scorer, check_reach, load_pretrained, padded, with_zero

HEAD = 128
"""Width of the layer between the towers and the logit."""


class CtrBert(ClickModel[PairExamples]):
    """Linear(2H, 128), tanh, dropout and Linear(128, 1) on both towers' states at the first token (CLS).

    Args:
        user: encoder of transformers, hidden size H, without a pooler.
        item: another one; None for `user` itself (tied towers).
        pad: token id that pads.
        dropout: of the head.
        seed: of the head's first weights.
    """

    def __init__(self, user: nn.Module, item: nn.Module | None, pad: int, dropout: float, seed: int) -> None:
        super().__init__()
        self.user, self.item, self.pad = user, user if item is None else item, pad
        hidden = int(user.config.hidden_size)  # type: ignore[arg-type, union-attr]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = nn.Sequential(nn.Linear(2 * hidden, HEAD), nn.Tanh(), nn.Dropout(dropout), nn.Linear(HEAD, 1))
        self.head = head.to(next(user.parameters()).device)

    def click_logits(self, examples: PairExamples, rows: Rows) -> torch.Tensor:
        """Return (B,) logits."""
        return self.joined(self.user_states(examples, rows), self.item_states(examples, examples.item[rows]))

    def user_states(self, examples: PairExamples, rows: Rows) -> torch.Tensor:
        """Return the (B, H) states at CLS of some rows' users."""
        return self._first(self.user, [examples.users[int(row)] for row in rows])

    def item_states(self, examples: PairExamples, items: Rows) -> torch.Tensor:
        """Return the (B, H) states at CLS of some items."""
        return self._first(self.item, [examples.items[int(item)] for item in items])

    def joined(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        """Return the head's (B,) logits of (B, H) states."""
        logits: torch.Tensor = self.head(torch.cat([user, item], 1))[:, 0]
        return logits

    def scorer(self, batch_tokens: int) -> Scorer[PairExamples]:
        """Return a scorer that runs the item tower once for each item."""
        return ItemCache(self, batch_tokens)

    def _first(self, tower: Any, texts: list[npt.NDArray[np.int32]]) -> torch.Tensor:  # noqa: ANN401
        states: torch.Tensor = tower(**padded(texts, self.pad, self.device)).last_hidden_state[:, 0]
        return states


@dataclass
class ItemCache:
    """Scores with the item tower's states kept: most rows' items occur many times (59,047 on MovieLens-25M)."""

    model: CtrBert
    batch_tokens: int
    _place: dict[int, int] = field(default_factory=dict, init=False)
    """Item → its row of `_states`."""
    _states: torch.Tensor | None = field(default=None, init=False)
    """(items so far, H)."""

    def prepare(self, examples: PairExamples, rows: Rows) -> None:
        """Run the item tower on those items of some rows that it has not seen; `examples.items` is always the same."""
        items = [int(i) for i in np.unique(examples.item[rows]) if int(i) not in self._place]
        found = [] if self._states is None else [self._states]
        lengths = [len(examples.items[i]) for i in items]
        for batch in token_batches(lengths, self.batch_tokens):
            chosen = [items[n] for n in batch]
            found.append(self.model.item_states(examples, np.array(chosen)))
            self._place |= {item: len(self._place) + n for n, item in enumerate(chosen)}
        if found:
            self._states = torch.cat(found)

    def logits(self, examples: PairExamples, rows: Rows) -> torch.Tensor:
        """Return (B, 2) float32, yes first."""
        if self._states is None:
            raise ValueError("prepare comes first")
        place = torch.tensor([self._place[int(item)] for item in examples.item[rows]], device=self._states.device)
        return with_zero(self.model.joined(self.model.user_states(examples, rows), self._states[place]))


def load_ctr_bert(
    model: ModelIdentity,
    tokenizer: Any,  # noqa: ANN401
    config: TextBaselineConfig,
    seed: int,
    device: torch.device,
) -> CtrBert:
    """Return CTR-BERT with both towers from `model` and a new head.

    Raises:
        MissingError: the model cannot be loaded.
        InputError: it is no encoder with a first token that stands for the text, or reads fewer than `max_tokens`.
    """
    from transformers import AutoModel

    limit = config.max_item_tokens
    check_reach(model, max(config.max_tokens, 0 if limit == "auto" else limit))
    if tokenizer.cls_token_id is None or tokenizer("a")["input_ids"][0] != tokenizer.cls_token_id:
        raise InputError(f"model {model.name}: its tokenizer begins no text with a CLS token; take a BERT")

    def tower() -> Any:  # noqa: ANN401
        loaded = load_pretrained(AutoModel, model, config.dropout, seed, device, lambda name: "pooler" in name)
        if getattr(loaded, "pooler", None) is not None:
            # It would be a part without a gradient: the head reads the state itself.
            loaded.pooler = None
        return loaded

    return CtrBert(tower(), None if config.tie else tower(), tokenizer.pad_token_id, config.dropout, seed)
