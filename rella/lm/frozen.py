"""Frozen layers that bitsandbytes quantised, as LoRA tuning needs them: nothing is kept for the backward pass.

A frozen weight's gradient is asked of nobody, so the inputs need not be kept; bitsandbytes keeps them for its 8-bit
layers, 15 kB a token and layer of a 1B model.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable


def quantized_types() -> tuple[tuple[type[nn.Module], ...], tuple[type[nn.Module], ...]]:
    """Return bitsandbytes' linear layers and PEFT's LoRA layers around them; none where it is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return (), ()
    import bitsandbytes.nn as bits
    from peft.tuners.lora import bnb as around

    return (bits.Linear8bitLt, bits.Linear4bit), (around.Linear8bitLt, around.Linear4bit)


def full_weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:  # noqa: ANN401 - bitsandbytes is untyped here
    """Return the (outputs, inputs) weight of a quantised layer as it stands for, in `dtype`."""
    import bitsandbytes as bits

    if isinstance(layer, bits.nn.Linear4bit):
        found: torch.Tensor = bits.functional.dequantize_4bit(layer.weight, layer.weight.quant_state).to(dtype)
        return found
    # They move from the weight into the state in the first pass.
    rows, scales = (own if own is not None else moved for own, moved in (
        (layer.state.CB, layer.weight.CB), (layer.state.SCB, layer.weight.SCB)
    ))  # fmt: skip
    # Rounded as bitsandbytes does.
    out: torch.Tensor = rows.to(dtype, copy=True).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))
    return out


class _Product(torch.autograd.Function):
    """layer(x) of a frozen quantised layer; keeps neither x nor anything as large."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any) -> torch.Tensor:  # noqa: ANN401
        ctx.layer = layer
        out: torch.Tensor = type(layer).forward(layer, x)
        # On a card it is a view of rows, to which autograd would not let LoRA's branch be added in place.
        return out.data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ANN401
        return grad @ full_weight(ctx.layer, grad.dtype), None


def frozen_forward(self: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    """Take the place of such a layer's `forward`: (…, inputs) to (…, outputs)."""
    out: torch.Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
    return out
