"""A small BERT and a small T5 with tokenizers of their kinds, made once a session, and a data set of three users."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rella.data.tables import Histories
from rella.models import ModelIdentity, identify
from rella.prompts import ML_1M, Display, prompt_text
from rella.textctr.texts import FieldTexts

FIELDS = {
    "User ID": "users.user_id",
    "Gender": "users.gender",
    "Movie ID": "items.item_id",
    "Movie title": "items.title",
    "Movie genre": "items.genre",
}
COLOURS = ("red", "green", "blue", "black")
TITLES = ("Heat (1995)", "Alien (1979)", "Amélie (2001)", "Up (2009)", "Big (1988)")


def corpus() -> list[str]:
    profile = {"gender": "female", "occupation": "writer", "age": "25-34"}
    texts = [prompt_text(ML_1M, profile, TITLES[:3], [1, 4, 5], title) for title in TITLES]
    texts += [f"User ID is {n}. Gender is male. Movie ID is {n}. Movie genre is Action. yes no" for n in range(20)]
    texts += [f"the user likes {a}. the item is {b}." for a in COLOURS for b in COLOURS]
    return [*texts, "History is Heat (1995) (4 stars), Alien (1979) (1 star). Movie title is Up (2009)."] * 3


def wordpieces() -> Any:
    """BERT's kind: lower case, pieces of words, [CLS] first and [SEP] last."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(corpus(), trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad", "unk", "cls", "sep", "mask")
    tokens = {f"{name}_token": token for name, token in zip(names, special, strict=True)}
    return PreTrainedTokenizerFast(tokenizer_object=made, **tokens, model_max_length=128)


def pieces_with_end() -> Any:
    """T5's kind: a blank before every word, </s> behind every text, nothing in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    special = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=500, special_tokens=special))
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked LM as the hub's bert-base-uncased is one; weights of large spread, so that mistakes show."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    torch.set_num_threads(1)
    tokenizer, folder = wordpieces(), tmp_path_factory.mktemp("text models") / "small-bert"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=0,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.set_num_threads(1)
    tokenizer, folder = pieces_with_end(), tmp_path_factory.mktemp("text models") / "small-t5"
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=32,
        initializer_factor=1.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert(bert_folder: Path) -> ModelIdentity:
    return identify(str(bert_folder))


@pytest.fixture(scope="session")
def t5(t5_folder: Path) -> ModelIdentity:
    return identify(str(t5_folder))


@pytest.fixture(scope="session")
def bert_tokenizer(bert: ModelIdentity) -> Any:
    from rella.lm.loading import load_tokenizer

    return load_tokenizer(bert)


@pytest.fixture(scope="session")
def t5_tokenizer(t5: ModelIdentity) -> Any:
    from rella.lm.loading import load_tokenizer

    return load_tokenizer(t5)


def small_tables(titles: Sequence[str] = TITLES) -> tuple[pa.Table, pa.Table, Histories]:
    """Three users with 0, 2 and 5 behaviours."""
    users = pa.table({"user": [0, 1, 2], "user_id": ["7", "8", "9"], "gender": ["female", "male", None]})
    genres = ["Crime", "Horror", "Romance", "Animation", "Comedy"]
    items = pa.table(
        {"item": list(range(5)), "item_id": [f"m{n}" for n in range(5)], "title": list(titles), "genre": genres}
    )
    histories = Histories(
        np.array([0, 0, 2, 7]),
        np.array([0, 1, 4, 3, 2, 1, 0], dtype=np.int32),
        np.array([4, 1, 2, 3, 4, 5, 1], dtype=np.float32),
    )
    return users, items, histories


@pytest.fixture
def texts() -> FieldTexts:
    return FieldTexts.from_tables(*small_tables(), FIELDS, ML_1M, Display())
