"""The stages of every experiment, and how a field says whose result it changes."""

from __future__ import annotations

from typing import Literal

Precision = Literal["float32", "float16", "bfloat16"]
Quantize = Literal["none", "int8", "nf4"]
Auto = Literal["auto"]

STAGES = ("prepare", "embed", "pca", "retrieve", "reit", "baseline", "mlm", "textctr", "score")
"""In the order in which they run. An LM-based baseline makes two of them in place of `baseline`: `mlm`, PTab's encoder
after its further pre-training, and `textctr`, the fitted model."""
PREPARE, EMBED, PCA, RETRIEVE, REIT, BASELINE, MLM, TEXTCTR, SCORE = STAGES


def changes(*stages: str) -> dict[str, tuple[str, ...]]:
    """Return the metadata of a field that changes the result of these stages; it enters their keys."""
    return {"stages": stages}
