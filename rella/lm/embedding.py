"""Item sentences to vectors: the mean over a sentence's tokens of the LLM's last hidden states (§3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rella.lm.encoding import Ids, token_rows
from rella.lm.norms import fused_norms
from rella.lm.passes import TokenBudget, ahead, budget_of, run_passes, windows

WINDOW = 4096
"""Texts that are tokenised at a time."""


def embed_texts(
    base: Any,  # noqa: ANN401 - transformers is untyped here
    tokenizer: Any,  # noqa: ANN401
    texts: Sequence[str],
    pool_bos: bool = True,
    batch_tokens: int | TokenBudget = 16384,
    on_done: Callable[[int], None] | None = None,
) -> npt.NDArray[np.float32]:
    """Return u_t of §3.2 for every text: (texts, D) float32, pooled in float32 whatever the model's precision.

    Args:
        base: a model without LM head; its last hidden state is taken after the final norm.
        tokenizer: its tokenizer.
        texts: item sentences.
        pool_bos: whether the begin token counts in the mean, where the tokenizer sets one.
        batch_tokens: token budget of a forward pass, padding included; a `TokenBudget` keeps what it learns of the
            memory.
        on_done: called with the number of texts of each batch.

    Raises:
        InputError: a single text does not fit into the device's memory.
    """
    device = next(base.parameters()).device
    budget, bos = budget_of(batch_tokens), tokenizer.bos_token_id
    out = np.empty((len(texts), base.config.hidden_size), dtype=np.float32)

    def tokenised(window: list[int]) -> tuple[list[int], list[Ids]]:
        return window, token_rows(tokenizer, [texts[i] for i in window])

    cut = windows([len(t) for t in texts], WINDOW)
    with fused_norms(base):
        for window, rows in ahead(tokenised(w) for w in cut):
            # Some tokenizers have a begin token and set none (GPT-2's): their first token is a word of the text.
            begins = bos is not None and rows[0][0] == bos
            pooled = mean_pooled(base, int(begins and not pool_bos))
            out[window] = run_passes(rows, pooled, device, tokenizer.pad_token_id, budget, on_done)
    return out


def mean_pooled(base: Any, first: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:  # noqa: ANN401
    """Return a function of (B, L) ids and (B,) lengths: (B, D) float32 means of the states from token `first` on."""

    def forward(ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        states = base(input_ids=ids, use_cache=False).last_hidden_state
        place = torch.arange(ids.shape[1], device=ids.device)
        real = ((place >= first) & (place < lengths[:, None])).float()
        # As a product of matrices: the states are read once, and no masked copy of them is made.
        summed = torch.bmm(real[:, None], states.float())[:, 0]
        return summed / real.sum(1, keepdim=True)

    return forward
