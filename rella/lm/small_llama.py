"""Small Llamas built from a configuration: what a machine without a GPU or a hub can train from scratch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Shape:
    """Size and first weights of a model."""

    hidden: int = 192
    layers: int = 4
    heads: int = 4
    intermediate: int = 512
    vocabulary: int = 2048
    """Tokens, special ones and fixed sentences included."""
    spread: float = 0.02
    """Standard deviation of the weights at first."""
    seed: int = 0


def new_model(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return an untrained model for `tokenizer`, float32, context 2048, tied embeddings, weights from the seed."""
    torch.manual_seed(shape.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            initializer_range=shape.spread,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a folder that `from_pretrained` loads: float16 safetensors, configuration and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    model.float()
    tokenizer.save_pretrained(folder)
