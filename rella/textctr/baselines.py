"""The three baselines by name: the model that a fit trains and that scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rella.baselines import TextBaseline, TextBaselineConfig
from rella.models import ModelIdentity
from rella.textctr.ctr_bert import load_ctr_bert
from rella.textctr.model import ScoringModel
from rella.textctr.p5 import load_p5
from rella.textctr.ptab import load_ptab


def load_baseline(
    baseline: TextBaseline,
    model: ModelIdentity,
    tokenizer: Any,  # noqa: ANN401 - transformers is untyped here
    config: TextBaselineConfig,
    seed: int,
    device: torch.device,
) -> ScoringModel[Any]:
    """Return a baseline before its fit, float32 on `device`; `put_weights` turns it into a fitted one.

    Args:
        baseline: which one; PTab's is stage B's model.
        model: the base model; for PTab's fit, stage A's folder.
        tokenizer: its tokenizer.
        config: dropout, limits and precision.
        seed: of weights that are not pretrained.
        device: a CPU or one GPU.

    Raises:
        MissingError: the model cannot be loaded.
        InputError: it is not of the kind that the baseline is built on.
    """
    load: dict[TextBaseline, Callable[..., ScoringModel[Any]]] = {
        "ctr-bert": load_ctr_bert,
        "ptab": load_ptab,
        "p5": load_p5,
    }
    return load[baseline](model, tokenizer, config, seed, device)
