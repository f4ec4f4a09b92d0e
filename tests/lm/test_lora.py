"""LoRA where the paper puts it: scores and loss of every architecture, Falcon's keys left alone in every layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rella.backbones import BACKBONES, LORA_TARGETS
from rella.config import TuneConfig
from rella.lm.lora import add_lora, key_rows
from rella.lm.scoring import answer_logits
from rella.lm.tuning import AnswerModel

SMALL: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": 6,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OWN: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16, "init_std": 0.3},
    "mixtral": {"num_local_experts": 4},
    # Caps low enough to change these logits.
    "gemma2": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
}


def small(model_type: str) -> Any:
    fields = SMALL | OWN.get(model_type, {})
    if model_type == "falcon":
        fields.pop("head_dim")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields)).eval()


def trainable(model: Any) -> dict[str, Any]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("model_type", sorted(LORA_TARGETS))
def test_scores_and_loss_of_every_architecture(model_type: str) -> None:
    """Two rows of the head at one position, padded and without mask, are the model's own logits; so is the loss."""
    base = small(model_type)
    tuned = add_lora(base, TuneConfig(lora_targets=LORA_TARGETS[model_type], lora_dropout=0.0), seed=0).eval()
    with torch.no_grad():
        for name, parameter in trainable(tuned).items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 200, n).astype(np.int32) for n in (3, 40, 11, 25)]
    found = answer_logits(tuned, prompts, (50, 60), pad=0)
    losses = 0.0
    for prompt, pair in zip(prompts, found, strict=True):
        with torch.no_grad():
            logits = tuned(input_ids=torch.tensor(prompt[None].astype(np.int64))).logits[0, -1].float()
        np.testing.assert_allclose(pair, logits[[50, 60]].numpy(), atol=1e-5)
        losses += float(torch.nn.functional.cross_entropy(logits, torch.tensor(50)))
    ids = torch.zeros(4, 40, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.from_numpy(prompt.astype(np.int64))
    last = torch.tensor([len(p) - 1 for p in prompts])
    with torch.no_grad():
        loss = AnswerModel(tuned)(ids, torch.arange(4), last, torch.full((4,), 50))
    assert float(loss) == pytest.approx(losses, rel=1e-5)
    assert np.abs(found[:, 0] - found[:, 1]).min() > 1e-4


LAYOUTS: dict[str, dict[str, Any]] = {
    "falcon-7b": {"multi_query": True, "new_decoder_architecture": False},
    "interleaved": {"multi_query": False, "new_decoder_architecture": False},
    "grouped": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "grouped by one": {"new_decoder_architecture": True, "num_kv_heads": 6},
    "one group": {"new_decoder_architecture": True, "num_kv_heads": 1},
}


def layout(name: str) -> Any:
    # num_kv_heads is left at the heads' number where the layout ignores it, as in Falcon-7B's published file.
    return AutoConfig.for_model("falcon", hidden_size=24, num_attention_heads=6, vocab_size=50, **LAYOUTS[name])


def test_key_rows_of_falcon_7b() -> None:
    backbone = BACKBONES["falcon-7b"]
    rows = key_rows(AutoConfig.for_model("falcon", **backbone.architecture))
    assert rows.tolist() == list(range(71 * 64, 72 * 64))


@pytest.mark.parametrize("name", LAYOUTS)
def test_only_keys_are_held_at_zero(name: str) -> None:
    """Weight decay, momentum and an overflow in the gradient included."""
    config = layout(name)
    config.num_hidden_layers = 2
    torch.manual_seed(0)
    tuned = add_lora(AutoModelForCausalLM.from_config(config), TuneConfig(lora_targets=("query_key_value",)), seed=0)
    weights = trainable(tuned)
    optimiser = torch.optim.AdamW(weights.values(), lr=0.1, weight_decay=0.1)
    ids = torch.randint(0, 50, (2, 9))
    for _ in range(3):
        optimiser.zero_grad()
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    keys = key_rows(config)
    updates = [p for n, p in weights.items() if "lora_B" in n]
    assert len(updates) == 2
    for update in updates:
        moved = update.abs().amax(1) > 0
        assert not moved[keys].any()
        assert int(moved.sum()) == len(update) - len(keys)
    gradient = torch.full_like(updates[0], torch.inf)
    updates[0].grad = None
    (updates[0] * gradient).sum().backward()
    assert updates[0].grad is not None
    assert (updates[0].grad[keys] == 0).all()
    assert torch.isinf(updates[0].grad).any()


def test_other_falcon_modules_train_freely() -> None:
    config = layout("falcon-7b")
    config.num_hidden_layers = 1
    tuned = add_lora(AutoModelForCausalLM.from_config(config), TuneConfig(lora_targets=("dense",)), seed=0)
    ids = torch.randint(0, 50, (2, 9))
    tuned(input_ids=ids, labels=ids).loss.backward()
    (gradient,) = [p.grad for n, p in trainable(tuned).items() if "lora_B" in n]
    assert (gradient.abs().amax(1) > 0).all()


def test_auto_is_the_architecture_s_own(base: Any) -> None:
    tuned = add_lora(base, TuneConfig(lora_targets="auto"), 0)
    assert {part for n in trainable(tuned) for part in n.split(".") if part.endswith("_proj")} == {"q_proj", "v_proj"}
