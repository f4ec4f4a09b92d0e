"""Rows packed one after the other in one sequence: causal attention that stays inside each row, without any mask.

On cards with FlashAttention in torch all rows go through one call; elsewhere each row is a call of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from rella.errors import InputError

NAME = "rella_causal"
"""Under which transformers knows this attention. It knows no mask for it, and so makes none."""
FAMILIES = ("llama", "mistral")
"""Architectures whose attention passes on what the model's `forward` was given."""


def causal_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    row_starts: torch.Tensor | None = None,
    row_lengths: tuple[int, ...] = (),
    **_: Any,  # noqa: ANN401 - what transformers tells every attention
) -> tuple[torch.Tensor, None]:
    """Return causal attention, (B, L, heads, width), in transformers' own form.

    Args:
        module: the layer's attention.
        query: (B, heads, L, width).
        key: (B, key heads, L, width), rotated as the query is.
        value: as the key.
        attention_mask: never given.
        scaling: of the products.
        sliding_window: how many tokens a token sees, itself included; packed rows are not longer.
        row_starts: (rows + 1,) int32, where packed rows start and the last one ends; then B is 1. Without it every
            row of the batch starts at its first position.
        row_lengths: of packed rows, on the host.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    length = query.shape[2]
    if row_starts is None:
        mask = None if sliding_window is None or length <= sliding_window else _band(length, sliding_window, query)
        out, _none = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, is_causal=True)
        return out, None
    if _has_varlen(query):
        return _varlen(query, key, value, row_starts, max(row_lengths), scaling), None
    groups = query.shape[1] // key.shape[1]
    whole = (query, repeat_kv(key, groups), repeat_kv(value, groups))
    rows = zip(*(tensor.split(row_lengths, dim=2) for tensor in whole), strict=True)
    parts = [scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling) for q, k, v in rows]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _band(length: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """Which keys a query sees: itself and the `window` − 1 before it; (1, 1, L, L) bool."""
    every = torch.ones(length, length, dtype=torch.bool, device=like.device)
    return (every.tril() & every.triu(1 - window))[None, None]


def _has_varlen(query: torch.Tensor) -> bool:
    """FlashAttention needs half precision and a card from Ampere on."""
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and _flash(query.device.index)


@cache
def _flash(card: int) -> bool:
    return torch.cuda.get_device_capability(card) >= (8, 0) and torch.backends.cuda.is_flash_attention_available()


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, longest: int, scale: float | None
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Its way to say "causal" and "grouped" changed from torch 2.11 to 2.13.
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    if "scale" in known:
        options["scale"] = scale
    elif scale is not None and abs(scale * q.shape[-1] ** 0.5 - 1) > 1e-6:
        q = q * (scale * q.shape[-1] ** 0.5)
    out: Any = varlen_attn(q, k, v, starts, starts, longest, longest, **options)
    found: torch.Tensor = out[None]
    return found


def why_not(config: Any, longest: int) -> str | None:  # noqa: ANN401 - transformers is untyped here
    """Return why a model's attention cannot be this one, or None.

    Args:
        config: of the model.
        longest: tokens of the longest row: a window at least as long hides nothing.
    """
    if config.model_type not in FAMILIES:
        return f"{config.model_type} models do not let their attention be replaced"
    if getattr(config, "attention_dropout", 0):
        return "the model has dropout in its attention"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < longest:
        return f"the model sees {window} tokens back, and the longest row has {longest}"
    return None


@contextmanager
def attention_without_masks(lm: Any, longest: int, packing: bool) -> Iterator[None]:  # noqa: ANN401
    """Let a causal LM use this attention, where it can, and give it its own back.

    Args:
        lm: a transformers causal LM.
        longest: tokens of the longest row.
        packing: whether rows will be packed.

    Raises:
        InputError: rows are to be packed and the model cannot do that.
    """
    from transformers import AttentionInterface

    reason = why_not(lm.config, longest)
    if reason is not None:
        if packing:
            raise InputError(f"--tune.packing true: {reason}; leave it off")
        yield
        return
    AttentionInterface.register(NAME, causal_attention)
    config, before = lm.base_model.config, lm.base_model.config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
