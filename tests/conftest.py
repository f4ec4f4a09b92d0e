"""A small random Llama with its own tokenizer, made once a session; torch is imported only by tests that ask for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rella.models import ModelIdentity, identify
from rella.prompts import ML_1M, WRAPPERS, answer_text, prompt_text


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a hub model's: config, weights of large spread (so that mistakes show), byte-level BPE tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(1)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    profiles = [{"gender": g, "occupation": "writer", "age": "25-34"} for g in ("male", "female")]
    prompts = [
        WRAPPERS["vicuna"].wrap(prompt_text(ML_1M, profile, ["The Word Film (1999)"], [stars], "Aliens (1986)"))
        for profile in profiles
        for stars in range(1, 6)
    ]
    texts = [f"{prompt} {answer_text(label)}" for prompt in prompts for label in (0, 1)] * 3
    special = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=800, special_tokens=special, initial_alphabet=alphabet)
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=1024
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    folder = tmp_path_factory.mktemp("models") / "toy"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def identity(model_folder: Path) -> ModelIdentity:
    """What keys know of the small model."""
    return identify(str(model_folder))


@pytest.fixture(scope="session")
def tokenizer(identity: ModelIdentity) -> Any:
    from rella.lm.loading import load_tokenizer

    return load_tokenizer(identity)


@pytest.fixture(scope="session")
def shared_base(identity: ModelIdentity) -> Any:
    """The model with its LM head in float32, for tests that leave it as it is."""
    import torch

    from rella.lm.loading import load_base

    return load_base(identity, "float32", torch.device("cpu"))


@pytest.fixture
def base(identity: ModelIdentity) -> Any:
    """The same, fresh, for tests that change it."""
    import torch

    from rella.lm.loading import load_base

    return load_base(identity, "float32", torch.device("cpu"))
