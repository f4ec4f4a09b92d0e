"""Scores against the whole vocabulary's logits of one prompt at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from rella.data.questions import Question
from rella.lm.encoding import Ids, PromptEncoder
from rella.lm.passes import TokenBudget
from rella.lm.scoring import answer_logits, causal_lm, probabilities, question_logits
from rella.prompts import ML_1M, WRAPPERS

PAIR = (301, 17)


def random_prompts(lengths: list[int], vocabulary: int, seed: int = 0) -> list[Ids]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocabulary, n).astype(np.int32) for n in lengths]


LENGTHS = [1, 40, 7, 7, 120, 2, 63, 64, 65, 19]


@pytest.fixture(scope="module")
def prompts(shared_base: Any) -> list[Ids]:
    return random_prompts(LENGTHS, shared_base.config.vocab_size)


@pytest.fixture(scope="module")
def expected(shared_base: Any, prompts: list[Ids]) -> npt.NDArray[np.float32]:
    """One prompt, the whole vocabulary, the last position."""
    rows = []
    with torch.no_grad():
        for prompt in prompts:
            logits = shared_base(input_ids=torch.tensor(prompt[None].astype(np.int64))).logits[0, -1]
            rows.append([float(logits[PAIR[0]]), float(logits[PAIR[1]])])
    return np.array(rows, dtype=np.float32)


@pytest.mark.parametrize("budget", [1, 64, 130, 300, 100_000])
def test_logits_are_those_of_the_whole_vocabulary(
    budget: int, shared_base: Any, prompts: list[Ids], expected: npt.NDArray[np.float32]
) -> None:
    found = answer_logits(shared_base, prompts, PAIR, pad=2, batch_tokens=budget)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected[:, 0] - expected[:, 1]).min() > 1e-3, "Yes and No must differ for this to mean anything"
    assert len({round(float(v), 3) for v in expected[:, 0]}) == len(prompts)


def test_padding_is_seen_by_nobody(shared_base: Any, prompts: list[Ids]) -> None:
    first, second = (answer_logits(shared_base, prompts, PAIR, pad=pad) for pad in (2, 400))
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_the_pair_s_order(shared_base: Any, prompts: list[Ids]) -> None:
    one, other = answer_logits(shared_base, prompts, PAIR, 2), answer_logits(shared_base, prompts, PAIR[::-1], 2)
    np.testing.assert_array_equal(one, other[:, ::-1])


def test_progress_counts_every_prompt(shared_base: Any, prompts: list[Ids]) -> None:
    counted: list[int] = []
    answer_logits(shared_base, prompts, PAIR, 2, 130, counted.append)
    assert sum(counted) == len(prompts)
    assert len(counted) > 1
    assert answer_logits(shared_base, [], PAIR, 2).shape == (0, 2)


class WithBias(nn.Module):
    """A causal model whose LM head has a bias, as some backbones' do."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.base_model, self.config = lm.base_model, lm.config
        self.head = nn.Linear(lm.config.hidden_size, lm.config.vocab_size)
        with torch.no_grad():
            self.head.weight.copy_(lm.get_output_embeddings().weight)
            self.head.bias.copy_(torch.arange(lm.config.vocab_size).float())

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def test_a_head_s_bias_counts(shared_base: Any, prompts: list[Ids], expected: npt.NDArray[np.float32]) -> None:
    found = answer_logits(WithBias(shared_base), prompts, PAIR, 2)
    np.testing.assert_allclose(found, expected + np.array(PAIR, np.float32), rtol=1e-5)


def test_a_card_that_is_too_small_gives_the_same_logits_and_says_so(
    base: Any, prompts: list[Ids], expected: npt.NDArray[np.float32]
) -> None:
    said, decoder = list[str](), base.base_model
    forward = decoder.forward

    def short_of_memory(input_ids: torch.Tensor, **options: Any) -> Any:
        if input_ids.numel() > 150:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(input_ids=input_ids, **options)

    decoder.forward = short_of_memory
    budget = TokenBudget(1000, "score", "--score.batch-tokens", said.append)
    found = answer_logits(base, [*prompts, *prompts], PAIR, 2, budget)
    np.testing.assert_allclose(found, np.concatenate([expected, expected]), atol=1e-5)
    np.testing.assert_allclose(
        probabilities(found[: len(prompts)]), torch.tensor(expected).double().softmax(1)[:, 0].numpy(), atol=1e-5
    )
    assert said
    assert budget.tokens <= 150


@pytest.mark.parametrize(("window", "bucketing"), [(1, True), (3, True), (3, False), (100, True)])
def test_questions_worded_ahead_are_scored_as_their_prompts(
    window: int, bucketing: bool, shared_base: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rella.lm.scoring.WINDOW", window)
    profile = {"gender": "female", "age": "25-34", "occupation": "writer"}
    films = [f"Film {n} (19{n + 50})" for n in range(12)]
    asked = [Question(profile, films[:n], [float(i % 5 + 1) for i in range(n)], f"Film {n}") for n in (3, 0, 12, 7, 5)]
    made, again = (PromptEncoder(tokenizer, ML_1M, WRAPPERS["vicuna"], 400) for _ in range(2))
    prompts = again.encode(asked)
    found, tokens = question_logits(shared_base, made, asked, PAIR, 500, None, bucketing)
    np.testing.assert_allclose(found, answer_logits(shared_base, prompts, PAIR, 2), atol=1e-5)
    assert len(np.unique(found.round(4))) == found.size
    assert tokens == sum(len(p) for p in prompts)
    assert (made.truncated, made.dropped) == (again.truncated, again.dropped)


def test_an_adapter_is_used(base: Any, prompts: list[Ids], expected: npt.NDArray[np.float32]) -> None:
    from rella.config import TuneConfig
    from rella.lm.lora import add_lora

    tuned = add_lora(base, TuneConfig(lora_dropout=0.0), seed=0).eval()
    assert causal_lm(tuned) is base
    np.testing.assert_allclose(answer_logits(tuned, prompts, PAIR, 2), expected, atol=1e-5)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        logits = tuned(input_ids=torch.tensor(prompts[4][None].astype(np.int64))).logits[0, -1, list(PAIR)]
    found = answer_logits(tuned, prompts, PAIR, 2)
    assert np.abs(found - expected).max() > 0.01
    np.testing.assert_allclose(found[4], logits.numpy(), atol=1e-4)


def test_probabilities_are_the_softmax() -> None:
    logits = np.array([[0, 0], [1, 0], [0, 1], [-3.5, 2.25]], np.float32)
    found = probabilities(logits)
    assert found.dtype == np.float64
    right = [math.exp(y) / (math.exp(y) + math.exp(n)) for y, n in logits.astype(float)]
    np.testing.assert_allclose(found, right, rtol=1e-15)
    assert found[0] == 0.5
    assert found[1] + found[2] == pytest.approx(1.0, abs=1e-16)


def test_probabilities_of_extreme_logits() -> None:
    with np.errstate(all="raise", under="ignore"):
        found = probabilities(
            np.array([[3e38, -3e38], [-3e38, 3e38], [1e4, 0], [0, 1e4], [0, 40], [30, 0]], np.float32)
        )
    assert found[:4].tolist() == [1.0, 0.0, 1.0, 0.0]
    assert found[4] == pytest.approx(math.exp(-40), rel=1e-12), "small probabilities keep their digits"
    assert 1 - found[5] == pytest.approx(math.exp(-30), rel=1e-2)
    assert probabilities(np.zeros((0, 2), np.float32)).shape == (0,)
    assert probabilities(np.array([2.0, 1.0], np.float32)) == pytest.approx(1 / (1 + math.exp(-1)))
