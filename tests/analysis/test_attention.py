"""Attention of the target's title to the behaviours: against transformers' own, spans by decoding, planted cases."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rella.analysis.attention import BehaviourAttention, Places, largest_gain, locate, target_attention
from rella.config import PromptConfig, TuneConfig
from rella.data.questions import Question
from rella.errors import InputError
from rella.lm.lora import add_lora
from rella.lm.reading import Reader
from rella.models import ModelIdentity
from rella.prompts import ML_1M
from rella.wording import Wording
from tests.lm.conftest import byte_level, sentencepiece_like, small_config

PROFILE = {"gender": "female", "age": "25-34", "occupation": "writer"}
SEEN = ["Heat (1995)", "Aliens (1986)", "Schindler's List (1993)", "Aliens (1986)", 'The "Rock" (1996)', "Amélie 映画"]
QUESTION = Question(PROFILE, SEEN, [4.0, 1.0, 5.0, 3.0, 2.0, 4.0], "Aliens (1986)")
ROOM = {"max_position_embeddings": 2048}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", ROOM),
    "llama, grouped": ("llama", {"num_key_value_heads": 2, **ROOM}),
    "mistral, no window": ("mistral", {"sliding_window": None, **ROOM}),
    # Of the behaviours only the last ones are in sight, and the oldest of these in part.
    "mistral, a window": ("mistral", {"sliding_window": 90, **ROOM}),
    "mistral, short-sighted": ("mistral", {"sliding_window": 8, **ROOM}),
    "falcon": ("falcon", ROOM),
    "falcon, every head its key": ("falcon", {"multi_query": False, **ROOM}),
    "falcon, grouped": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, **ROOM}),
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    pieces, made = sentencepiece_like(), byte_level()
    return {"llama": pieces, "mistral": pieces, "falcon": made}


def reader_of(tokenizer: Any, identity: ModelIdentity, wording: Wording = ML_1M, **changes: Any) -> Reader:
    return Reader(tokenizer, identity, replace(PromptConfig(max_tokens=2000), **changes), wording)


def pair_of(family: str, changes: dict[str, Any], tokenizer: Any) -> tuple[Any, Any]:
    """One model twice: as scoring has it, and with transformers' own open attention."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    config = small_config(family, len(tokenizer), **changes)
    ours = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval().requires_grad_(False)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    theirs.load_state_dict(ours.state_dict())
    assert ours.config._attn_implementation == "sdpa"
    return ours, theirs


def expected(theirs: Any, places: Places) -> np.ndarray:
    with torch.no_grad():
        ids = torch.tensor(places.ids[None].astype(np.int64))
        last = theirs(input_ids=ids, output_attentions=True).attentions[-1][0]
    share = last.double().mean(0)[torch.from_numpy(places.target)].mean(0).numpy()
    return np.array([share[at].sum() for at in places.behaviours])


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_transformers_own_attention(
    case: str, tokenizers: dict[str, Any], identity: ModelIdentity
) -> None:
    family, changes = CASES[case]
    ours, theirs = pair_of(family, changes, tokenizers[family])
    reader = reader_of(tokenizers[family], identity)
    found = target_attention(ours, reader, QUESTION)
    wanted = expected(theirs, locate(reader, QUESTION))
    assert found.values.dtype == np.float64
    np.testing.assert_allclose(found.values, wanted, rtol=0, atol=2e-6)
    assert found.values.sum() + found.elsewhere == pytest.approx(1.0, abs=1e-12)
    if "short" in case:
        assert not found.values.any()
    elif "a window" in case:
        assert found.values[0] == 0
        assert found.values[-1] > 1e-3
    else:
        assert found.values.min() > 1e-3


@pytest.mark.parametrize("family", ["llama", "mistral", "falcon"])
def test_an_adapter_counts(family: str, tokenizers: dict[str, Any], identity: ModelIdentity) -> None:
    ours, theirs = pair_of(family, {"sliding_window": None, **ROOM}, tokenizers[family])
    reader = reader_of(tokenizers[family], identity)
    before = target_attention(ours, reader, QUESTION)
    tuned, other = (add_lora(m, TuneConfig(lora_rank=2), seed=0).eval() for m in (ours, theirs))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if ".lora_B." in name:
                p.copy_(torch.randn(p.shape, generator=generator))
    other.load_state_dict(tuned.state_dict())
    found = target_attention(tuned, reader, QUESTION)
    np.testing.assert_allclose(found.values, expected(other, locate(reader, QUESTION)), rtol=0, atol=5e-6)
    assert np.abs(found.values - before.values).max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "falcon"])
@pytest.mark.parametrize("wrapper", ["vicuna", "plain"])
def test_the_tokens_of_a_place_are_its_text(
    family: str, wrapper: str, tokenizers: dict[str, Any], identity: ModelIdentity
) -> None:
    tokenizer = tokenizers[family]
    reader = reader_of(tokenizer, identity, wrapper=wrapper)
    places = locate(reader, QUESTION)
    assert places.ids.tolist() == reader.encoder().encode([QUESTION])[0].tolist()
    ratings = ["4 stars", "1 star", "5 stars", "3 stars", "2 stars", "4 stars"]
    for n, (at, name, rating) in enumerate(zip(places.behaviours, SEEN, ratings, strict=True)):
        assert (np.diff(at) == 1).all()
        decoded = tokenizer.decode(places.ids[at])
        # A last token may hold the quotes behind it.
        assert decoded.strip().rstrip("',\"] ") == f"{name} ({rating})", n
    assert tokenizer.decode(places.ids[places.target]).strip(" *") == "Aliens (1986)"
    assert places.target.min() > places.behaviours[-1].max()


def test_a_title_seen_twice_is_two_behaviours(shared_base: Any, tokenizer: Any, identity: ModelIdentity) -> None:
    reader = reader_of(tokenizer, identity, max_tokens=1000)
    places = locate(reader, QUESTION)
    first, second = places.behaviours[1], places.behaviours[3]
    assert first.max() < places.behaviours[2].min()
    assert places.behaviours[2].max() < second.min()
    assert second.max() < places.target.min()
    found = target_attention(shared_base, reader, QUESTION)
    assert found.titles == tuple(SEEN)
    assert found.ratings[1:4] == ("1 star", "5 stars", "3 stars")
    assert found.values[1] != found.values[3]


def test_what_a_long_prompt_lost_is_not_shown(shared_base: Any, tokenizer: Any, identity: ModelIdentity) -> None:
    whole = len(locate(reader_of(tokenizer, identity), QUESTION).ids)
    reader = reader_of(tokenizer, identity, max_tokens=whole - 25)
    found, places = target_attention(shared_base, reader, QUESTION), locate(reader, QUESTION)
    assert places.dropped in (1, 2)
    assert found.titles == tuple(SEEN[places.dropped :])
    assert len(found.values) == len(found.ratings) == len(SEEN) - places.dropped
    shorter = replace(QUESTION, names=SEEN[places.dropped :], ratings=QUESTION.ratings[places.dropped :])
    np.testing.assert_array_equal(
        found.values, target_attention(shared_base, reader_of(tokenizer, identity), shorter).values
    )


def test_no_behaviours(shared_base: Any, tokenizer: Any, identity: ModelIdentity) -> None:
    found = target_attention(shared_base, reader_of(tokenizer, identity), Question(PROFILE, [], [], "Heat"))
    assert (found.values.shape, found.elsewhere) == ((0,), 1.0)


HOSTILE = ["1. Heat (5 stars)', '2. x", "['0. a (4 stars)']", "***", "\\", '"\'"', "\u202e", "x\ny", "a" * 70, "…"]
titles = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=20))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(titles, min_size=1, max_size=9), titles)
def test_places_of_any_titles(tokenizer: Any, identity: ModelIdentity, seen: list[str], target: str) -> None:
    reader = reader_of(tokenizer, identity)
    names, target = [reader.display(t) for t in seen], reader.display(target)
    question = Question(PROFILE, names, [float(1 + n % 5) for n in range(len(names))], target)
    places = locate(reader, question)
    together = np.concatenate([*places.behaviours, places.target])
    assert (np.diff(together) > 0).all()
    for n, (at, name) in enumerate(zip(places.behaviours, names, strict=True)):
        decoded = tokenizer.decode(places.ids[at])
        inner = repr(f"{name} ({1 + n % 5} star{'s' if n % 5 else ''})")[1:-1]
        # Quotes are escaped by what is beside them in the list: as there.
        assert decoded.replace("\\", "").find(inner.replace("\\", "")) in (0, 1), (decoded, inner)


class Mirror:
    """A model of one layer in which a token attends to what equals it."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=1024,
            # All angles but the first stand still.
            rope_parameters={"rope_type": "default", "rope_theta": 1e60},
        )
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(self.config).eval().requires_grad_(False)
        attention = self.model.model.layers[0].self_attn
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.copy_(torch.eye(64) * 1.5)
        self.model.model.embed_tokens.weight.normal_()


def test_the_target_finds_itself(tokenizer: Any, identity: ModelIdentity) -> None:
    """Planted: whichever behaviour the target equals gets most of the attention, wherever it stands."""
    model, reader = Mirror(tokenizer).model, reader_of(tokenizer, identity)
    names = ["Quxy Vim", "Joky Bep", "Hufa Zog", "Wick Lud"]
    for seen in (names, names[::-1]):
        for place, target in enumerate(seen):
            found = target_attention(model, reader, Question(PROFILE, seen, [3.0] * 4, target))
            assert int(found.values.argmax()) == place
            assert found.values[place] > 2 * np.delete(found.values, place).max()


def test_other_wordings(shared_base: Any, tokenizer: Any, identity: ModelIdentity) -> None:
    plain = Wording(behaviour="{name}", question="{name}? Would {name} do?", lead="", note="")
    reader, question = reader_of(tokenizer, identity, plain), Question({}, ["Heat", "Aliens"], [1.0, 2.0], "Big")
    found, places = target_attention(shared_base, reader, question), locate(reader, question)
    assert found.ratings == ("", "")
    assert [tokenizer.decode(places.ids[at]).strip(" ',]") for at in places.behaviours] == ["Heat", "Aliens"]
    assert tokenizer.decode(places.ids[places.target]).replace(" ", "") in ("Big?Big", "BigBig")
    silent = reader_of(tokenizer, identity, replace(plain, question="Would it do?"))
    with pytest.raises(InputError, match="does not name the target"):
        target_attention(shared_base, silent, question)


@pytest.mark.parametrize(
    ("model_type", "figures", "said"),
    [
        ("qwen2", {"intermediate_size": 64, "num_key_value_heads": 2}, "not for qwen2"),
        ("falcon", {"alibi": True}, "ALiBi"),
    ],
)
def test_other_architectures_are_refused(
    model_type: str, figures: dict[str, Any], said: str, tokenizer: Any, identity: ModelIdentity
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 900, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **figures))
    with pytest.raises(InputError, match=said):
        target_attention(model, reader_of(tokenizer, identity), QUESTION)


def test_a_tokenizer_without_offsets_is_refused(shared_base: Any, identity: ModelIdentity) -> None:
    with pytest.raises(InputError, match="slow one"):
        target_attention(shared_base, reader_of(SimpleNamespace(is_fast=False), identity), QUESTION)


def test_the_case_that_is_chosen() -> None:
    labels, base, ours = [1, 0, 1, 0, np.nan], [0.5, 0.75, 0.25, 0.5, 0.0], [0.75, 0.25, 0.75, 0.75, 1.0]
    # Gains 0.25, 0.5, 0.5, -0.25: of the two equal ones the first; the last row has no label.
    assert largest_gain(labels, base, ours) == 1
    assert largest_gain(labels[2:], base[2:], ours[2:]) == 0
    assert largest_gain([0, 1], [0.25, 0.5], [0.5, 0.375]) == 1
    with pytest.raises(InputError, match="differ in length"):
        largest_gain([1, 0], [0.5, 0.5], [0.5])
    with pytest.raises(InputError, match="has a label"):
        largest_gain([np.nan], [0.5], [0.5])


def test_the_rest_of_the_attention() -> None:
    assert BehaviourAttention("x", ("a",), ("",), np.array([0.25])).elsewhere == 0.75
