"""What an experiment takes on a cluster, before anything starts: memory term by term, time, and what would fit.

Pure arithmetic. Memory is a worker's peak on its card; every term says how it came about, so that it can be checked by
hand. The activations of LoRA tuning are those that `rella.lm.lean` keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from rella.hardware import GIB, Card
from rella.shapes import Shape
from rella.stages import Quantize

Lengths = npt.NDArray[np.int64]

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
CONTEXT_GIB = 1.0
"""A CUDA context with the kernels that passes load: 0.7 to 0.95 GiB on an H200."""
GROUP_GIB = 1.8
"""The same where NCCL and DeepSpeed are at work too: 1.7 GiB on an H200."""
SLACK = 0.05
"""Of what is allocated beside the base's weights: fragments, and buffers of the libraries."""
QUANTIZED = {"int8": 1.0, "nf4": 0.516}
"""Bytes of a quantised weight: 8 bits, or 4 with the scales of blocks of 64, which are quantised too."""
LIVE_PARAMETERS = 10**9
"""Weights that ZeRO-3 keeps gathered at a time, at most: DeepSpeed's default."""
SHARE_OF_PUBLISHED = {"embed": 0.54, "reit": 0.46, "score": 0.55}
"""Arithmetic of the real tokens over the published dense rate, as measured on an H100 with Vicuna-13B's shape in
bfloat16 (docs/engine.md); other cards are assumed to reach the same share."""
READING = 1e9
"""Bytes per second at which weights come from a disk."""
PAIR_SECONDS = 17.5e-9
"""Of one core for a (target, earlier behaviour) pair: 512 dimensions, 59,047 items (docs/retrieval.md)."""


@dataclass(frozen=True)
class Term:
    """One contribution to a worker's memory."""

    name: str
    bytes: int
    how: str
    """The arithmetic."""


@dataclass(frozen=True)
class Setting:
    """What decides a worker's memory, beside the model's shape."""

    width: int
    """Bytes of a number of the base."""
    tokens: int
    """Of one pass, padding included."""
    rows: int = 1
    """Of one pass."""
    workers: int = 1
    zero_stage: int = 2
    recomputed: Literal["none", "full"] | int = "none"
    dropout: float = 0.05
    rank: int = 8
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    answer: int = 2
    """Trained tokens of a row."""
    gpu: bool = True
    quantize: Quantize = "none"
    split: int = 1
    """Workers over which embedding and scoring split the base."""


@dataclass(frozen=True)
class Work:
    """Rows that pass through the model."""

    rows: int
    lengths: Lengths
    """Tokens of some of them, drawn at random."""

    @property
    def tokens(self) -> float:
        """Of all rows."""
        return self.rows * float(self.lengths.mean()) if len(self.lengths) else 0.0

    @property
    def pairs(self) -> float:
        """(token, token before it or itself) pairs of all rows."""
        n = self.lengths.astype(np.float64)
        return self.rows * float((n * (n + 1) / 2).mean()) if len(n) else 0.0


def total(terms: Sequence[Term]) -> int:
    """Return the bytes of all terms."""
    return sum(t.bytes for t in terms)


def forward_memory(shape: Shape, setting: Setting, head: bool) -> list[Term]:
    """Return a worker's memory while it embeds (without LM head) or scores (with it)."""
    terms = [*_weights(shape, setting, head, setting.split), _passing(shape, setting)]
    return _with_overheads(terms, setting, CONTEXT_GIB if setting.split == 1 else GROUP_GIB)


def tuning_memory(shape: Shape, setting: Setting) -> list[Term]:
    """Return a worker's memory in a forward and backward pass of LoRA tuning (§3.3)."""
    base = _weights(shape, setting, True, setting.workers if setting.zero_stage == 3 else 1)
    terms = [*base, *_trained(shape, setting), *_activations(shape, setting), _logits(shape, setting)]
    return _with_overheads(terms, setting, GROUP_GIB)


def _weights(shape: Shape, setting: Setting, head: bool, over: int) -> list[Term]:
    """The base, whole or a worker's part of it where it is split `over` several (ZeRO-3)."""
    count, width = shape.parameters(head), setting.width
    if over > 1:
        live = min(LIVE_PARAMETERS, count)
        return [
            Term("weights of the base, a worker's part", count * width // over, f"{count:,} × {width} bytes / {over}"),
            Term("weights that are gathered at a time", live * width, f"at most {live:,} × {width} bytes"),
        ]
    if setting.quantize == "none":
        return [Term("weights of the base", count * width, f"{count:,} × {width} bytes")]
    each, matrices = QUANTIZED[setting.quantize], shape.matmul_parameters
    largest = shape.hidden * max(shape.intermediate, shape.attention)
    how = f"{matrices:,} × {each:g} + {count - matrices:,} × {width} bytes"
    terms = [
        Term(f"weights of the base in {setting.quantize}", int(matrices * each) + (count - matrices) * width, how),
        Term("a matrix in full", largest * width, f"{largest:,} × {width} bytes"),
    ]
    if setting.quantize == "int8" and setting.gpu:
        # LLM.int8 multiplies into 32 bits, then scales; on an H100 the plan was that much too low without it.
        outputs = max(shape.intermediate, shape.attention)
        size = setting.tokens * outputs * 4
        terms.append(Term("an int8 product in 32 bits", size, f"{setting.tokens:,} tokens × {outputs:,} × 4 bytes"))
    return terms


def _passing(shape: Shape, setting: Setting) -> Term:
    """The states that are there at a layer's widest point; nothing is kept for a backward pass."""
    # Those of the embedding, the layer's input, the residual and its norm.
    mlp = 4 * shape.hidden + (3 if shape.gated else 2) * shape.intermediate
    attention = 3 * shape.hidden + 4 * shape.attention + 4 * shape.kv
    widest, where = (mlp, "MLP") if mlp >= attention else (attention, "attention")
    how = f"{setting.tokens:,} tokens × {widest:,} numbers at the {where}'s widest × {setting.width} bytes"
    return Term("states of one pass", setting.tokens * widest * setting.width, how)


def _trained(shape: Shape, setting: Setting) -> list[Term]:
    n, width = shape.lora_parameters(setting.rank, setting.targets), setting.width
    return [
        Term(
            "LoRA weights and gradients", 3 * n * width, f"{n:,} × {width} bytes × 3 (weights, gradients, their buffer)"
        ),
        Term(
            "float32 masters and Adam's moments",
            12 * n // setting.workers,
            f"{n:,} × 12 bytes" + (f" / {setting.workers} workers" if setting.workers > 1 else ""),
        ),
    ]


def kept_per_token(shape: Shape, setting: Setting) -> int:
    """Return the bytes that one whole layer keeps of a token for its backward pass."""
    return _kept_in_attention(shape, setting) + _kept_in_mlp(shape, setting)


def _kept_in_attention(shape: Shape, setting: Setting) -> int:
    h, b = shape.hidden, setting.width
    masks = len(setting.targets) * h if setting.dropout else 0
    scores = b * (2 * shape.attention + 2 * shape.kv) + 4 * shape.heads
    if shape.lean:
        # The layer's input with its norm's scale, the norm's result, dropout's masks, LoRA's narrow products; rotated
        # queries and keys, values, attention's result and its normaliser.
        return b * 2 * h + 4 + masks + b * setting.rank * len(setting.targets) + scores
    # PEFT's own branch keeps a dropped copy for each target; transformers' RMSNorm two float32 copies.
    norm = 8 * h if shape.gated else b * h
    return norm + (b * h * len(setting.targets) if setting.dropout else b * h) + masks + scores


def _kept_in_mlp(shape: Shape, setting: Setting) -> int:
    h, i, b = shape.hidden, shape.intermediate, setting.width
    if shape.lean:
        return b * h + 4 + 2 * b * i
    return 8 * h + 3 * b * i if shape.gated else b * i


def _activations(shape: Shape, setting: Setting) -> list[Term]:
    """What is kept, and what the backward pass adds at its widest: in the last attention or in an MLP before it."""
    tokens, b, every = setting.tokens, setting.width, _every(setting)
    whole, layers = kept_per_token(shape, setting), shape.layers - 1 if shape.lean else shape.layers
    again = 0 if every is None else -(-layers // every)
    kept = (layers - again) * whole + again * b * shape.hidden
    how = f"{tokens:,} tokens × ({layers - again} layers × {whole:,} bytes"
    how += f" + {again} layers' inputs of {b * shape.hidden:,}" if again else ""
    attention = b * (2 * shape.hidden + 2 * shape.attention + 2 * shape.kv)
    mlp = b * ((3 if shape.gated else 2) * shape.intermediate + shape.hidden)
    if every is not None and (layers - 1) % every == 0:
        mlp += whole
    if shape.lean:
        attention += _kept_in_attention(shape, setting) + (b * shape.hidden if every == 1 else 0)
    widest, where = (mlp, "an MLP") if mlp >= attention else (attention, "the last layer's attention")
    where += ", its layer computed again" if widest == mlp and again else ""
    return [
        Term("activations kept for the backward pass", tokens * kept, how + ")"),
        Term("on top of it in the backward pass", tokens * widest, f"{tokens:,} tokens × {widest:,} bytes in {where}"),
    ]


def _every(setting: Setting) -> int | None:
    if setting.recomputed == "none":
        return None
    return 1 if setting.recomputed == "full" else setting.recomputed


def _logits(shape: Shape, setting: Setting) -> Term:
    answers = setting.rows * setting.answer
    size = answers * shape.vocabulary * (2 * setting.width + 12)
    return Term(
        "logits at the answers", size, f"{answers} tokens × {shape.vocabulary:,} × {2 * setting.width + 12} bytes"
    )


def _with_overheads(terms: list[Term], setting: Setting, context: float) -> list[Term]:
    if not setting.gpu:
        return terms
    slack = int(SLACK * total([t for t in terms if not t.name.startswith("weights")]))
    return [
        *terms,
        Term("fragments and workspaces", slack, f"{SLACK:.0%} of what is no weight of the base"),
        Term("CUDA context", int(context * GIB), f"{context} GiB, as measured on an H200"),
    ]


# --- time -----------------------------------------------------------------------------------------------------------


def forward_flops(shape: Shape, work: Work) -> float:
    """Return the operations of embedding or scoring: 2·P·T + attention."""
    return 2.0 * shape.matmul_parameters * work.tokens + 4.0 * shape.attention * shape.layers * work.pairs


def tuning_flops(shape: Shape, work: Work, setting: Setting) -> float:
    """Return the operations of one epoch: 4·P·T + 3 · attention, and what is computed again."""
    every = _every(setting)
    again = 0.0 if every is None else forward_flops(shape, work) / every
    return 4.0 * shape.matmul_parameters * work.tokens + 12.0 * shape.attention * shape.layers * work.pairs + again


def seconds(flops: float, stage: str, card: Card, workers: int) -> float:
    """Return the time of a stage's arithmetic on all workers."""
    return flops / (card.tflops * 1e12 * SHARE_OF_PUBLISHED[stage] * workers)


def loading(shape: Shape, setting: Setting) -> float:
    """Return the seconds that a worker reads weights for, from a disk."""
    return shape.parameters(True) * setting.width / READING


def retrieval_seconds(pairs: int, cores: int) -> float:
    """Return the time of SUBR (§3.2) on CPUs, its start included."""
    return 15.0 + pairs * PAIR_SECONDS / max(cores, 1)


# --- what fits ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A setting that would fit, and what it would take."""

    flags: str
    bytes: int
    costs: str = ""


def most_tokens(memory: Callable[[Setting], list[Term]], setting: Setting, room: int, least: int) -> int:
    """Return the largest pass, in tokens, that fits into `room` bytes; 0 where one of `least` tokens does not."""

    def fits(tokens: int) -> bool:
        return total(memory(_sized(setting, tokens))) <= room

    if not fits(least):
        return 0
    low, high = least, max(least, setting.tokens)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _sized(setting: Setting, tokens: int) -> Setting:
    rows = max(1, round(setting.rows * tokens / max(setting.tokens, 1)))
    return replace(setting, tokens=tokens, rows=rows)


def forward_changes(
    memory: Callable[[Setting], list[Term]], setting: Setting, room: int, longest: int, flag: str
) -> list[Change]:
    """Return what would make an embedding or scoring worker fit: smaller passes, else a split or a quantised base."""
    ways = [setting]
    if setting.quantize == "none":
        ways += [replace(setting, split=setting.workers)] if setting.split < setting.workers else []
        ways += [replace(setting, quantize=kind, split=1) for kind in _kinds(setting)[1:]]
    found = []
    for tried in ways:
        tokens = most_tokens(memory, tried, room, longest)
        if tokens:
            flags = {
                "--quantize": (tried.quantize, setting.quantize),
                "--cluster.base-workers": (tried.split, setting.split),
                flag: (tokens, setting.tokens),
            }
            costs = "weights gathered layer by layer" if tried.split > setting.split else ""
            found.append(Change(_flags(flags), total(memory(_sized(tried, tokens))), costs))
            if tried is setting:
                break
    return found


def tuning_changes(shape: Shape, setting: Setting, room: int, longest: int) -> list[Change]:
    """Return what would make a tuning worker fit, what costs least first; a quantised base where nothing else does."""
    found: list[Change] = []
    for kind in _kinds(setting):
        stages = {setting.zero_stage, 3} if setting.workers > 1 else {setting.zero_stage}
        # bitsandbytes' weights cannot be sharded.
        stages = stages if kind == "none" else {min(setting.zero_stage, 2)}
        tried = [replace(setting, quantize=kind, zero_stage=s) for s in sorted(stages)]
        found += [change for t in tried for change in _tuning_changes(shape, setting, t, room, longest)]
        if found and kind == setting.quantize:
            break
    return found


def _tuning_changes(shape: Shape, setting: Setting, tried: Setting, room: int, longest: int) -> list[Change]:
    """Return what fits of `tried`, with all kept and with all computed again; flags are those that `setting` lacks."""
    found = []
    for recomputed in dict.fromkeys((setting.recomputed, "full")):
        mine = replace(tried, recomputed=recomputed)
        tokens = most_tokens(lambda s: tuning_memory(shape, s), mine, room, longest)
        if not tokens:
            continue
        flags = {
            "--quantize": (mine.quantize, setting.quantize),
            "--tune.micro-batch-tokens": (tokens, setting.tokens),
            "--tune.gradient-checkpointing": (recomputed, setting.recomputed),
            "--tune.zero-stage": (mine.zero_stage, setting.zero_stage),
        }
        costs = ["a third more time"] * (recomputed != setting.recomputed)
        costs += ["weights gathered layer by layer"] * (mine.zero_stage == 3 != setting.zero_stage)
        found.append(Change(_flags(flags), total(tuning_memory(shape, _sized(mine, tokens))), ", ".join(costs)))
    return found


def _kinds(setting: Setting) -> tuple[Quantize, ...]:
    return get_args(Quantize) if setting.quantize == "none" else (setting.quantize,)


def _flags(values: Mapping[str, tuple[object, object]]) -> str:
    """Return the flags whose value is not what it was."""
    return " ".join(f"{flag} {value}" for flag, (value, before) in values.items() if value != before)
