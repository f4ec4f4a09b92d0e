"""Quantised bases in lean tuning: losses and LoRA's gradients are those of bitsandbytes' and PEFT's own modules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rella import plan
from rella.config import TuneConfig
from rella.lm.frozen import full_weight, quantized_types
from rella.lm.loading import load_base
from rella.lm.lora import add_lora
from rella.lm.tuning import AnswerModel, answer_inputs
from rella.models import identify
from rella.shapes import shape_of
from tests.lm.test_lean import mode, nothing, ours, plain
from tests.lm.test_plan_memory import ROWS, peak, small

bits = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
CPU = torch.device("cpu")
KINDS = ("int8", "nf4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer

    from rella.models import TINY

    path = tmp_path_factory.mktemp("base")
    small("wide").save_pretrained(path)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(path)
    return path


def tuned(folder: Path, kind: Any, precision: Any = "float32", dropout: float = 0.0) -> Any:
    base = load_base(identify(str(folder)), precision, CPU, quantize=kind)
    model = add_lora(base, TuneConfig(lora_dropout=dropout), 0).train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(base.dtype)  # as DeepSpeed holds them
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("layers", ["none", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_their_own_modules(folder: Path, kind: str, layers: Any) -> None:
    model = tuned(folder, kind)
    right, wanted = plain(model)
    found, got = ours(model, False, layers)
    assert found == pytest.approx(right, rel=1e-5)
    assert len(wanted) == 16
    for name, gradient in wanted.items():
        assert float(gradient.abs().max()) > 1e-4, f"{name} would prove nothing"
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_weight_is_what_the_layer_multiplies_with(folder: Path, kind: str) -> None:
    model = tuned(folder, kind)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    assert type(layer) in quantized_types()[0]
    unit = torch.eye(128)
    for _ in range(2):  # before and after the first pass, which moves an 8-bit layer's numbers
        weight = full_weight(layer, torch.float32)
        assert weight.shape == (344, 128)
        # 8-bit layers round their input too, to 1/127 of its largest number.
        torch.testing.assert_close(layer(unit), weight.t(), atol=1e-2 * float(weight.abs().max()), rtol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_may_return_a_view(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As they do on a card: autograd forbids adding in place to a view that a function of ours returns.
    model = tuned(folder, kind)
    own, _ = ours(model, False, "none")
    for layer in quantized_types()[0]:
        forward = layer.forward
        rows = lambda self, x, forward=forward: forward(self, x).flatten(0, -2).view(*x.shape[:-1], -1)  # noqa: E731
        monkeypatch.setattr(layer, "forward", rows)
    assert ours(model, False, "none")[0] == own


def test_an_int8_product_is_in_the_plan_of_a_card() -> None:
    shape = shape_of(small("wide").config.to_dict())
    setting = plan.Setting(2, 1000, 4, quantize="int8")
    names = {term.name: term.bytes for term in plan.tuning_memory(shape, setting)}
    assert names["an int8 product in 32 bits"] == 1000 * 344 * 4
    assert not any("32 bits" in t.name for t in plan.tuning_memory(shape, replace(setting, quantize="nf4")))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_memory_is_the_plan_s(folder: Path, kind: Any, dropout: float, tmp_path: Path) -> None:
    model, found = tuned(folder, kind, dropout=dropout), {}
    inputs = answer_inputs(ROWS, 2, CPU)
    for name, context in (("lean", mode(model, False, "none")), ("theirs", nothing())):
        with context as chosen:
            root = AnswerModel(model)
            root.chosen = chosen

            def step(root: AnswerModel = root) -> None:
                model.zero_grad()
                root(*inputs).backward()

            found[name] = peak(step, tmp_path)
    setting = plan.Setting(4, inputs[0].numel(), len(ROWS), dropout=dropout, gpu=False, quantize=kind)
    terms = plan.tuning_memory(shape_of(model.get_base_model().config.to_dict()), setting)
    passing = plan.total([t for t in terms if "backward" in t.name or "logits" in t.name])
    print(kind, dropout, found, passing, passing / found["lean"])
    assert found["lean"] < 0.8 * found["theirs"]
    assert passing == pytest.approx(found["lean"], rel=0.15)
