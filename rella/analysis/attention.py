"""Case study (§4.6, Figure 8): the attention that the target's title pays to each behaviour at the last layer.

The decoder runs as it does when it scores. Only what enters the last layer's attention is kept, and from it the
probabilities of a few rows are computed openly: the title's, never (L, L) of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rella.data.questions import Question
from rella.errors import InputError
from rella.lm.encoding import Ids
from rella.lm.lean import rotate
from rella.lm.reading import Reader
from rella.lm.scoring import causal_lm
from rella.prompts import behaviour_list, inline, profile_words, prompt_text, rating_text
from rella.wording import Wording, fill, pieces, placeholders

Positions = npt.NDArray[np.int64]
Span = tuple[int, int]
"""Characters of a prompt: the first one and the one behind the last."""


@dataclass(frozen=True)
class Places:
    """Where a prompt's tokens show its behaviours and its target."""

    ids: Ids
    """(L,) int32, the wrapped prompt as it is scored."""
    behaviours: tuple[Positions, ...]
    """Positions of each shown behaviour's tokens, oldest first."""
    target: Positions
    """Positions of the title's tokens in the question."""
    dropped: int
    """Oldest behaviours that the prompt has lost for its length."""


@dataclass(frozen=True)
class BehaviourAttention:
    """One sample of Figure 8 under one model."""

    target: str
    titles: tuple[str, ...]
    """What the n shown behaviours are called, oldest first."""
    ratings: tuple[str, ...]
    """(n) their ratings as shown, e.g. "4 stars"; empty where the prompt shows none."""
    values: npt.NDArray[np.float64]
    """(n,) share of the attention, in [0, 1]: the mean over heads and the title's tokens of the sum over the
    behaviour's tokens."""

    @property
    def elsewhere(self) -> float:
        """The rest of the attention: first token, words between, the question itself."""
        return 1.0 - float(self.values.sum())


def target_attention(model: Any, reader: Reader, question: Question) -> BehaviourAttention:  # noqa: ANN401
    """Return how the attention of the target's title is spread over the behaviours at the last layer (Figure 8).

    Args:
        model: a causal LM in evaluation mode, of `load_base`, with or without an adapter attached in place.
        reader: its tokenizer under the experiment's options; `prompt.max_tokens` must be resolved.
        question: one sample, as it is scored.

    Raises:
        InputError: an architecture other than Llama's, Mistral's or Falcon's; a prompt that is too long without any
            behaviour; a tokenizer that does not know its tokens' characters; a wording that does not name the target.
    """
    attention = _last_attention(causal_lm(model))
    places = locate(reader, question)
    share = _shares(causal_lm(model), attention, places)
    wording, shown = reader.wording, slice(places.dropped, None)
    rated = "rating" in placeholders(wording.behaviour)
    ratings = [rating_text(wording, rating) if rated else "" for rating in question.ratings[shown]]
    values = np.array([share[at].sum() for at in places.behaviours], dtype=np.float64)
    return BehaviourAttention(question.target, tuple(question.names[shown]), tuple(ratings), values)


def largest_gain(labels: npt.ArrayLike, base: npt.ArrayLike, ours: npt.ArrayLike) -> int:
    """Return the row that the case study shows: where ours gives the true label most more than the base does.

    Args:
        labels: (S,) 0, 1, or NaN where it is unknown; such rows are passed over.
        base: (S,) probabilities of label 1 by the base model.
        ours: (S,) the same by ReLLa; of equal gains the first row counts.

    Raises:
        InputError: different lengths, or no row with a label.
    """
    truth, before, after = (np.asarray(x, dtype=np.float64) for x in (labels, base, ours))
    if truth.shape != before.shape or truth.shape != after.shape:
        raise InputError(f"labels and probabilities differ in length: {len(truth)}, {len(before)}, {len(after)}")
    if np.isnan(truth).all():
        raise InputError("none of the scored samples has a label: a case is chosen by its label")
    gain = np.where(truth > 0.5, after - before, before - after)
    return int(np.argmax(np.where(np.isnan(truth), -np.inf, gain)))


def locate(reader: Reader, question: Question) -> Places:
    """Return a question's prompt as it is scored, and where its behaviours and its target are.

    A behaviour is its title and rating, without the number and the quotes around. A token belongs to what it shares a
    character with.

    Args:
        reader: as in `target_attention`.
        question: as there.

    Raises:
        InputError: as there, but for the architecture.
    """
    if not reader.tokenizer.is_fast:
        raise InputError(f"the tokenizer of {reader.model.name} is a slow one: it cannot tell which characters it read")
    encoder = reader.encoder()
    encoder.encode([question])
    dropped = encoder.dropped
    text = question.text(reader.wording, reader.wrapper, dropped)
    found = reader.tokenizer(text, return_offsets_mapping=True)
    offsets = np.asarray(found["offset_mapping"], dtype=np.int64)
    behaviours, target = _spans(reader.wording, question, dropped, len(reader.wrapper.before))
    return Places(
        np.asarray(found["input_ids"], dtype=np.int32),
        tuple(_within(offsets, [span]) for span in behaviours),
        _within(offsets, target),
        dropped,
    )


def _spans(wording: Wording, question: Question, dropped: int, before: int) -> tuple[list[Span], list[Span]]:
    """Return the characters of each shown behaviour, and those of the target, behind `before` others."""
    names, ratings = question.names[dropped:], question.ratings[dropped:]
    listed = behaviour_list(wording, names, ratings)
    asked, target = _question(wording, question)
    prompt = prompt_text(wording, question.profile, names, ratings, question.target, question.retrieved)
    # Both lines whole, one after the other: a title that looks like a list is no line of its own.
    start = before + f"\n{prompt}".index(f"\n{listed}\n{asked}")
    behind = start + len(listed) + 1
    entries, at = list[Span](), start + 1
    for n in range(len(names)):
        # The list up to here, without its bracket, ends with this entry's quote.
        end = start + len(behaviour_list(wording, names[: n + 1], ratings[: n + 1])) - 1
        entries.append((at + len(f"'{n}. "), end - 1))
        at = end + len(", ")
    return entries, [(behind + first, behind + stop) for first, stop in target]


def _question(wording: Wording, question: Question) -> tuple[str, list[Span]]:
    """Return the line that asks, and where in it the target is named."""
    words = {**profile_words(wording, question.profile), "name": inline(question.target)}
    spans, at = list[Span](), 0
    for literal, name in pieces(wording.question):
        at += len(literal)
        value = "" if name is None else words[name]
        if name == "name":
            spans.append((at, at + len(value)))
        at += len(value)
    if not spans:
        raise InputError(
            "wording.question does not name the target ({name}): there is no title whose attention to show"
        )
    return fill(wording.question, words), spans


def _within(offsets: Positions, spans: Sequence[Span]) -> Positions:
    """Return which tokens, of (L, 2) offsets, share a character with a span; special tokens have none."""
    first, behind = offsets[:, 0], offsets[:, 1]
    found = np.zeros(len(offsets), dtype=bool)
    for start, stop in spans:
        found |= (first < stop) & (behind > start) & (first < behind)
    return np.flatnonzero(found)


def _last_attention(lm: Any) -> Any:  # noqa: ANN401 - transformers is untyped here
    kind = lm.config.model_type
    if kind in ("llama", "mistral"):
        return lm.base_model.layers[-1].self_attn
    if kind != "falcon":
        raise InputError(f"attention to behaviours is known for llama, mistral and falcon models, not for {kind}")
    if lm.config.alibi:
        raise InputError("attention to behaviours is known for falcon models with rotary positions, not with ALiBi")
    return lm.base_model.h[-1].self_attention


@torch.inference_mode()
def _shares(lm: Any, attention: Any, places: Places) -> npt.NDArray[np.float64]:  # noqa: ANN401
    """Return (L,) the mean of the target rows' probabilities at this attention; they add up to 1."""
    device = lm.get_input_embeddings().weight.device
    ids = torch.from_numpy(places.ids.astype(np.int64))[None].to(device)
    states, (cos, sin) = _entering(lm, attention, ids)
    queries, keys = _queries_and_keys(lm.config.model_type, attention, states)
    queries, keys = (rotate(x, cos.unsqueeze(2), sin.unsqueeze(2))[0] for x in (queries, keys))
    rows = torch.from_numpy(places.target).to(device)
    window = lm.config.sliding_window if lm.config.model_type == "mistral" else None
    found: npt.NDArray[np.float64] = _probabilities(queries[rows], keys, rows, window).mean(dim=(0, 1, 2)).cpu().numpy()
    return found


def _entering(
    lm: Any,  # noqa: ANN401
    attention: Any,  # noqa: ANN401
    ids: torch.Tensor,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Run the decoder on (1, L) ids; return the (1, L, width) states that enter the attention, and its angles."""
    seen: list[Any] = []

    def keep(_module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:  # noqa: ANN401
        seen.append((args[0] if args else named["hidden_states"], named["position_embeddings"]))

    hook = attention.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        lm.base_model(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
    states, angles = seen[0]
    return states, angles


def _queries_and_keys(
    kind: str,
    attention: Any,  # noqa: ANN401
    states: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (1, L, heads, size) queries and (1, L, groups, size) keys, before their rotation."""
    front, size = states.shape[:-1], attention.head_dim
    if kind != "falcon":
        return attention.q_proj(states).view(*front, -1, size), attention.k_proj(states).view(*front, -1, size)
    # A group's query heads, then its key, then its value.
    fused = attention.query_key_value(states).view(*front, attention.num_kv_heads, -1, size)
    return fused[..., :-2, :].flatten(2, 3), fused[..., -2, :]


def _probabilities(queries: torch.Tensor, keys: torch.Tensor, rows: torch.Tensor, window: int | None) -> torch.Tensor:
    """Return (T, groups, heads of a group, L) float64 attention of T positions to all; a row adds up to 1.

    Args:
        queries: (T, heads, size).
        keys: (L, groups, size).
        rows: (T,) the queries' positions.
        window: a query sees itself and the `window` − 1 positions before it; None for all.
    """
    groups, size = keys.shape[1:]
    grouped = queries.double().unflatten(1, (groups, -1))
    products = torch.einsum("tgns,lgs->tgnl", grouped, keys.double()) * size**-0.5
    back = rows[:, None] - torch.arange(len(keys), device=rows.device)
    unseen = back < 0 if window is None else (back < 0) | (back >= window)
    return products.masked_fill(unseen[:, None, None], -torch.inf).softmax(dim=-1)
