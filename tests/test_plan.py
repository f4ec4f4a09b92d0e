"""Sizes, memory and time of a plan: against transformers' own models, the paper's figures, and by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rella import plan
from rella.backbones import BACKBONES
from rella.errors import InputError, MissingError
from rella.hardware import CARDS, GIB, read_cluster
from rella.shapes import Shape, shape_of

VICUNA = shape_of(BACKBONES["vicuna-13b"].architecture, "llama")
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 160,
    "vocab_size": 96,
    "pad_token_id": 0,
}
OWN_NAMES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 96},
    "opt": {**SMALL, "ffn_dim": 160, "word_embed_proj_dim": 64},
    "falcon": {**SMALL, "multi_query": True, "new_decoder_architecture": False},
    "gemma3_text": {**SMALL, "head_dim": 16, "num_key_value_heads": 2},
}
GROUPED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "stablelm", "starcoder2", "olmo", "olmo2")


def config_of(kind: str) -> Any:
    from transformers import AutoConfig

    fields = OWN_NAMES.get(kind, SMALL)
    if kind in GROUPED:
        fields = {**fields, "num_key_value_heads": 2}
    if kind in ("gemma", "gemma2"):
        fields = {**fields, "head_dim": 16}
    return AutoConfig.for_model(kind, **fields)


@pytest.mark.parametrize("kind", [*GROUPED, *OWN_NAMES, "phi", "gpt_neox"])
def test_the_weights_are_those_of_transformers(kind: str) -> None:
    from transformers import AutoModel
    from transformers.pytorch_utils import Conv1D

    config = config_of(kind)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | Conv1D))
    assert shape_of(config.to_dict()).matmul_parameters == matrices


@pytest.mark.parametrize("name", list(BACKBONES))
def test_the_backbones_have_their_published_sizes(name: str) -> None:
    published = {"vicuna-7b": 6_738_415_616, "vicuna-13b": 13_015_864_320, "mistral-7b": 7_241_732_096,
                 "falcon-7b": 6_921_720_704, "llama-2-70b-chat": 68_976_648_192}  # fmt: skip
    shape = shape_of(BACKBONES[name].architecture, BACKBONES[name].model_type)
    assert shape.parameters(True) == pytest.approx(published[name], rel=0.005)
    if name.startswith(("vicuna", "llama", "mistral")):
        assert shape.parameters(True) == published[name]


def test_lora_s_parameters_are_the_paper_s() -> None:
    assert VICUNA.lora_parameters(8, VICUNA.targets("auto")) == 6_553_600
    assert VICUNA.lora_parameters(8, ("q_proj",)) * 2 == 6_553_600
    with pytest.raises(InputError, match=r"--tune.lora-targets wq: a plan knows q_proj"):
        VICUNA.lora_parameters(8, ("wq",))


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(InputError, match=r"model type 'mamba'; it knows falcon"):
        shape_of({"model_type": "mamba", "hidden_size": 8})
    with pytest.raises(InputError, match=r"has no num_hidden_layers"):
        shape_of({"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2})


@pytest.mark.parametrize(
    ("said", "nodes", "gpus", "card"),
    [("8xv100-32gb", 1, 8, "v100-32gb"), ("2 x 8 x A100-80GB", 2, 8, "a100-80gb"), ("1xh200", 1, 1, "h200")],
)
def test_clusters_in_words(said: str, nodes: int, gpus: int, card: str) -> None:
    found = read_cluster(said)
    assert (found.nodes, found.gpus, found.card, found.workers) == (nodes, gpus, card, nodes * gpus)
    assert found.each == CARDS[card]


def test_clusters_in_files(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("card: mine\ngpus: 4\nmemory_gib: 20\ntflops: 50.5\nbf16: false\n")
    found = read_cluster(str(file))
    assert (found.workers, found.each.memory_gib, found.each.tflops, found.each.bf16) == (4, 20.0, 50.5, False)
    file.write_text("card: mine\ngpu: 4\n")
    with pytest.raises(InputError, match="gpu"):
        read_cluster(str(file))
    with pytest.raises(MissingError, match=r"there is no such file"):
        read_cluster(str(tmp_path / "d.yaml"))


@pytest.mark.parametrize("said", ["v100", "8xv999", "0xh100", "8x", "-1xh100"])
def test_clusters_that_are_none(said: str) -> None:
    with pytest.raises(InputError, match=r"--plan"):
        read_cluster(said).each


def test_the_terms_of_vicuna_13b_by_hand() -> None:
    """One worker, 5,000 tokens in a pass of 7 rows, everything kept: the arithmetic of docs/engine.md, written out."""
    setting = plan.Setting(2, 5000, rows=7)
    found = {t.name: t.bytes for t in plan.tuning_memory(VICUNA, setting)}
    h, i, layer = 5120, 13824, 0
    # Input and norm; queries, keys, values, attention's result; the residual; gate and up, in 16 bit.
    layer += 2 * (2 * h + 4 * h + h + 2 * i)
    # Two masks of a byte, two products of rank 8, the norms' scales, attention's normaliser of 40 heads.
    layer += 2 * h + 2 * 2 * 8 + 4 + 4 + 40 * 4
    assert plan.kept_per_token(VICUNA, setting) == layer
    assert found["activations kept for the backward pass"] == 5000 * 39 * layer
    assert found["weights of the base"] == 2 * 13_015_864_320
    assert found["LoRA weights and gradients"] == 6 * 6_553_600
    assert found["float32 masters and Adam's moments"] == 12 * 6_553_600
    assert found["logits at the answers"] == 14 * 32_000 * 16


def test_sharding_and_recomputing_take_less() -> None:
    kept = plan.Setting(2, 5000, rows=7, workers=8)
    peak = {
        name: plan.total(plan.tuning_memory(VICUNA, replace(kept, **changes)))
        for name, changes in {
            "kept": {},
            "half": {"recomputed": 2},
            "again": {"recomputed": "full"},
            "sharded": {"zero_stage": 3},
            "both": {"zero_stage": 3, "recomputed": "full"},
        }.items()
    }
    assert peak["kept"] > peak["half"] > peak["again"] > peak["both"]
    saved = peak["kept"] - peak["sharded"]
    assert saved == pytest.approx(2 * 13_015_864_320 * 7 / 8 - 2 * 10**9, rel=0.01)


def test_changes_fit_and_nothing_larger_does() -> None:
    setting = plan.Setting(2, 5000, rows=7, workers=8)
    room = int(31.7 * GIB)
    assert plan.total(plan.tuning_memory(VICUNA, setting)) > room
    changes = plan.tuning_changes(VICUNA, setting, room, longest=800)
    assert [c.flags.split()[0] for c in changes] == [
        "--tune.micro-batch-tokens",
        "--tune.gradient-checkpointing",
        "--tune.micro-batch-tokens",
        "--tune.gradient-checkpointing",
    ]
    assert all(c.bytes <= room for c in changes)
    tokens = int(changes[0].flags.split()[1])
    rows = max(1, round(7 * (tokens + 1) / 5000))
    assert plan.total(plan.tuning_memory(VICUNA, replace(setting, tokens=tokens + 1, rows=rows))) > room
    # Weights that fit nowhere leave sharding alone.
    small = plan.tuning_changes(VICUNA, setting, int(15.8 * GIB), longest=800)
    assert small
    assert all("--tune.zero-stage 3" in c.flags for c in small)
    alone = replace(setting, workers=1)
    assert plan.tuning_changes(VICUNA, alone, int(15.8 * GIB), longest=800) == []


def test_time_is_arithmetic_over_the_card_s_rate() -> None:
    work = plan.Work(1000, np.array([100, 300]))
    assert work.tokens == 200_000
    assert work.pairs == 1000 * (100 * 101 / 2 + 300 * 301 / 2) / 2
    forward = 2 * VICUNA.matmul_parameters * 200_000 + 4 * 5120 * 40 * work.pairs
    assert plan.forward_flops(VICUNA, work) == pytest.approx(forward)
    kept = plan.tuning_flops(VICUNA, work, plan.Setting(2, 1000))
    again = plan.tuning_flops(VICUNA, work, plan.Setting(2, 1000, recomputed="full"))
    assert again - kept == pytest.approx(forward)
    assert plan.seconds(1e15, "score", CARDS["h100"], 4) == pytest.approx(1e15 / (4 * 989e12 * 0.55))


def test_a_shape_with_few_key_heads_keeps_less() -> None:
    whole = Shape("llama", 256, 4, 8, 8, 32, 688, 1000, False)
    grouped = replace(whole, kv_heads=2)
    setting = plan.Setting(4, 100)
    saved = plan.kept_per_token(whole, setting) - plan.kept_per_token(grouped, setting)
    assert saved == 4 * 2 * (256 - 64)
