"""Complexity (Appendix D.2, Table 6), measured: parameters, what of them is trained, time of a batch.

Both kinds of model are timed from ids on the host to logits there, through what scoring runs; preparing a batch is left
out, as a thread does it ahead of the device.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import nn

from rella.ctr.batches import Batches
from rella.ctr.models import parameters
from rella.errors import InputError
from rella.lm.encoding import Ids
from rella.lm.norms import fused_norms
from rella.lm.passes import TokenBudget
from rella.lm.scoring import answer_logits, causal_lm


@dataclass(frozen=True)
class Complexity:
    """One row of Table 6."""

    name: str
    parameters: int
    """All of them; an adapter's are counted with its base's."""
    trainable: int
    """Those that the optimiser holds when the model is tuned or fitted; 0 of a base without an adapter."""
    milliseconds: float
    """Median time of a batch."""
    batch: int
    """Rows of a batch."""
    batches: int
    """Measured batches."""
    device: str
    what: str
    """What one batch is."""


def measure(step: Callable[[], object], device: torch.device, batches: int = 50, warm_up: int = 5) -> float:
    """Return the median time of a step in milliseconds; each is over when the device has done it.

    Args:
        step: one batch.
        device: where it computes; a card is waited for before and behind every step.
        batches: measured steps, at least 1.
        warm_up: steps before them that are not counted.

    Raises:
        InputError: nothing to measure.
    """
    if batches < 1 or warm_up < 0:
        raise InputError(f"{batches} measured batches after {warm_up}: it takes at least 1 after 0")
    for _ in range(warm_up):
        step()
    seconds: list[float] = []
    for _ in range(batches):
        _wait(device)
        started = time.perf_counter()
        step()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds)


def lm_complexity(
    name: str,
    model: Any,  # noqa: ANN401 - transformers is untyped here
    prompts: Sequence[Ids],
    pair: tuple[int, int],
    pad: int,
    batch: int = 4,
    batches: int = 50,
    warm_up: int = 5,
) -> Complexity:
    """Return what scoring with an LM takes (Table 6): `answer_logits` of `batch` prompts at a time.

    A card computes a batch in one pass; a CPU in passes of at most `rella.lm.passes.CPU_TOKENS`, as it does in scoring.

    Args:
        name: of the row.
        model: a base of `load_base`, or one with LoRA layers, attached (`attach_adapter`) or fresh (`add_lora`).
        prompts: token ids of wrapped prompts; their whole batches are taken in order, again and again.
        pair: vocabulary indices of "Yes" and "No".
        pad: any token id.
        batch: prompts of a batch; the paper's is 4.
        batches: as in `measure`.
        warm_up: as there.

    Raises:
        InputError: too few prompts for a batch, or a batch that does not fit into the device's memory.
    """
    starts = _whole_batches(len(prompts), batch, "prompts")
    groups = [prompts[start : start + batch] for start in starts]
    padded = max(batch * max(map(len, group)) for group in groups)
    budget, turns, lm = TokenBudget(padded, "complexity", "batch"), cycle(groups), causal_lm(model)
    device = lm.get_output_embeddings().weight.device
    # Scoring makes the norms ready once for many batches, not for each.
    with fused_norms(lm):
        took = measure(
            lambda: answer_logits(model, next(turns), pair, pad, budget, bucketing=False), device, batches, warm_up
        )
    if budget.tokens < padded:
        raise InputError(f"a batch of {batch} prompts, {padded:,} tokens, does not fit into the memory: lower it")
    mean = sum(len(p) for group in groups for p in group) / (batch * len(groups))
    what = f"{batch} prompts of {mean:.0f} tokens on average, from token ids to the logits of Yes and No"
    return Complexity(name, *lm_parameters(model), took, batch, batches, device_name(device), what)


def ctr_complexity(
    name: str, model: nn.Module, samples: Batches, batch: int = 512, batches: int = 50, warm_up: int = 5
) -> Complexity:
    """Return what scoring with a CTR model takes (Table 6): its forward pass as in `rella.ctr.fit.predict`.

    Args:
        name: of the row.
        model: of `rella.ctr.models.build`, where it scores; its mode (train or eval) is as before afterwards.
        samples: S samples; their whole batches are taken in order, again and again. Only with `pinned` does a copy to a
            card not wait.
        batch: samples of a batch; the paper's is 512.
        batches: as in `measure`.
        warm_up: as there.

    Raises:
        InputError: too few samples for a batch.
    """
    starts = _whole_batches(len(samples), batch, "samples")[: batches + warm_up]
    turns = cycle([samples.take(np.arange(start, start + batch)) for start in starts])
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with torch.inference_mode():
            took = measure(lambda: model(next(turns).to(device)).float().cpu().numpy(), device, batches, warm_up)
    finally:
        model.train(was_training)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    what = f"{batch} samples of at most {samples.k} behaviours, from feature ids to logits"
    return Complexity(name, parameters(model), trainable, took, batch, batches, device_name(device), what)


def lm_parameters(model: Any) -> tuple[int, int]:  # noqa: ANN401
    """Return the number of an LM's parameters, and of those that tuning trains (Table 6).

    LoRA's count as trained also where they are attached to be scored with, and frozen. In Falcon's fused projections
    the optimiser holds the keys' rows too, which stay at zero.

    Args:
        model: as in `lm_complexity`; 4-bit weights are counted one by one, whatever they are packed into.
    """
    counts = [(_count(p), p.requires_grad or ".lora_" in n) for n, p in model.named_parameters()]
    return sum(n for n, _ in counts), sum(n for n, trained in counts if trained)


def device_name(device: torch.device) -> str:
    """Return a card's name, or the number of threads on a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _count(parameter: Any) -> int:  # noqa: ANN401
    packed = getattr(parameter, "quant_state", None)
    return int(parameter.numel()) if packed is None else math.prod(packed.shape)


def _whole_batches(rows: int, batch: int, what: str) -> range:
    """Return where the batches that are full begin."""
    if batch < 1 or rows < batch:
        raise InputError(f"a batch of {batch} out of {rows} {what}: it takes at least 1, and as many {what}")
    return range(0, rows - batch + 1, batch)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
