"""Pointwise scoring (§2.3): the logits of "Yes" and "No" at the answer's position, and their softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rella.data.questions import Question
from rella.lm.encoding import Ids, PromptEncoder
from rella.lm.norms import fused_norms
from rella.lm.passes import TokenBudget, ahead, budget_of, run_passes, windows
from rella.lm.sharing import whole

WINDOW = 512
"""Questions that are worded and tokenised at a time."""


def answer_logits(
    model: Any,  # noqa: ANN401 - transformers is untyped here
    prompts: Sequence[Ids],
    pair: tuple[int, int],
    pad: int,
    batch_tokens: int | TokenBudget = 16384,
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
        batch_tokens: token budget of a forward pass, padding included; a `TokenBudget` keeps what it learns of the
            memory.
        on_done: called with the number of prompts of each batch.
        bucketing: batches of similar length, the longest first; else as they come.

    Raises:
        InputError: a single prompt does not fit into the device's memory.
    """
    lm = causal_lm(model)
    device = lm.get_output_embeddings().weight.device
    with fused_norms(lm):
        found = run_passes(
            prompts, _answers(lm, pair), device, pad, budget_of(batch_tokens), on_done, bucketing=bucketing
        )
    return found.reshape(len(prompts), 2)


def question_logits(
    model: Any,  # noqa: ANN401
    encoder: PromptEncoder,
    asked: Sequence[Question],
    pair: tuple[int, int],
    batch_tokens: int | TokenBudget = 16384,
    on_done: Callable[[int], None] | None = None,
    bucketing: bool = True,
) -> tuple[npt.NDArray[np.float32], int]:
    """Return `answer_logits` of questions, and their number of tokens; they are worded and tokenised ahead in a thread.

    Args:
        model: a causal LM, with or without an adapter attached in place.
        encoder: words and tokenises; counts what it truncates.
        asked: the questions.
        pair: vocabulary indices a ("Yes") and b ("No").
        batch_tokens: as in `answer_logits`.
        on_done: called with the number of prompts of each batch.
        bucketing: as in `answer_logits`.

    Raises:
        InputError: a prompt that is too long without any behaviour, or does not fit into the device's memory.
    """
    budget, pad = budget_of(batch_tokens), encoder.tokenizer.pad_token_id
    out, tokens = np.empty((len(asked), 2), dtype=np.float32), 0
    cut = windows([sum(map(len, q.names)) for q in asked], WINDOW, bucketing)
    for window, prompts in ahead((w, encoder.encode([asked[i] for i in w])) for w in cut):
        out[window] = answer_logits(model, prompts, pair, pad, budget, on_done, bucketing)
        tokens += sum(len(p) for p in prompts)
    return out, tokens


def _answers(lm: Any, pair: tuple[int, int]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:  # noqa: ANN401
    """Return a function of (B, L) ids and (B,) lengths: (B, 2) float32 logits at the last tokens."""
    head = lm.get_output_embeddings()
    with whole(head.parameters()):
        weight = head.weight.detach()[list(pair)].float()
        bias = None if getattr(head, "bias", None) is None else head.bias.detach()[list(pair)].float()

    def forward(ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        states = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
        last = states[torch.arange(len(ids), device=ids.device), lengths - 1].float()
        return finished(lm, torch.nn.functional.linear(last, weight, bias))

    return forward


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
