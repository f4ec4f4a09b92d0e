"""Pointwise scoring (§2.3): the logits of "Yes" and "No" at the answer's position, and their softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rella.lm.encoding import Ids, pad_right, token_batches


def answer_logits(
    model: Any,  # noqa: ANN401 - transformers is untyped here
    prompts: Sequence[Ids],
    pair: tuple[int, int],
    pad: int,
    batch_tokens: int = 16384,
    on_done: Callable[[int], None] | None = None,
    bucketing: bool = True,
) -> npt.NDArray[np.float32]:
    """Return s_{i,a} and s_{i,b} of Eq. 2 for every prompt: (prompts, 2) float32, Yes first.

    Only two rows of the LM head are multiplied, and only at each prompt's last token.

    Args:
        model: a causal LM, with or without an adapter attached in place.
        prompts: token ids of wrapped prompts, without the answer.
        pair: vocabulary indices a ("Yes") and b ("No").
        pad: any token id; padding is on the right and seen by no real token.
        batch_tokens: token budget of a forward pass, padding included.
        on_done: called with the number of prompts of each batch.
        bucketing: batches of similar length, the longest first; else as they come.
    """
    lm = causal_lm(model)
    head = lm.get_output_embeddings()
    device = head.weight.device
    weight = head.weight[list(pair)].float()
    bias = None if getattr(head, "bias", None) is None else head.bias[list(pair)].float()
    out = np.empty((len(prompts), 2), dtype=np.float32)
    with torch.inference_mode():
        for batch in token_batches([len(p) for p in prompts], batch_tokens, bucketing):
            ids, lengths = pad_right([prompts[i] for i in batch], pad, device)
            states = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
            last = states[torch.arange(len(batch), device=device), lengths - 1].float()
            out[batch] = finished(lm, torch.nn.functional.linear(last, weight, bias)).cpu().numpy()
            if on_done is not None:
                on_done(len(batch))
    return out


def causal_lm(model: Any) -> Any:  # noqa: ANN401
    """Return the transformers model below an adapter, whose layers act in place; `.base_model` of it is the decoder."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def finished(lm: Any, logits: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    """Return the head's products (any shape) as the model's logits: Gemma 2 squeezes them into (−cap, cap)."""
    cap = getattr(lm.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def probabilities(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return ŷ of Eq. 2, the softmax over (…, 2) logits [Yes, No], as float64 in [0, 1]."""
    gap = logits[..., 1].astype(np.float64) - logits[..., 0].astype(np.float64)
    # exp of a non-positive number on either side: no overflow.
    small = np.exp(-np.abs(gap))
    return np.where(gap <= 0, 1.0 / (1.0 + small), small / (1.0 + small))
