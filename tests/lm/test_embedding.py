"""Item vectors against the mean over one text's hidden states."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch

from rella.errors import InputError
from rella.lm.embedding import embed_texts
from rella.lm.loading import load_base
from rella.lm.passes import TokenBudget
from rella.models import ModelIdentity
from rella.prompts import ML_1M, item_text

TEXTS = [
    item_text(ML_1M, {"title": title, "genre": genre})
    for title, genre in (
        ("Aliens (1986)", "Sci-Fi"),
        ("Se7en (1995)", "Crime"),
        ("Dr. Strangelove or: How I Learned to Stop Worrying and Love the Bomb (1963)", "War"),
        ("X", "Drama"),
        ("Aliens (1986)", "Action"),
    )
]


@pytest.fixture(scope="module")
def decoder(identity: ModelIdentity) -> Any:
    return load_base(identity, "float32", torch.device("cpu"), head=False)


def alone(decoder: Any, tokenizer: Any, text: str, first: int) -> np.ndarray:
    with torch.no_grad():
        states = decoder(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
    vector: np.ndarray = states[first:].double().mean(0).numpy()
    return vector


@pytest.mark.parametrize("pool_bos", [True, False])
@pytest.mark.parametrize("budget", [1, 90, 100_000])
def test_vectors_are_means_over_the_hidden_states(pool_bos: bool, budget: int, decoder: Any, tokenizer: Any) -> None:
    found = embed_texts(decoder, tokenizer, TEXTS, pool_bos, budget)
    assert found.dtype == np.float32
    assert found.shape == (len(TEXTS), decoder.config.hidden_size)
    right = np.stack([alone(decoder, tokenizer, text, 0 if pool_bos else 1) for text in TEXTS])
    np.testing.assert_allclose(found, right, atol=1e-5)


def test_the_first_token_makes_a_difference(decoder: Any, tokenizer: Any) -> None:
    with_bos, without = (embed_texts(decoder, tokenizer, TEXTS, pool) for pool in (True, False))
    assert np.abs(with_bos - without).max() > 1e-3


def test_rows_keep_the_texts_order(decoder: Any, tokenizer: Any) -> None:
    found = embed_texts(decoder, tokenizer, TEXTS)
    again = embed_texts(decoder, tokenizer, TEXTS[::-1])
    np.testing.assert_allclose(found, again[::-1], atol=1e-5)
    distances = np.linalg.norm(found[:, None] - found[None], axis=2) + np.eye(len(found)) * 99
    assert distances.min() > 1e-3


def test_the_states_are_those_after_the_final_norm(decoder: Any, shared_base: Any, tokenizer: Any) -> None:
    """The state that the LM head would see, so that its product is the causal model's logit."""
    text = TEXTS[3]
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        states = shared_base(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        logits = shared_base(input_ids=ids).logits[0]
    torch.testing.assert_close(shared_base.get_output_embeddings()(states), logits)
    np.testing.assert_allclose(embed_texts(decoder, tokenizer, [text])[0], states.mean(0).numpy(), atol=1e-5)


def test_half_precision_is_pooled_in_single(identity: ModelIdentity, tokenizer: Any, decoder: Any) -> None:
    half = load_base(identity, "bfloat16", torch.device("cpu"), head=False)
    found = embed_texts(half, tokenizer, TEXTS)
    assert found.dtype == np.float32
    states = half(input_ids=torch.tensor([tokenizer(TEXTS[2])["input_ids"]])).last_hidden_state[0]
    assert states.dtype == torch.bfloat16
    single = states.float().mean(0).detach().numpy()
    coarse = states.mean(0).float().detach().numpy()
    assert np.abs(single - coarse).max() > 1e-3
    alone_in_batch = embed_texts(half, tokenizer, [TEXTS[2]])[0]
    np.testing.assert_allclose(alone_in_batch, single, atol=1e-6)


def test_nothing_and_progress(decoder: Any, tokenizer: Any) -> None:
    assert embed_texts(decoder, tokenizer, []).shape == (0, decoder.config.hidden_size)
    counted: list[int] = []
    embed_texts(decoder, tokenizer, TEXTS, True, 90, counted.append)
    assert sum(counted) == len(TEXTS)
    assert len(counted) > 1


@pytest.mark.parametrize("window", [1, 2, 100])
def test_texts_tokenised_ahead_in_windows_keep_their_places(
    window: int, decoder: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rella.lm.embedding.WINDOW", window)
    right = np.stack([alone(decoder, tokenizer, text, 1) for text in TEXTS])
    np.testing.assert_allclose(embed_texts(decoder, tokenizer, TEXTS, pool_bos=False), right, atol=1e-5)


def test_a_card_that_is_too_small_gives_the_same_vectors_and_says_so(
    decoder: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, failures, forward = list[str](), list[int](), decoder.forward

    def short_of_memory(input_ids: torch.Tensor, **options: Any) -> Any:
        if input_ids.numel() > 100:
            failures.append(input_ids.numel())
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(input_ids=input_ids, **options)

    right = embed_texts(decoder, tokenizer, TEXTS)
    monkeypatch.setattr(decoder, "forward", short_of_memory)
    found = embed_texts(
        decoder, tokenizer, TEXTS, True, TokenBudget(2000, "embed", "--embed.batch-tokens", said.append)
    )
    np.testing.assert_allclose(found, right, atol=1e-5)
    assert len(said) == len(failures) > 0
    assert re.fullmatch(r"embed: out of memory in a pass of (\d+) tokens; going on with at most \d+ \(.*\)", said[0])


def test_a_text_that_does_not_fit_alone_is_an_error(
    decoder: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(input_ids: torch.Tensor, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(decoder, "forward", no_memory)
    longest = max(len(ids) for ids in tokenizer(TEXTS)["input_ids"])
    with pytest.raises(InputError, match=f"one row of {longest} tokens does not fit"):
        embed_texts(decoder, tokenizer, TEXTS, True, TokenBudget(2000, say=lambda line: None))


def test_a_begin_token_that_is_not_set_is_not_left_out(decoder: Any, falcon_tokenizer: Any) -> None:
    """As GPT-2's tokenizer has one and does without: its first token is a word of the text."""
    tokenizer = copy.deepcopy(falcon_tokenizer)
    tokenizer.pad_token = tokenizer.bos_token = tokenizer.eos_token
    assert max(max(ids) for ids in tokenizer(TEXTS)["input_ids"]) < decoder.config.vocab_size
    found = embed_texts(decoder, tokenizer, TEXTS, pool_bos=False)
    np.testing.assert_array_equal(found, embed_texts(decoder, tokenizer, TEXTS, pool_bos=True))
