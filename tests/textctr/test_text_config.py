"""The paper's values, typed from Appendix C.2."""

from __future__ import annotations

from dataclasses import replace

from rella.baselines import TEXT_BASELINES, TextBaselineConfig, mlm_stage, text_baseline
from rella.config import leaves


def test_appendix_c2() -> None:
    """The paper's values, typed from it."""
    names = ("base", "learning_rate", "warmup", "batch_size", "max_epochs", "clip", "max_tokens")
    assert {m: tuple(getattr(text_baseline(m), n) for n in names) for m in TEXT_BASELINES} == {
        "ctr-bert": ("bert-base-uncased", 5e-5, 0.05, 1024, 10, None, 512),
        "ptab": ("bert-base-uncased", 5e-5, 0.01, 1024, 10, None, 512),
        "p5": ("t5-base", 5e-4, 0.05, 32, 10, 1.0, 1024),
    }
    stage_a = mlm_stage(replace(text_baseline("ptab"), patience=3))
    assert (stage_a.learning_rate, stage_a.warmup, stage_a.batch_size, stage_a.max_epochs) == (5e-5, 0.05, 1024, 10)
    assert stage_a.patience is None
    stages = {name: set(of) for name, _, of in leaves(TextBaselineConfig())}
    assert {name for name, of in stages.items() if of == {"mlm"}} == {
        "mlm_probability",
        "mlm_learning_rate",
        "mlm_warmup",
        "mlm_batch_size",
        "mlm_epochs",
    }
    assert {name for name, of in stages.items() if not of} == {
        "base",
        "revision",
        "micro_batch_tokens",
        "batch_tokens",
        "checkpoint_seconds",
    }
