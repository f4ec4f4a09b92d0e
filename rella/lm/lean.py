"""What LoRA tuning of a Llama-like model need not keep or compute; the results stay the same.

The base is frozen, so its backward pass needs no more than the states that gradients flow through. transformers keeps
for it, per token and layer, both float32 copies that every RMSNorm makes and three tensors of the intermediate size;
PEFT keeps the input of A and the dropout's mask for queries and values each. Here a norm keeps its input and one number
per token, the gated MLP keeps two tensors and computes the third again (one elementwise product), and both LoRA layers
share the input that is there anyway; layers of a quantised base keep nothing (`rella.lm.frozen`). Rotating positions
passes over queries and keys five times instead of ten. Behind the last layer's attention only the answers' positions
are computed: no loss depends on the others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rella.errors import InputError
from rella.lm.frozen import frozen_forward, quantized_types
from rella.lm.packed import NAME, causal_attention

Undo = Callable[[], None]


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) · weight, computed in float32 and rounded as transformers does; keeps x and (…, 1) float32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:  # noqa: ANN401
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # noqa: ANN401
        x, weight, scale = ctx.saved_tensors
        unit, g = x.float() * scale, (grad * weight).float()
        along = (g * unit).mean(-1, keepdim=True)
        return torch.addcmul(g, unit, along, value=-1).mul_(scale).to(x.dtype), None, None


class _Gate(torch.autograd.Function):
    """silu(gate) · up; keeps the two."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class _Rotate(torch.autograd.Function):
    """Rotary position embedding in four half-size kernels, forward and backward; keeps the angles alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        ctx.save_for_backward(cos, sin)
        out = torch.empty_like(x)
        (x1, x2), (o1, o2), (c1, c2), (s1, s2) = (t.chunk(2, dim=-1) for t in (x, out, cos, sin))
        torch.mul(x1, c1, out=o1).addcmul_(x2, s1, value=-1)
        torch.mul(x2, c2, out=o2).addcmul_(x1, s2)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # noqa: ANN401
        out = torch.empty_like(grad)
        (g1, g2), (o1, o2), (c1, c2), (s1, s2) = (t.chunk(2, dim=-1) for t in (grad, out, *ctx.saved_tensors))
        torch.mul(g1, c1, out=o1).addcmul_(g2, s2)
        torch.mul(g2, c2, out=o2).addcmul_(g1, s1, value=-1)
        return out, None, None


class _LoraBranch(torch.autograd.Function):
    """`out` + scaling · dropout(x) Aᵀ Bᵀ, added in place; keeps x (not a copy), the (T, rank) product and the mask."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        out: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        dropout: float,
    ) -> torch.Tensor:
        dropped, mask = torch.native_dropout(x, dropout, True) if dropout else (x, None)
        low = dropped.flatten(0, -2) @ a.t()
        ctx.save_for_backward(x, a, b, low, *([] if mask is None else [mask]))
        ctx.scaling, ctx.dropout = scaling, dropout
        ctx.mark_dirty(out)
        out.view(-1, out.shape[-1]).addmm_(low, b.t(), alpha=scaling)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        x, a, b, low, *masks = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        grad_low = (flat @ b).mul_(ctx.scaling)
        grad_b = (flat.t() @ low).mul_(ctx.scaling)
        keep = None if not masks else (masks[0], 1.0 / (1.0 - ctx.dropout))
        dropped = x if keep is None else torch.ops.aten.native_dropout_backward(x, *keep)
        grad_a = grad_low.t() @ dropped.flatten(0, -2)
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = (grad_low @ a).view_as(x)
            grad_x = grad_x if keep is None else torch.ops.aten.native_dropout_backward(grad_x, *keep)
        return grad, grad_x, grad_a, grad_b, None, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / √(mean(x²) + eps) · weight over the last dimension, as `LlamaRMSNorm` does.

    Args:
        x: (…, width), any floating dtype.
        weight: (width,), frozen: it gets no gradient.
        eps: of the model.
    """
    if x.is_cuda:
        # One kernel, which keeps the same and rounds once where transformers rounds twice.
        return F.rms_norm(x, weight.shape, weight, eps)
    out: torch.Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


def gate(gates: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gates) · up, elementwise, both of one shape."""
    out: torch.Tensor = _Gate.apply(gates, up)  # type: ignore[no-untyped-call]
    return out


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return x · cos + rotate_half(x) · sin, as Llama's `apply_rotary_pos_emb` does.

    Args:
        x: (B, L, heads, width).
        cos: (B or 1, L, 1, width).
        sin: as cos.
    """
    out: torch.Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return out


def lora_branch(
    out: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, dropout: float
) -> torch.Tensor:
    """Add scaling · dropout(x) Aᵀ Bᵀ to `out` in place and return it.

    Args:
        out: (…, outputs), a fresh result of the frozen layer.
        x: (…, inputs), what that layer was given.
        a: (rank, inputs).
        b: (outputs, rank).
        scaling: alpha / rank.
        dropout: probability, 0 outside training.
    """
    found: torch.Tensor = _LoraBranch.apply(out, x, a, b, scaling, dropout)  # type: ignore[no-untyped-call]
    return found


class Chosen:
    """Which positions the last layer computes behind its attention; None: all."""

    def __init__(self) -> None:
        self.positions: torch.Tensor | None = None
        """(T,) int64 into the flattened (B · L)."""

    def of(self, states: torch.Tensor) -> torch.Tensor:
        """Return (B, L, width) as it is, or its chosen positions: (1, T, width)."""
        if self.positions is None:
            return states
        return states.flatten(0, 1).index_select(0, self.positions)[None]


def _norm_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _mlp_forward(self: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    out: torch.Tensor = self.down_proj(gate(self.gate_proj(x), self.up_proj(x)))
    return out


def _attention_forward(
    self: Any,  # noqa: ANN401
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,  # noqa: ANN401
) -> tuple[torch.Tensor, None]:
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    cos, sin = (angle.unsqueeze(2) for angle in position_embeddings)
    q = rotate(self.q_proj(hidden_states).view(shape), cos, sin).transpose(1, 2)
    k = rotate(self.k_proj(hidden_states).view(shape), cos, sin).transpose(1, 2)
    v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
    window = getattr(self.config, "sliding_window", None)
    out, _ = causal_attention(self, q, k, v, attention_mask, scaling=self.scaling, sliding_window=window, **kwargs)
    return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None


def _lora_forward(self: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
    if self.disable_adapters or self.merged or a.dtype != x.dtype:
        plain: torch.Tensor = type(self).forward(self, x)
        return plain
    dropout = getattr(self.lora_dropout["default"], "p", 0.0) if self.training else 0.0
    return lora_branch(self.base_layer(x), x, a, b, self.scaling["default"], dropout)


def _last_forward(chosen: Chosen) -> Callable[..., torch.Tensor]:
    def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        states, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        states = chosen.of(hidden_states) + states
        out: torch.Tensor = states + self.mlp(self.post_attention_layernorm(states))
        return out

    return forward


def _replace(module: nn.Module, forward: Callable[..., Any]) -> Undo:
    module.forward = MethodType(forward, module)
    return lambda: delattr(module, "forward")


@contextmanager
def lean(lm: Any, sharded: bool) -> Iterator[Chosen | None]:  # noqa: ANN401 - transformers is untyped here
    """Make the modules of a causal LM lean while the context lasts; yield how to choose the last layer's positions.

    It yields None for architectures that are not Llama's or Mistral's; they stay as they are. Positions are rotated
    the lean way where `attention_without_masks` is at work too.

    Args:
        lm: a transformers causal LM, frozen but for LoRA layers of the adapter `default`.
        sharded: whether its weights are (ZeRO-3): LoRA's layers then have to be called to gather theirs.
    """
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

    layers = [m for m in lm.base_model.modules() if type(m) in (LlamaDecoderLayer, MistralDecoderLayer)]
    if not layers:
        yield None
        return
    chosen, undo = Chosen(), [u for m in lm.base_model.modules() for u in _leaner(m, sharded)]
    last = layers[-1]
    hook = last.self_attn.o_proj.register_forward_pre_hook(lambda module, inputs: (chosen.of(inputs[0]),))
    undo += [_replace(last, _last_forward(chosen)), hook.remove]
    try:
        yield chosen
    finally:
        for back in undo:
            back()


def _leaner(module: Any, sharded: bool) -> Iterator[Undo]:  # noqa: ANN401
    from peft.tuners.lora import Linear
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralAttention, MistralMLP, MistralRMSNorm

    layers, around = quantized_types()
    if type(module) in (LlamaAttention, MistralAttention) and module.config._attn_implementation == NAME:
        yield _replace(module, _attention_forward)
    elif type(module) in (LlamaRMSNorm, MistralRMSNorm):
        yield _replace(module, _norm_forward)
    elif type(module) in (LlamaMLP, MistralMLP) and module.config.hidden_act == "silu":
        yield _replace(module, _mlp_forward)
    elif type(module) in layers:
        yield _replace(module, frozen_forward)
    elif (
        type(module) in (Linear, *around)
        and not sharded
        and list(module.lora_A) == ["default"]
        and not module.lora_variant
    ):
        yield _replace(module, _lora_forward)


@contextmanager
def recomputed(lm: Any, layers: Literal["none", "full"] | int) -> Iterator[None]:  # noqa: ANN401
    """Compute activations of `layers` again in the backward pass, while the context lasts: none, all, every n-th.

    Args:
        lm: a transformers causal LM.
        layers: which; the last layer's few answers are kept where `lean` is at work.

    Raises:
        InputError: a number below 1.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if layers == "none":
        yield
        return
    every = 1 if layers == "full" else layers
    if every < 1:
        raise InputError(f"--tune.gradient-checkpointing {layers}: give none, full, or n for every n-th layer (n >= 1)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    blocks = [m for m in lm.base_model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for number, block in enumerate(blocks):
        block.gradient_checkpointing = number % every == 0
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            lm.gradient_checkpointing_disable()
