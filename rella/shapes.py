"""The size of a decoder-only language model, read off its config.json: what arithmetic about it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rella.backbones import lora_targets_for
from rella.errors import InputError

GATED = frozenset(
    ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "olmo", "olmo2", "qwen2", "qwen3", "stablelm", "phi3")
)
"""Model types whose MLP multiplies two projections."""
PLAIN = frozenset(("falcon", "gpt2", "gpt_neox", "opt", "phi", "starcoder2"))
LEAN = frozenset(("llama", "mistral"))
"""Those that `rella.lm.lean` knows."""


@dataclass(frozen=True)
class Shape:
    """Widths and counts of a decoder of equal layers."""

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    intermediate: int
    vocabulary: int
    tied: bool
    """Whether the LM head is the embedding itself."""

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies two projections of the intermediate size."""
        return self.model_type in GATED

    @property
    def lean(self) -> bool:
        """Whether tuning keeps only what `rella.lm.lean` leaves."""
        return self.model_type in LEAN

    @property
    def attention(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_width

    @property
    def kv(self) -> int:
        """Width of all key heads together, or of all value heads."""
        return self.kv_heads * self.head_width

    @property
    def matmul_parameters(self) -> int:
        """P: weights of the layers' matrix products; neither embedding nor LM head."""
        projections = self.hidden * (2 * self.attention + 2 * self.kv)
        return self.layers * (projections + (3 if self.gated else 2) * self.hidden * self.intermediate)

    @property
    def embedding(self) -> int:
        """Weights of the token embedding, and of the LM head where it has its own."""
        return self.vocabulary * self.hidden

    def parameters(self, head: bool) -> int:
        """Return the weights of the whole model, with or without the LM head; biases, which are few, left out."""
        own_head = self.embedding if head and not self.tied else 0
        return self.matmul_parameters + self.embedding + own_head + (2 * self.layers + 1) * self.hidden

    def lora_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """Return the weights of LoRA layers on `targets` in every layer: rank · (inputs + outputs) each (§4.1.4).

        Raises:
            InputError: a target that is no projection known here.
        """
        h, i = self.hidden, self.intermediate
        sizes = {
            "q_proj": h + self.attention,
            "k_proj": h + self.kv,
            "v_proj": h + self.kv,
            "o_proj": self.attention + h,
            "query_key_value": h + self.attention + 2 * self.kv,
            "gate_proj": h + i,
            "up_proj": h + i,
            "down_proj": i + h,
        }
        unknown = [t for t in targets if t not in sizes]
        if unknown:
            raise InputError(f"--tune.lora-targets {unknown[0]}: a plan knows {', '.join(sizes)}")
        return self.layers * rank * sum(sizes[t] for t in targets)

    def targets(self, given: Sequence[str] | str) -> tuple[str, ...]:
        """Return what LoRA adapts: as given, or the query and value projections for `auto`."""
        return lora_targets_for(self.model_type) if isinstance(given, str) else tuple(given)


def shape_of(fields: Mapping[str, Any], model_type: str = "") -> Shape:
    """Return the shape that a config.json describes.

    Args:
        fields: its content, or that of a backbone preset; of a model with a language model inside, the outer one's.
        model_type: where the fields do not say it.

    Raises:
        InputError: an architecture that is not known here.
    """
    text: Mapping[str, Any] = fields.get("text_config", fields)
    kind = str(text.get("model_type") or fields.get("model_type") or model_type)
    if kind not in GATED | PLAIN:
        raise InputError(
            f"a plan does not know the size of model type {kind!r}; it knows {', '.join(sorted(GATED | PLAIN))}"
        )
    hidden, layers, heads = (_first(text, *names) for names in (_HIDDEN, _LAYERS, _HEADS))
    width = int(text.get("head_dim") or hidden // heads)
    return Shape(
        model_type=kind,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=_kv_heads(text, kind, heads),
        head_width=width,
        intermediate=next((int(text[n]) for n in _INTERMEDIATE if text.get(n)), 4 * hidden),
        vocabulary=_first(text, "vocab_size"),
        tied=bool(text.get("tie_word_embeddings", kind in ("falcon", "gpt2", "opt", "gemma", "gemma2"))),
    )


_HIDDEN = ("hidden_size", "n_embd", "d_model")
_LAYERS = ("num_hidden_layers", "n_layer")
_INTERMEDIATE = ("ffn_hidden_size", "intermediate_size", "ffn_dim", "n_inner")
_HEADS = ("num_attention_heads", "n_head")


def _first(fields: Mapping[str, Any], *names: str) -> int:
    found = next((fields[name] for name in names if fields.get(name) is not None), None)
    if found is None:
        raise InputError(f"config.json has no {names[0]}: its size is not known")
    return int(found)


def _kv_heads(fields: Mapping[str, Any], kind: str, heads: int) -> int:
    if kind == "falcon" and not fields.get("new_decoder_architecture", False):
        # num_kv_heads counts in the newer architecture only.
        return 1 if fields.get("multi_query", True) else heads
    return int(fields.get("num_key_value_heads") or fields.get("num_kv_heads") or heads)
