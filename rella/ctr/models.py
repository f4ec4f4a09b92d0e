"""The eight models by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from rella.baselines import BaselineConfig
from rella.ctr.autoint import AutoInt
from rella.ctr.caser import Caser
from rella.ctr.dcnv2 import DCNv2
from rella.ctr.deepfm import DeepFM
from rella.ctr.din import DIN
from rella.ctr.features import Features, FeatureSpace
from rella.ctr.gru4rec import GRU4Rec
from rella.ctr.sasrec import SASRec
from rella.ctr.sim import SIM
from rella.errors import InputError

MODELS = ("deepfm", "autoint", "dcnv2", "gru4rec", "caser", "sasrec", "din", "sim")
"""The models that `build` knows, in the order of Table 2."""
_SIZES = (
    "embedding_dim",
    "dnn_size",
    "cross_layers",
    "attention_layers",
    "attention_size",
    "attention_heads",
    "gru_layers",
    "gru_size",
    "vertical_kernels",
    "horizontal_kernels",
)


def build(config: BaselineConfig, features: Features | FeatureSpace, k: int, seed: int | None = None) -> nn.Module:
    """Return an untrained model, `Batch → (B,) logits`, on the CPU.

    Args:
        config: the model and its sizes.
        features: of the data set, or their layout.
        k: K, behaviours of a history at most.
        seed: of its weights, which are then the same on every machine; None draws from torch's global generator.

    Raises:
        InputError: no such model, or sizes that make none.
    """
    _check(config, k)
    space = features.space if isinstance(features, Features) else features
    made: dict[str, Callable[[], nn.Module]] = {
        "deepfm": lambda: DeepFM(space, config),
        "autoint": lambda: AutoInt(space, config),
        "dcnv2": lambda: DCNv2(space, config),
        "gru4rec": lambda: GRU4Rec(space, config),
        "caser": lambda: Caser(space, config, k),
        "sasrec": lambda: SASRec(space, config, k),
        "din": lambda: DIN(space, config),
        "sim": lambda: SIM(space, config, k),
    }
    if config.model not in made:
        raise InputError(f"{config.model!r} is no ID-based model; these are {', '.join(MODELS)}")
    if seed is None:
        return made[config.model]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return made[config.model]()


def parameters(model: nn.Module) -> int:
    """Return how many parameters a model has (Table 6), the padding's row included."""
    return sum(p.numel() for p in model.parameters())


def _check(config: BaselineConfig, k: int) -> None:
    small = [name for name in _SIZES if getattr(config, name) < 1]
    if small or config.dnn_layers < 0 or k < 1:
        raise InputError(f"{small[0] if small else 'dnn_layers' if k > 0 else 'k'} is too small: take at least 1")
    if not 0 <= config.dropout < 1:
        raise InputError(f"dropout is {config.dropout}; it must be at least 0 and below 1")
    if config.attention_size % config.attention_heads:
        raise InputError(
            f"attention_size {config.attention_size} does not divide into {config.attention_heads} attention_heads"
        )
