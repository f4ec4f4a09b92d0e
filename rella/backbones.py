"""The paper's backbones (D.1.2): where they are and what they look like; what LoRA adapts in which architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rella.errors import InputError


@dataclass(frozen=True)
class Backbone:
    """A language model of the paper, known before anything of it is downloaded."""

    name: str
    """The preset's name, for `--model`."""
    source: str
    """Its name on the hub."""
    revision: str | None
    """The hub's commit that is taken where the user names none; None where none could be confirmed."""
    model_type: str
    """As in its config.json."""
    architecture: Mapping[str, int | bool]
    """Figures of its config.json under Llama's names; with them `AutoConfig.for_model(model_type, **architecture)`
    builds a model of the same size."""
    answer_ids: tuple[int, int] | None
    """Tokens of " Yes" and " No" in its vocabulary, for a check; None where they could not be confirmed."""
    native: tuple[str, str, str] | None
    """Its own conversation template (before the prompt, after it, between that and the answer), for tokenizers that
    come without one; the tokenizer adds the begin token, where there is one."""


_LLAMA_ANSWERS = (3869, 1939)
"""In the 32,000 tokens that Llama, Llama 2 and Vicuna share."""

_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: ",
    " ASSISTANT:",
    " ",
)
_INST = ("[INST] ", " [/INST]", " ")

_ALL = (
    Backbone(
        name="vicuna-7b",
        source="lmsys/vicuna-7b-v1.3",
        revision="236eeeab96f0dc2e463f2bebb7bb49809279c6d6",
        model_type="llama",
        architecture={
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32000,
            "max_position_embeddings": 2048,
        },
        answer_ids=_LLAMA_ANSWERS,
        native=_VICUNA,
    ),
    Backbone(
        name="vicuna-13b",
        source="lmsys/vicuna-13b-v1.3",
        revision="6566e9cb1787585d1147dcf4f9bc48f29e1328d2",
        model_type="llama",
        architecture={
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 40,
            "vocab_size": 32000,
            "max_position_embeddings": 2048,
        },
        answer_ids=_LLAMA_ANSWERS,
        native=_VICUNA,
    ),
    Backbone(
        name="mistral-7b",
        source="mistralai/Mistral-7B-Instruct-v0.1",
        revision="ec5deb64f2c6e6fa90c1abf74a91d5c93a9669ca",
        model_type="mistral",
        architecture={
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
        },
        answer_ids=None,
        native=_INST,
    ),
    Backbone(
        name="falcon-7b",
        source="tiiuae/falcon-7b-instruct",
        revision="8782b5c5d8c9290412416618f36a133653e85285",
        model_type="falcon",
        # One key and one value head for 71 query heads. The published file says num_kv_heads 71, which only Falcon's
        # newer architecture reads.
        architecture={
            "hidden_size": 4544,
            "intermediate_size": 18176,
            "num_hidden_layers": 32,
            "num_attention_heads": 71,
            "num_key_value_heads": 1,
            "vocab_size": 65024,
            "max_position_embeddings": 2048,
            "multi_query": True,
            "new_decoder_architecture": False,
            "parallel_attn": True,
            "alibi": False,
            "bias": False,
        },
        answer_ids=None,
        native=("User: ", "\n\nAssistant:", " "),
    ),
    Backbone(
        name="llama-2-70b-chat",
        source="meta-llama/Llama-2-70b-chat-hf",
        revision="e9149a12809580e8602995856f8098ce973d1080",
        model_type="llama",
        architecture={
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "max_position_embeddings": 4096,
        },
        answer_ids=_LLAMA_ANSWERS,
        native=_INST,
    ),
)

BACKBONES: dict[str, Backbone] = {backbone.name: backbone for backbone in _ALL}
"""By preset name."""

LORA_TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "gemma",
            "gemma2",
            "gemma3_text",
            "llama",
            "mistral",
            "mixtral",
            "olmo",
            "olmo2",
            "opt",
            "phi",
            "qwen2",
            "qwen3",
            "stablelm",
            "starcoder2",
        ),
        ("q_proj", "v_proj"),
    ),
    # Query, key and value in one matrix: the key rows of its update stay zero.
    "falcon": ("query_key_value",),
}
"""config.json's model_type → the modules that hold the query and value projections (§4.1.4)."""


def backbone_of(source: str) -> Backbone | None:
    """Return the preset with this hub name, or None."""
    return next((backbone for backbone in _ALL if backbone.source == source), None)


def lora_targets_for(model_type: str) -> tuple[str, ...]:
    """Return the names of the query and value projections of an architecture (§4.1.4).

    Raises:
        InputError: they are not known here.
    """
    if model_type not in LORA_TARGETS:
        raise InputError(
            f"the query and value projections of model type {model_type!r} are not known (known are "
            f"{', '.join(sorted(LORA_TARGETS))}): name the modules to adapt with --tune.lora-targets"
        )
    return LORA_TARGETS[model_type]
