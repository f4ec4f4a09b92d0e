"""A plan's terms against the memory that torch's allocator hands out in a real pass, on the CPU, for small models."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from rella import plan
from rella.config import TuneConfig
from rella.lm.embedding import mean_pooled
from rella.lm.lean import lean, recomputed
from rella.lm.lora import add_lora
from rella.lm.packed import attention_without_masks
from rella.lm.scoring import answer_logits
from rella.lm.tuning import AnswerModel, Row, answer_inputs
from rella.shapes import shape_of

RNG = np.random.default_rng(0)
ROWS = [Row(RNG.integers(3, 400, n).astype(np.int32), (5, 6)) for n in (120, 120, 120, 118)]
SHAPES: dict[str, dict[str, Any]] = {
    "wide": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 344},
    "grouped": {
        "hidden_size": 128,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 512,
    },
}


def small(name: str, kind: str = "llama") -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {"vocab_size": 400, "max_position_embeddings": 512, "pad_token_id": 0, **SHAPES[name]}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).requires_grad_(False)


def peak(work: Callable[[], object], folder: Path) -> int:
    """The most bytes that were live at a time of those that `work` allocated; it is run once before."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    seen.export_chrome_trace(str(folder / "trace.json"))
    events = [e for e in json.loads((folder / "trace.json").read_text())["traceEvents"] if e.get("name") == "[memory]"]
    sizes = [e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])]
    assert len(sizes) > 100
    return int(np.cumsum(sizes).max())


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("again", ["none", "full", 2])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_tuning(name: str, again: Any, dropout: float, tmp_path: Path) -> None:
    model = add_lora(small(name), TuneConfig(lora_dropout=dropout), 0).train()
    lm = model.get_base_model()
    inputs = answer_inputs(ROWS, 2, torch.device("cpu"))
    with ExitStack() as stack:
        stack.enter_context(attention_without_masks(lm, 200, False))
        stack.enter_context(recomputed(lm, again))
        root = AnswerModel(model)
        root.chosen = stack.enter_context(lean(lm, False))

        def step() -> None:
            model.zero_grad()
            root(*inputs).backward()

        measured = peak(step, tmp_path)
    setting = plan.Setting(4, inputs[0].numel(), len(ROWS), recomputed=again, dropout=dropout, gpu=False)
    terms = plan.tuning_memory(shape_of(lm.config.to_dict()), setting)
    passing = [t for t in terms if "backward" in t.name or "logits" in t.name]
    assert len(passing) == 3
    assert plan.total(passing) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("name", list(SHAPES))
def test_embedding_and_scoring(name: str, tmp_path: Path) -> None:
    lm, tokens = small(name).eval(), 4 * 122
    shape = shape_of(lm.config.to_dict())
    planned = {t.name: t.bytes for t in plan.forward_memory(shape, plan.Setting(4, tokens, gpu=False), head=True)}
    assert planned["weights of the base"] == sum(p.numel() * 4 for p in lm.parameters())
    ids, lengths = torch.full((4, 122), 7), torch.full((4,), 122)

    def embed() -> None:
        with torch.inference_mode():
            mean_pooled(lm.model, 0)(ids, lengths)

    prompts = [np.full(122, 7, dtype=np.int32)] * 4
    assert planned["states of one pass"] == pytest.approx(peak(embed, tmp_path), rel=0.15)
    scored = peak(lambda: answer_logits(lm, prompts, (5, 6), 0), tmp_path)
    assert planned["states of one pass"] == pytest.approx(scored, rel=0.15)
