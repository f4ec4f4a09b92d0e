"""One base over several processes, each of which holds a part of every weight: for bases that no single card holds.

DeepSpeed's ZeRO-3 without an optimiser: a layer's weights are gathered when its turn comes and dropped behind it, so
every process reads its own rows and adapters work as ever. All processes make the same passes at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rella.errors import InputError
from rella.lm.loading import DTYPES, check_precision, quiet_libraries
from rella.models import ModelIdentity
from rella.stages import Precision, Quantize

WHOLE_BELOW = 4
"""Weights of at most this many times the hidden size (norms, biases) are not split."""


def load_split_base(
    model: ModelIdentity,
    precision: Precision,
    device: torch.device,
    head: bool = True,
    quantize: Quantize = "none",
) -> Any:  # noqa: ANN401 - transformers is untyped here
    """Return the frozen base, its weights split over the default process group as they are read.

    Every process of the group calls this at the same time, and later the model's `forward` as often as the others.

    Args:
        model: which one.
        precision: dtype of its weights.
        device: of this process.
        head: with the LM head or without.
        quantize: must be `none`.

    Raises:
        InputError: quantised weights, which cannot be split; bfloat16 on a card that has none.
    """
    if quantize != "none":
        raise InputError(
            f"quantize {quantize}: bitsandbytes' weights cannot be split over workers: take --quantize none, or "
            "--cluster.base-workers 1"
        )
    check_precision(precision, device)
    import deepspeed
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    settings = _settings(precision, model.hidden_size)
    # While this object lives, transformers splits what it reads.
    reading = HfDeepSpeedConfig(settings)
    kind = AutoModelForCausalLM if head else AutoModel
    with quiet_libraries():
        loaded = kind.from_pretrained(
            model.place, revision=model.revision, dtype=DTYPES[precision], trust_remote_code=False
        )
    del reading
    loaded.config.use_cache = False
    loaded.requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=loaded, config=settings)
    return engine.module.eval()


def _settings(precision: Precision, hidden: int) -> dict[str, Any]:
    zero = {"stage": 3, "stage3_param_persistence_threshold": WHOLE_BELOW * hidden}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "fp16": {"enabled": precision == "float16"},
        "bf16": {"enabled": precision == "bfloat16"},
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},
    }


def held_weights(module: nn.Module) -> tuple[int, int]:
    """Return how many weights this process holds, and how many there are."""
    both = [_held(p) for p in module.parameters()]
    return sum(held for held, _ in both), sum(count for _, count in both)


def _held(parameter: Any) -> tuple[int, int]:  # noqa: ANN401 - what ZeRO-3 adds to a parameter is untyped
    if not hasattr(parameter, "ds_id"):
        return parameter.numel(), parameter.numel()
    away = parameter.numel() == 0
    return parameter.ds_tensor.numel() if away else parameter.numel(), parameter.ds_numel


def most_passes(passes: int) -> int:
    """Return how many passes the process of the group makes that makes most."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    count = torch.tensor([passes], device=device)
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    return int(count)


def own_rows(start: int, stop: int) -> tuple[int, int, int]:
    """Return this process's rows [first, last) of [start, stop), and how many of them others have before it.

    All processes have equally many, which makes them call `forward` together, so the last ones' may overlap.
    """
    world = dist.get_world_size()
    each = -(-(stop - start) // world)
    wanted = start + dist.get_rank() * each
    first = min(wanted, stop - each)
    return first, first + each, min(wanted - first, each)


def collected(found: Any) -> Sequence[Any]:  # noqa: ANN401
    """Return what every process found, by rank, on the first one; nothing on the others."""
    everything: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(found, everything)
    return everything or ()
