"""LoRA layers on a frozen base (§4.1.4): on the query and value projections, fused with the keys or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from rella.backbones import lora_targets_for
from rella.config import TuneConfig
from rella.errors import InputError

_FUSED = "query_key_value"
"""Falcon's projection of queries, keys and values in one."""


def add_lora(base: Any, config: TuneConfig, seed: int) -> Any:  # noqa: ANN401 - transformers and peft are untyped here
    """Return `base` with fresh LoRA layers (§4.1.4), initialised from `seed`; only they train.

    In Falcon's fused projection the update of the keys is held at zero, so that queries and values are adapted as in
    the other backbones (they share the layer's A).

    Raises:
        InputError: the model has no module of a name in `lora_targets`, or `auto` does not know its architecture.
    """
    from peft import LoraConfig, get_peft_model

    targets = lora_targets_for(base.config.model_type) if config.lora_targets == "auto" else config.lora_targets
    _check_targets(base, targets)
    torch.manual_seed(seed)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(base, lora)
    if base.config.model_type == "falcon":
        _freeze_keys(tuned, key_rows(base.config))
    return tuned


def key_rows(config: Any) -> torch.Tensor:  # noqa: ANN401
    """Return which output rows of Falcon's fused projection are keys: (rows,) int64, rising.

    The projection's outputs are heads of `hidden_size / num_attention_heads` rows, in groups: the query heads that
    share a key head, their key head, their value head.

    Args:
        config: a transformers `FalconConfig`.
    """
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    # multi_query has one group of all heads; without it every query head is followed by its own key and value.
    old = 1 if config.multi_query else heads
    groups = config.num_kv_heads if config.new_decoder_architecture else old
    queries = heads // groups
    rows = torch.arange(groups * (queries + 2) * width).view(groups, queries + 2, width)
    return rows[:, queries].flatten()


def _freeze_keys(tuned: Any, rows: torch.Tensor) -> None:  # noqa: ANN401
    """Keep the key rows of every fused projection's update at zero.

    B starts at zero. A row whose gradient is always zero stays there: AdamW's step and its weight decay are zero too.
    The hook sits on the parameter, before autograd accumulates, and so before whatever DeepSpeed hangs there.
    """
    hook = _zeroing(rows)
    for name, parameter in tuned.named_parameters():
        if f".{_FUSED}.lora_B." in name:
            parameter.register_hook(hook)


def _zeroing(rows: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    def zero(gradient: torch.Tensor) -> torch.Tensor:
        # Not a product with a mask: that would leave an overflow where it is.
        return gradient.index_fill(0, rows.to(gradient.device), 0.0)

    return zero


def _check_targets(base: Any, targets: Sequence[str]) -> None:  # noqa: ANN401
    """PEFT passes over a name that matches nothing, as long as another one matches."""
    names = [name for name, _ in base.named_modules()]
    missing = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in names)]
    if missing or not targets:
        linear = sorted({n.rpartition(".")[2] for n, module in base.named_modules() if isinstance(module, nn.Linear)})
        raise InputError(
            f"this {base.config.model_type} model has no modules {', '.join(missing) or '(none named)'}: give "
            f"--tune.lora-targets names of its linear layers ({', '.join(linear)})"
        )
