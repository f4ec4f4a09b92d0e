"""Small models learn a planted signal, from their own loading code to their own scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rella.baselines import TextBaselineConfig, mlm_stage
from rella.metrics import evaluate
from rella.models import ModelIdentity, identify
from rella.textctr.ctr_bert import load_ctr_bert
from rella.textctr.examples import TextExamples
from rella.textctr.p5 import load_p5
from rella.textctr.predict import predict
from rella.textctr.ptab import load_masked_lm, load_ptab
from tests.textctr.planted import Planted, fitted, sequences

CPU = torch.device("cpu")
LEARN = TextBaselineConfig(
    batch_size=16,
    max_epochs=12,
    dropout=0.0,
    learning_rate=4e-3,
    valid_per_epoch=2,
    precision="float32",
    micro_batch_tokens=10_000,
    batch_tokens=4000,
    max_tokens=128,
)


def test_ctr_bert_learns(bert: ModelIdentity, bert_tokenizer: Any) -> None:
    train, valid = (Planted.rows(n, seed).pairs(bert_tokenizer) for n, seed in ((400, 0), (100, 1)))
    model = load_ctr_bert(bert, bert_tokenizer, LEARN, 0, CPU)
    found = fitted(model, train, LEARN, valid)
    assert max(v["auc"] for v in found.course.valid) > 0.95
    assert evaluate(valid.labels, predict(model, valid, 4000).probability).auc > 0.95


def test_ptab_learns_in_both_stages(bert: ModelIdentity, bert_tokenizer: Any, tmp_path: Path) -> None:
    config = replace(LEARN, mlm_epochs=8, mlm_batch_size=16, mlm_learning_rate=4e-3, mlm_probability=0.3)
    rows = sequences(160, 0)
    stage_a = load_masked_lm(bert, bert_tokenizer, config, 0, CPU)
    found = fitted(stage_a, TextExamples(rows, np.full(160, np.nan)), mlm_stage(config))
    losses = found.course.losses
    assert len(losses) == 80
    assert found.course.best_step == 80
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:3])
    stage_a.save(bert_tokenizer, tmp_path / "a")
    train, valid = (Planted.rows(n, seed).texts(bert_tokenizer) for n, seed in ((400, 0), (100, 1)))
    model = load_ptab(identify(str(tmp_path / "a")), bert_tokenizer, config, 0, CPU)
    assert max(v["auc"] for v in fitted(model, train, config, valid).course.valid) > 0.95


def test_p5_learns(t5: ModelIdentity, t5_tokenizer: Any) -> None:
    train, valid = (Planted.rows(n, seed).texts(t5_tokenizer) for n, seed in ((400, 0), (100, 1)))
    config = replace(LEARN, clip=1.0)
    model = load_p5(t5, t5_tokenizer, config, 0, CPU)
    found = fitted(model, train, config, valid)
    assert max(v["auc"] for v in found.course.valid) > 0.95
    assert found.course.losses[-1] < 0.5 * found.course.losses[1]
