"""The item vectors that the authors' code makes: the state of one generated token (an option to §3.2's mean)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rella.lm.encoding import token_rows
from rella.lm.norms import fused_norms
from rella.lm.passes import TokenBudget, budget_of, run_passes
from rella.lm.scoring import causal_lm


def embed_generated(
    model: Any,  # noqa: ANN401 - transformers is untyped here
    tokenizer: Any,  # noqa: ANN401
    texts: Sequence[str],
    batch_tokens: int | TokenBudget = 16384,
    on_done: Callable[[int], None] | None = None,
) -> npt.NDArray[np.float32]:
    """Return (texts, D) float32: the last hidden state of the likeliest next token, itself read by the model.

    A hook on the LM head that each step of `generate` overwrites is left with the state of the last token that was fed,
    which is the first one generated; the mean over it is itself.

    Args:
        model: a causal LM, with its head.
        tokenizer: its tokenizer.
        texts: item sentences.
        batch_tokens: token budget of a forward pass, padding included.
        on_done: called with the number of texts of each batch.

    Raises:
        InputError: a single text does not fit into the device's memory.
    """
    lm = causal_lm(model)
    head = lm.get_output_embeddings()
    device, pad = head.weight.device, tokenizer.pad_token_id

    def forward(ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        row = torch.arange(len(ids), device=device)
        last = lengths - 2
        chosen = head(_states(lm, ids[:, :-1])[row, last]).argmax(-1)
        longer = ids.clone()
        longer[row, last + 1] = chosen
        return _states(lm, longer)[row, last + 1]

    # A place for the generated token.
    rows = [np.append(r, np.int32(pad)) for r in token_rows(tokenizer, texts)]
    with fused_norms(lm):
        found = run_passes(rows, forward, device, pad, budget_of(batch_tokens), on_done)
    return found.reshape(len(rows), lm.config.hidden_size)


def _states(lm: Any, ids: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    states: torch.Tensor = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return states
