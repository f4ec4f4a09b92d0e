"""Validation beside training: all rows whatever the passes, and a card that is too small halves them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from rella.errors import InputError
from rella.lm.passes import TokenBudget
from rella.lm.scoring import probabilities
from rella.lm.validation import Validation
from rella.metrics import evaluate

RNG = np.random.default_rng(4)
PROMPTS = [RNG.integers(1, 50, n).astype(np.int32) for n in RNG.integers(3, 40, 60)]
LABEL = RNG.integers(0, 2, 60).astype(np.int8)
PAIR = (7, 11)


@pytest.fixture(autouse=True)
def _group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Head(nn.Module):
    """Logits from the sum of a prompt's embeddings up to a position; has memory for `room` tokens a pass."""

    def __init__(self, room: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 12)
        self.room, self.graphs = room, 0

    def forward(self, ids: torch.Tensor, row: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        if ids.numel() > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        summed = self.embedding(ids).cumsum(1)[row, position]
        self.graphs += int(summed.requires_grad)
        assert not summed.is_inference(), "weights that are trained on must not meet inference tensors"
        return summed


def expected() -> dict[str, float]:
    head = Head(10**9)
    logits = torch.stack([head.embedding(torch.from_numpy(p).long()).sum(0)[list(PAIR)] for p in PROMPTS])
    found = evaluate(LABEL, probabilities(logits.detach().numpy()))
    return {"auc": found.auc, "log_loss": found.log_loss, "accuracy": found.accuracy}


@pytest.mark.parametrize("tokens", [30, 200, 10_000])
def test_whatever_the_passes_all_rows_count(tokens: int) -> None:
    head = Head(10**9)
    assert Validation(PROMPTS, LABEL, PAIR, 0, tokens)(head) == pytest.approx(expected())
    assert head.graphs == 0


def test_out_of_memory_halves_says_so_and_goes_on() -> None:
    said: list[str] = []
    budget = TokenBudget(2000, "validation", "--score.batch-tokens", said.append)
    validate = Validation(PROMPTS, LABEL, PAIR, 0, budget)
    assert validate(Head(400)) == pytest.approx(expected())
    assert budget.tokens <= 400
    assert said
    assert said[0].startswith("validation: out of memory in a pass of")
    assert "--score.batch-tokens" in said[0]
    # What was learnt is kept for the next time.
    said.clear()
    validate(Head(400))
    assert not said


def test_a_row_that_does_not_fit_is_named() -> None:
    with pytest.raises(InputError, match=r"validation: one row of 39 tokens does not fit"):
        Validation(PROMPTS, LABEL, PAIR, 0, TokenBudget(100, "validation", say=lambda _: None))(Head(30))
