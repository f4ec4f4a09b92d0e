"""Small models of the paper's three architectures, and tokenizers of the two kinds that they have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rella.backbones import BACKBONES
from rella.prompts import WRAPPERS, answer_text

FAMILIES = ("llama", "mistral", "falcon")


def corpus() -> list[str]:
    """Prompts of every conversation format here, with both answers."""
    questions = [f"Her age is {age}. Will she like the movie Aliens ({age}86)? Tell me yes or no." for age in range(9)]
    formats = [(w.before, w.after, w.separator) for w in WRAPPERS.values()]
    formats += [b.native for b in BACKBONES.values() if b.native is not None]
    return [
        f"{before}{question}{after}{separator}{answer_text(label)}"
        for before, after, separator in formats
        for question in questions
        for label in (0, 1)
    ]


def sentencepiece_like() -> Any:
    """Llama's and Mistral's kind: a begin token, a blank before the first word, bytes for what it does not know."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaTokenizer

    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    # These vocabularies have no piece over two words, none of letters with punctuation, and no line breaks.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Punctuation()]
    )
    lines = [line for text in corpus() for line in text.split("\n")]
    bpe.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=700, special_tokens=special))
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in trained["merges"]]
    return LlamaTokenizer(vocab=trained["vocab"], merges=merges, add_bos_token=True, model_max_length=512)


def byte_level() -> Any:
    """Falcon's kind: GPT-2's bytes, no begin token, nothing in front, one special token that ends and pads."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation(behavior="contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated"),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", model_max_length=512)


def small_config(family: str, vocabulary: int, **changes: Any) -> Any:
    """The architecture at hidden size 32; weights of large spread, so that mistakes show."""
    from transformers import AutoConfig

    common = {"vocab_size": vocabulary, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    own: dict[str, dict[str, Any]] = {
        "llama": {"intermediate_size": 64, "max_position_embeddings": 512},
        # A window that is shorter than the prompts.
        "mistral": {
            "intermediate_size": 64,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "sliding_window": 8,
        },
        "falcon": {"multi_query": True, "new_decoder_architecture": False, "parallel_attn": True, "bias": False},
    }
    return AutoConfig.for_model(family, **common | {"initializer_range": 0.2} | own[family] | changes)


@pytest.fixture(scope="session")
def llama_tokenizer() -> Any:
    return sentencepiece_like()


@pytest.fixture(scope="session")
def falcon_tokenizer() -> Any:
    return byte_level()


@pytest.fixture(scope="session")
def families(llama_tokenizer: Any, falcon_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Architecture → folder as a hub model's."""
    import torch
    from transformers import AutoModelForCausalLM

    root, made = tmp_path_factory.mktemp("families"), {}
    for family in FAMILIES:
        tokenizer = falcon_tokenizer if family == "falcon" else llama_tokenizer
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(small_config(family, len(tokenizer))).save_pretrained(root / family)
        tokenizer.save_pretrained(root / family)
        made[family] = root / family
    return made
