"""Lean tuning: in every mode, losses and LoRA's gradients are those of transformers' and PEFT's own modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rella.config import TuneConfig
from rella.lm import lean as leaner
from rella.lm.lean import Chosen, lean, recomputed
from rella.lm.lora import add_lora
from rella.lm.packed import NAME, attention_without_masks, causal_attention
from rella.lm.tuning import AnswerModel, Row, answer_inputs
from tests.lm.conftest import small_config

RNG = np.random.default_rng(0)
ROWS = [
    Row(RNG.integers(3, 90, n).astype(np.int32), answer)
    for n, answer in zip([5, 30, 1, 17, 17], [(40, 41), (50,), (60, 61, 62), (40, 41), (51,)], strict=True)
]
MODES = [(packing, layers) for packing in (False, True) for layers in ("none", "full", 2)]


def tuned(family: str, dropout: float = 0.0, **changes: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    changes = {"sliding_window": None, **changes} if family == "mistral" else changes
    base = AutoModelForCausalLM.from_config(small_config(family, 100, **changes)).requires_grad_(False)
    model = add_lora(base, TuneConfig(lora_dropout=dropout), 0).train()
    # B starts at zero, where A has no gradient.
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@contextmanager
def mode(model: Any, packing: bool, layers: Any, sharded: bool = False) -> Iterator[Chosen | None]:
    lm = model.get_base_model()
    with ExitStack() as stack:
        stack.enter_context(attention_without_masks(lm, 33, packing))
        stack.enter_context(recomputed(lm, layers))
        yield stack.enter_context(lean(lm, sharded))


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def plain(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Full logits, one row at a time, nothing replaced."""
    total = torch.zeros(())
    for row in ROWS:
        first = len(row.prompt) - 1
        logits = model(input_ids=torch.tensor([[*row.prompt.tolist(), *row.answer]])).logits[0]
        answer = torch.tensor(row.answer)
        total = total + nn.functional.cross_entropy(logits[first : first + len(answer)], answer, reduction="sum")
    total.backward()
    return float(total.detach()), gradients(model)


def ours(model: Any, packing: bool, layers: Any, sharded: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    with mode(model, packing, layers, sharded) as chosen:
        root = AnswerModel(model)
        root.chosen = chosen
        loss = root(*answer_inputs(ROWS, 2, torch.device("cpu"), packing))
        loss.backward()
    return float(loss.detach()), gradients(model)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize(("packing", "layers"), MODES)
@pytest.mark.parametrize("sharded", [False, True])
def test_losses_and_gradients_are_the_plain_loop_s(family: str, packing: bool, layers: Any, sharded: bool) -> None:
    model = tuned(family, num_hidden_layers=3)
    right, wanted = plain(model)
    found, got = ours(model, packing, layers, sharded)
    assert found == pytest.approx(right, abs=1e-5)
    assert len(wanted) == 12
    for name, gradient in wanted.items():
        assert float(gradient.abs().max()) > 1e-3, f"{name} would prove nothing"
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5)


def test_falcon_stays_as_it_is_and_cannot_be_packed() -> None:
    model = tuned("falcon")
    right, wanted = plain(model)
    found, got = ours(model, False, "full")
    assert found == pytest.approx(right, abs=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"--tune\.packing true: falcon"):
        ours(model, True, "none")


def test_rows_longer_than_a_window_keep_the_model_s_attention() -> None:
    model = tuned("mistral", sliding_window=8)
    right, wanted = plain(model)
    found, got = ours(model, False, "none")
    assert found == pytest.approx(right, abs=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="sees 8 tokens back, and the longest row has 33"):
        ours(model, True, "none")


def test_a_window_hides_what_is_behind_it() -> None:
    """Validation may meet rows that are longer than any trained one."""
    from types import SimpleNamespace

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 12, 8) for _ in range(3))
    out, _ = causal_attention(SimpleNamespace(is_causal=True), q, k, v, None, sliding_window=3)  # type: ignore[arg-type]
    for at in range(12):
        seen = slice(max(0, at - 2), at + 1)
        weight = torch.softmax((q[:, :, at : at + 1] @ k[:, :, seen].transpose(2, 3)) / 8**0.5, -1)
        torch.testing.assert_close(out[:, at], (weight @ v[:, :, seen])[:, :, 0])


def test_dropout_is_the_layer_s_own() -> None:
    """Masks are drawn as PEFT draws them, so the same generator gives the same loss and gradients."""
    torch.manual_seed(1)
    x, out = torch.randn(2, 7, 16), torch.randn(2, 7, 12)
    a, b = torch.randn(4, 16, requires_grad=True), torch.randn(12, 4, requires_grad=True)
    x.requires_grad_()
    torch.manual_seed(5)
    found = leaner.lora_branch(out.clone(), x, a, b, 2.0, 0.4)
    torch.manual_seed(5)
    dropped, mask = torch.native_dropout(x, 0.4, True)
    right = out + dropped @ a.t() @ b.t() * 2.0
    torch.testing.assert_close(found, right)
    assert 0.3 < float((~mask).float().mean()) < 0.5
    weight = torch.randn_like(right)
    for got, wanted in zip(
        torch.autograd.grad((found * weight).sum(), [x, a, b]),
        torch.autograd.grad((right * weight).sum(), [x, a, b]),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", ["none", "full"])
def test_dropout_acts_in_training_alone(layers: Any) -> None:
    model, without = tuned("llama", dropout=0.5), tuned("llama")
    torch.manual_seed(0)
    trained, _ = ours(model, False, layers)
    assert abs(trained - ours(without, False, "none")[0]) > 1e-3
    assert ours(model.eval(), False, layers)[0] == pytest.approx(ours(without, False, "none")[0], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_norm_and_the_gate_round_as_transformers_do(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    x = (3 * torch.randn(5, 64)).to(dtype).requires_grad_()
    norm = LlamaRMSNorm(64, eps=1e-6).requires_grad_(False)
    norm.weight.copy_(torch.rand(64) + 0.5)
    norm.to(dtype)
    right, found = norm(x), leaner.rms_norm(x, norm.weight, 1e-6)
    assert torch.equal(found, right)
    near = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    weight = torch.randn_like(x)
    close(torch.autograd.grad((found * weight).sum(), x), torch.autograd.grad((right * weight).sum(), x), near)
    up = torch.randn(5, 64).to(dtype).requires_grad_()
    right, found = nn.functional.silu(x) * up, leaner.gate(x, up)
    assert torch.equal(found, right)
    close(
        torch.autograd.grad((found * weight).sum(), [x, up]),
        torch.autograd.grad((right * weight).sum(), [x, up]),
        near,
    )


def test_the_rotation_is_llama_s() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    torch.manual_seed(0)
    x, angle = torch.randn(2, 5, 3, 8, requires_grad=True), torch.randn(2, 5, 8)
    cos, sin = angle.cos(), (2 * angle).sin()
    right = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)[0].transpose(1, 2)
    found, weight = leaner.rotate(x, cos[:, :, None], sin[:, :, None]), torch.randn(2, 5, 3, 8)
    close([found], [right], 1e-6)
    close(torch.autograd.grad((found * weight).sum(), x), torch.autograd.grad((right * weight).sum(), x), 1e-6)


def close(found: Any, right: Any, near: float) -> None:
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=near, atol=near)


def saved_bytes(model: Any, context: Any) -> int:
    """Bytes that the backward pass keeps, weights and repetitions not counted."""
    kept: dict[int, int] = {}
    weights = {p.data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with context as chosen, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        root = AnswerModel(model)
        root.chosen = chosen
        loss = root(*answer_inputs(ROWS * 4, 2, torch.device("cpu")))
    del loss
    return sum(kept.values())


@contextmanager
def nothing() -> Iterator[None]:
    yield


def test_less_is_kept_for_the_backward_pass() -> None:
    """Of a model in bfloat16, as DeepSpeed holds it."""
    model = tuned("llama", dropout=0.1, hidden_size=64, intermediate_size=172, num_hidden_layers=6).bfloat16()
    theirs = saved_bytes(model, nothing())
    found = saved_bytes(model, mode(model, False, "none"))
    assert found < 0.65 * theirs
    half, least = (saved_bytes(model, mode(model, False, layers)) for layers in (2, "full"))
    assert least < 0.35 * found
    assert least < half < 0.75 * found


def test_the_last_layer_computes_answers_only() -> None:
    model, seen = tuned("llama"), []
    layers = model.get_base_model().model.layers
    for layer in layers:
        layer.mlp.register_forward_hook(lambda module, inputs, out: seen.append(tuple(out.shape)))
    ours(model, False, "none")
    assert seen == [(5, 31, 32), (1, sum(len(row.answer) for row in ROWS), 32)]


def test_everything_is_put_back() -> None:
    model = tuned("llama")
    lm = model.get_base_model()
    right, attention = plain(model)[0], lm.config._attn_implementation

    def fails() -> None:
        with mode(model, True, "full"):
            assert lm.model.config._attn_implementation == NAME
            assert any("forward" in vars(module) for module in model.modules())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails()
    assert lm.model.config._attn_implementation == attention
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    assert plain(model)[0] == right


@pytest.mark.parametrize("layers", [0, -1])
def test_layers_are_counted_from_one(layers: int) -> None:
    with pytest.raises(ValueError, match=rf"--tune\.gradient-checkpointing {layers}"), recomputed(None, layers):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_packing_on_a_card(family: str) -> None:
    """FlashAttention over packed rows against rows padded, in bfloat16."""
    card = torch.device("cuda")
    model = tuned(family, hidden_size=256, intermediate_size=512).to(card, torch.bfloat16)
    found = []
    for packing in (False, True):
        with mode(model, packing, "none") as chosen:
            root = AnswerModel(model)
            root.chosen = chosen
            loss = root(*answer_inputs(ROWS, 2, card, packing))
            loss.backward()
        found.append((float(loss.detach()), gradients(model)))
    (padded, right), (packed, got) = found
    assert packed == pytest.approx(padded, rel=2e-2)
    for name in right:
        scale = float(right[name].float().norm())
        assert float((got[name] - right[name]).float().norm()) < 0.1 * scale
