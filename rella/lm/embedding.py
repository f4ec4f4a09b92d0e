"""Item sentences to vectors: the mean over a sentence's tokens of the LLM's last hidden states (§3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rella.lm.encoding import pad_right, token_batches


def embed_texts(
    base: Any,  # noqa: ANN401 - transformers is untyped here
    tokenizer: Any,  # noqa: ANN401
    texts: Sequence[str],
    pool_bos: bool = True,
    batch_tokens: int = 16384,
    on_done: Callable[[int], None] | None = None,
) -> npt.NDArray[np.float32]:
    """Return u_t of §3.2 for every text: (texts, D) float32, pooled in float32 whatever the model's precision.

    Args:
        base: a model without LM head; its last hidden state is taken after the final norm.
        tokenizer: its tokenizer.
        texts: item sentences.
        pool_bos: whether the begin token counts in the mean, where the tokenizer sets one.
        batch_tokens: token budget of a forward pass, padding included.
        on_done: called with the number of texts of each batch.
    """
    device = next(base.parameters()).device
    rows = [np.asarray(ids, dtype=np.int32) for ids in tokenizer(list(texts))["input_ids"]] if texts else []
    out = np.zeros((len(rows), base.config.hidden_size), dtype=np.float32)
    # Some tokenizers have a begin token and set none (GPT-2's): their first token is a word of the text.
    begins = tokenizer.bos_token_id is not None and bool(rows) and rows[0][0] == tokenizer.bos_token_id
    first = int(begins and not pool_bos)
    with torch.inference_mode():
        for batch in token_batches([len(r) for r in rows], batch_tokens):
            ids, lengths = pad_right([rows[i] for i in batch], tokenizer.pad_token_id, device)
            states = base(input_ids=ids, use_cache=False).last_hidden_state.float()
            place = torch.arange(ids.shape[1], device=device)
            real = ((place >= first) & (place < lengths[:, None])).float()
            mean = (states * real[..., None]).sum(1) / real.sum(1, keepdim=True)
            out[batch] = mean.cpu().numpy()
            if on_done is not None:
                on_done(len(batch))
    return out
