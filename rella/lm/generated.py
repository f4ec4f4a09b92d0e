"""The item vectors that the authors' code makes: the state of one generated token (an option to §3.2's mean)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rella.lm.encoding import pad_right, token_batches
from rella.lm.scoring import causal_lm


def embed_generated(
    model: Any,  # noqa: ANN401 - transformers is untyped here
    tokenizer: Any,  # noqa: ANN401
    texts: Sequence[str],
    batch_tokens: int = 16384,
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
    """
    lm = causal_lm(model)
    device = lm.get_output_embeddings().weight.device
    rows = [np.asarray(ids, dtype=np.int32) for ids in tokenizer(list(texts))["input_ids"]] if texts else []
    out = np.zeros((len(rows), lm.config.hidden_size), dtype=np.float32)
    with torch.inference_mode():
        for batch in token_batches([len(r) + 1 for r in rows], batch_tokens):
            read = [rows[i] for i in batch]
            chosen = lm.get_output_embeddings()(_last_states(lm, read, tokenizer.pad_token_id, device)).argmax(-1)
            longer = [np.append(r, np.int32(t)) for r, t in zip(read, chosen.tolist(), strict=True)]
            out[batch] = _last_states(lm, longer, tokenizer.pad_token_id, device).float().cpu().numpy()
            if on_done is not None:
                on_done(len(batch))
    return out


def _last_states(lm: Any, rows: Sequence[npt.NDArray[np.int32]], pad: int, device: torch.device) -> torch.Tensor:  # noqa: ANN401
    ids, lengths = pad_right(rows, pad, device)
    states = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return states[torch.arange(len(rows), device=device), lengths - 1]
