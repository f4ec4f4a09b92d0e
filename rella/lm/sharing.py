"""Parameters of which every process holds a part (DeepSpeed's ZeRO-3), in full for as long as they are looked at."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn


def is_split(module: nn.Module) -> bool:
    """Return whether a module's weights are split over processes."""
    return any(hasattr(p, "ds_id") for p in module.parameters())


def whole(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """Within, split parameters are there in full, on all processes together; others always are."""
    split = [p for p in parameters if hasattr(p, "ds_id")]
    if not split:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    found: AbstractContextManager[Any] = GatheredParameters(split)
    return found
