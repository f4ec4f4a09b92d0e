"""Questions to token ids, within the model's context; batches of similar length within a token budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rella.data.questions import Question
from rella.errors import InputError
from rella.prompts import ChatWrapper
from rella.wording import Wording

Ids = npt.NDArray[np.int32]


@dataclass
class PromptEncoder:
    """Words questions and tokenises them; what does not fit loses its oldest behaviours and is counted."""

    tokenizer: Any
    wording: Wording
    wrapper: ChatWrapper
    max_tokens: int
    truncated: int = field(default=0, init=False)
    """Prompts that lost behaviours so far."""
    dropped: int = field(default=0, init=False)
    """Behaviours lost so far."""

    def encode(self, questions: Sequence[Question]) -> list[Ids]:
        """Return each wrapped prompt's token ids, int32, at most `max_tokens`.

        Raises:
            InputError: a prompt that is too long without any behaviour; names the target.
        """
        encoded = token_rows(self.tokenizer, [q.text(self.wording, self.wrapper) for q in questions])
        return [
            self._fit(q, ids) if len(ids) > self.max_tokens else ids for q, ids in zip(questions, encoded, strict=True)
        ]

    def _fit(self, question: Question, whole: Ids) -> Ids:
        """Find the fewest behaviours to drop, by bisection: length falls with every one of them."""
        low, high, best = 1, len(question.names), whole
        while low <= high:
            skip = (low + high) // 2
            text = question.text(self.wording, self.wrapper, skip)
            ids = np.asarray(self.tokenizer(text)["input_ids"], dtype=np.int32)
            if len(ids) <= self.max_tokens:
                best, high = ids, skip - 1
            else:
                low = skip + 1
        if len(best) > self.max_tokens:
            raise InputError(
                f"the prompt for {question.target[:60]!r} has over {self.max_tokens} tokens even without behaviours: "
                "lower --prompt.title-chars or choose a model with a longer context"
            )
        self.truncated += 1
        self.dropped += low
        return best


def token_rows(tokenizer: Any, texts: Sequence[str]) -> list[Ids]:  # noqa: ANN401 - transformers is untyped here
    """Return the texts' token ids as the tokenizer wraps them, int32."""
    found = tokenizer(list(texts), return_attention_mask=False)["input_ids"] if texts else []
    return [np.asarray(ids, dtype=np.int32) for ids in found]


def token_batches(lengths: Sequence[int], budget: int, bucketing: bool = True) -> Iterator[list[int]]:
    """Yield row numbers in batches of at most `budget` tokens, padding included, longest rows first.

    The longest batch comes first, so that a card that is too small says so at once. A row longer than the budget is a
    batch of its own. Without `bucketing` the rows come in their own order.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)) if bucketing else range(len(lengths))
    batch: list[int] = []
    longest = 0
    for row in order:
        if batch and max(longest, lengths[row]) * (len(batch) + 1) > budget:
            yield batch
            batch, longest = [], 0
        batch.append(row)
        longest = max(longest, lengths[row])
    if batch:
        yield batch


def pad_right(rows: Sequence[Ids], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (B, L) int64 ids padded on the right and (B,) int64 lengths.

    Causal attention never looks right, so no real token sees padding and no attention mask is needed: the fastest
    kernels take over. The copy to a card does not wait for what the card is doing.
    """
    lengths = [len(r) for r in rows]
    ids = np.full((len(rows), max(lengths)), pad, dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    tensors = torch.from_numpy(ids), torch.tensor(lengths)
    if device.type == "cuda":
        # From pageable memory the host would wait for the card.
        tensors = tensors[0].pin_memory(), tensors[1].pin_memory()
    return tensors[0].to(device, non_blocking=True), tensors[1].to(device, non_blocking=True)
