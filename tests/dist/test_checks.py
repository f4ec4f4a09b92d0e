"""Room that a stage asks for, before it starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rella.config import Experiment, RetrieveConfig
from rella.dist.checks import SPARE_BYTES, space_needed
from rella.models import ModelIdentity
from rella.pipeline import build

MODEL = ModelIdentity("toy", "/models/toy", None, "0" * 64, 4096, 2048, "llama")
FACTS = {"items": 62_423, "samples": 24_187_390, "train": 19_349_912, "valid": 2_418_739, "test": 2_418_739}


@pytest.mark.parametrize(
    ("stage", "changes", "expected"),
    [
        ("prepare", {}, 0),
        ("embed", {}, 62_423 * 4096 * 4),
        ("pca", {}, 62_423 * 512 * 4),
        ("pca", {"pca_dim": "none"}, 62_423 * 4096 * 4),
        ("retrieve", {}, 24_187_390 * 80 * 2 * 2),
        ("retrieve", {"retrieve": RetrieveConfig(samples="test:100")}, 0),
        ("reit", {}, 0),
        ("score", {}, 2_418_739 * 32),
        ("score", {"test_rows": 1000}, 1000 * 32),
    ],
)
def test_the_room_that_a_stage_asks_for(stage: str, changes: dict[str, Any], expected: int) -> None:
    pipeline = build(replace(Experiment(), **changes), {"raw": "a"}, MODEL)
    found = {s.name: s for s in pipeline.stages()}[stage]
    assert space_needed(found, pipeline.experiment, FACTS, 4096) == expected + SPARE_BYTES
