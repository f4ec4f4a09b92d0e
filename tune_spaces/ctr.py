"""Appendix C.1: what the paper chooses the settings of the eight ID-based baselines from.

Learning rate 1e-3, AdamW and ReLU are the same everywhere. A data set of your own has MovieLens's choices.
"""

from __future__ import annotations

METRIC = "valid_auc"
MODE = "max"

Choices = dict[str, tuple[float, ...]]
"""Field of the experiment → the values that it may have."""

_DROPOUT = (0.0, 0.1, 0.2)
_SHALLOW, _DEEP = (1, 2, 3), (3, 6, 9, 12)
_MOVIELENS_SIZES = (64, 128, 256)


def space(dataset: str, model: str) -> Choices:
    """Return the choices for one baseline on one data set, by field of the experiment.

    Args:
        dataset: `bookcrossing`, or another.
        model: as in `baseline.model`.

    Raises:
        KeyError: no such ID-based baseline.
    """
    small = dataset == "bookcrossing"
    common = {
        "embedding_dim": (8, 16, 32) if small else (32, 64),
        "dropout": _DROPOUT,
        "batch_size": (32, 64) if small else (256, 512),
    }
    own = (_bookcrossing() if small else _movielens())[model]
    return {f"baseline.{name}": values for name, values in {**common, **own}.items()}


def _bookcrossing() -> dict[str, Choices]:
    dnn: Choices = {"dnn_layers": _SHALLOW, "dnn_size": (32, 64)}
    deep: Choices = {"dnn_layers": _SHALLOW, "dnn_size": (32, 64, 128)}
    return {
        "deepfm": deep,
        "autoint": {"attention_layers": (1, 2), "attention_size": (32,)},
        "dcnv2": {**deep, "cross_layers": _SHALLOW},
        "gru4rec": {"gru_layers": _SHALLOW, "gru_size": (32, 64), "dnn_size": (32, 64)},
        "caser": {**_kernels(), **dnn},
        "sasrec": {**_self_attention((32, 64, 128)), **dnn},
        "din": {"attention_layers": _SHALLOW, **dnn},
        "sim": {"attention_layers": _SHALLOW, **dnn},
    }


def _movielens() -> dict[str, Choices]:
    dnn: Choices = {"dnn_layers": _SHALLOW, "dnn_size": _MOVIELENS_SIZES}
    deep: Choices = {"dnn_layers": _DEEP, "dnn_size": (128, 256)}
    return {
        "deepfm": deep,
        "autoint": {"attention_layers": _DEEP, "attention_size": _MOVIELENS_SIZES},
        "dcnv2": {**deep, "cross_layers": _DEEP},
        "gru4rec": {"gru_layers": _SHALLOW, "gru_size": _MOVIELENS_SIZES, "dnn_size": _MOVIELENS_SIZES},
        "caser": {**_kernels(), **dnn},
        "sasrec": {**_self_attention(_MOVIELENS_SIZES), **dnn},
        "din": {"attention_layers": _SHALLOW, **dnn},
        "sim": {"attention_layers": _SHALLOW, **dnn},
    }


def _kernels() -> Choices:
    return {"vertical_kernels": (2, 4, 8), "horizontal_kernels": (4, 8, 16)}


def _self_attention(sizes: tuple[int, ...]) -> Choices:
    return {"attention_heads": (1, 2, 4), "attention_layers": _SHALLOW, "attention_size": sizes}
