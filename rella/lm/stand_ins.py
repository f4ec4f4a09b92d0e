"""Small models of the paper's architectures with random weights: what stands in for its backbones on two cores.

They read and answer as the real ones do, through the same code, and know nothing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rella.artifacts import digest
from rella.backbones import BACKBONES
from rella.config import Experiment
from rella.digests import cache_folder
from rella.models import TINY

SMALL: Mapping[str, Mapping[str, Any]] = {
    "falcon-7b": {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "multi_query": True,
                  "new_decoder_architecture": False, "parallel_attn": True, "alibi": False, "bias": False,
                  "initializer_range": 0.07},
    "mistral-7b": {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                   "intermediate_size": 256, "sliding_window": 4096, "initializer_range": 0.07},
    "vicuna-7b": {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
                  "intermediate_size": 256, "initializer_range": 0.07},
    "llama-2-70b-chat": {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 8,
                         "num_key_value_heads": 2, "intermediate_size": 344, "initializer_range": 0.07},
}  # fmt: skip
"""Backbone of the paper → figures of a small model's configuration; attention as in the real one."""
VERSION, TEXT_VERSION = 1, 2
"""Raised when they, or BERT and T5, are made in another way."""


def stand_in(name: str) -> Path:
    """Return the folder of a small model of a backbone's architecture, made where it is missing.

    Args:
        name: of `SMALL`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    def make(folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(TINY)
        config = AutoConfig.for_model(
            BACKBONES[name].model_type,
            **SMALL[name],
            vocab_size=len(tokenizer),
            max_position_embeddings=2048,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return _kept(name, digest({"version": VERSION, "config": dict(SMALL[name])}), make)


def text_stand_ins(experiment: Experiment) -> tuple[Path, Path]:
    """Return the folders of a small BERT and a small T5 whose tokenizers know the data set's words.

    Args:
        experiment: whose training samples are worded.
    """
    from rella.textctr.small import save_bert, save_t5, texts_of

    key = digest(
        {
            "version": TEXT_VERSION,
            "dataset": experiment.dataset,
            "k": experiment.k,
            "users": experiment.data.sample_users,
            "seed": experiment.data.sample_seed,
        }
    )

    def bert(folder: Path) -> None:
        save_bert(folder, texts_of(experiment), vocabulary=1000, positions=512, width=64, spread=0.05)

    def t5(folder: Path) -> None:
        save_t5(folder, texts_of(experiment), vocabulary=1000, longest=1024, width=64)

    return _kept("bert", key, bert), _kept("t5", key, t5)


def _kept(name: str, key: str, make: Callable[[Path], None]) -> Path:
    """Return a folder of the cache, made aside and put in place whole: two jobs may want it at once."""
    folder = cache_folder() / "stand-ins" / f"{name}-{key[:12]}"
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            make(aside)
            if not folder.exists():
                os.replace(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder
