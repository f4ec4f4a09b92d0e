"""The stages of every experiment, and how a field says whose result it changes."""

from __future__ import annotations

from typing import Literal

Precision = Literal["float32", "float16", "bfloat16"]
Auto = Literal["auto"]

STAGES = ("prepare", "embed", "pca", "retrieve", "reit", "baseline", "score")
"""In the order in which they run."""
PREPARE, EMBED, PCA, RETRIEVE, REIT, BASELINE, SCORE = STAGES
MLM, TEXTCTR = TEXT_STAGES = ("mlm", "textctr")
"""What an LM-based baseline makes: PTab's further pre-trained encoder, and the fitted model with its scores."""


def changes(*stages: str) -> dict[str, tuple[str, ...]]:
    """Return the metadata of a field that changes the result of these stages; it enters their keys."""
    return {"stages": stages}
