"""What the benchmarks of the language model share: models, texts, time, memory, and arithmetic of a forward pass.

Model FLOP utilisation (MFU) here is the arithmetic that the real tokens need (padding and recomputation not counted)
by seconds, over the rate of dense matrix products that the same card reaches in the same run.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from rella import plan
from rella.data.synthetic_words import AGES, OCCUPATIONS, WORDS
from rella.errors import InputError
from rella.lm.loading import best_device
from rella.prompts import ML_1M, WRAPPERS, answer_text, item_text, prompt_text
from rella.shapes import Shape

T = TypeVar("T")


# --- models ---------------------------------------------------------------------------------------------------------


PLAN_TOLERANCE = 0.1
"""How far a plan's memory may be off."""
CONTEXT = 2048
"""Tokens of the models' longest row."""


def llama(hidden: int, layers: int, heads: int, intermediate: int, vocabulary: int = 32_000) -> Shape:
    """Return the size of a Llama with as many key heads as query heads."""
    return Shape("llama", hidden, layers, heads, heads, hidden // heads, intermediate, vocabulary, tied=False)


SMALL = llama(256, 4, 4, 688)
"""For CPUs."""
VICUNA_13B = llama(5120, 40, 40, 13824)
TINY = llama(32, 2, 4, 64)
"""For tests of the benchmarks themselves."""
SHAPES = {"llama-256x4": SMALL, "vicuna-13b": VICUNA_13B, "llama-32x2": TINY}


def build_model(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:  # noqa: ANN401
    """Return a frozen `LlamaForCausalLM` with random weights, made where it stays and in its final dtype."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        use_cache=False,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.requires_grad_(False)
    return model.eval()


# --- texts ----------------------------------------------------------------------------------------------------------


def titles(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return `count` made-up (title with year, genre), about as long as MovieLens'."""
    rng = np.random.default_rng(seed)
    genres, found = list(WORDS), []
    for _ in range(count):
        genre = genres[rng.integers(len(genres))]
        adjectives, nouns = WORDS[genre]
        words = [*rng.choice(adjectives, rng.integers(0, 3), replace=False), rng.choice(nouns)]
        if rng.random() < 0.3:
            words += ["of", "the", rng.choice(nouns)]
        if rng.random() < 0.3:
            words.append(("II", "Part 3", "Returns", "and the Last Day")[rng.integers(4)])
        name = " ".join(map(str, words)) + (", The" if rng.random() < 0.25 else "")
        found.append((f"{name} ({rng.integers(1919, 2001)})", genre))
    return found


def item_sentences(count: int, seed: int = 0) -> list[str]:
    """Return `count` item sentences of Figure 4; about 30 tokens each in `bench_tokenizer`'s."""
    return [item_text(ML_1M, {"title": title, "genre": genre}) for title, genre in titles(count, seed)]


def wrapped_prompts(count: int, k: int = 30, seed: int = 0) -> list[str]:
    """Return `count` prompts of Figure 9 in Vicuna's template: five of six with K behaviours, the rest with 5 to K − 1.

    On MovieLens-1M some 15% of the samples have fewer than 30 behaviours before them.
    """
    rng = np.random.default_rng(seed + 1)
    movies, found = titles(2000, seed), []
    for _ in range(count):
        length = k if rng.random() < 5 / 6 or k <= 5 else int(rng.integers(5, k))
        seen = [movies[i][0] for i in rng.integers(0, len(movies), length)]
        profile = {
            "gender": ("female", "male")[rng.integers(2)],
            "occupation": str(rng.choice(OCCUPATIONS)),
            "age": str(rng.choice(AGES)),
        }
        stars = [float(s) for s in rng.integers(1, 6, length)]
        target = movies[rng.integers(len(movies))][0]
        found.append(WRAPPERS["vicuna"].wrap(prompt_text(ML_1M, profile, seen, stars, target)))
    return found


def bench_tokenizer(tokens: int = 900) -> Any:  # noqa: ANN401 - transformers is untyped here
    """Return a fast byte-level BPE tokenizer that splits numbers into digits, as Llama's, and begins with `<s>`.

    Its `tokens` are fewer than Llama's 32,000, so that the few words of `titles` come in pieces, as real titles do.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    answers = [f" {answer_text(label)}" for label in (0, 1)] * 50
    corpus = item_sentences(300, seed=7) + wrapped_prompts(100, seed=7) + answers
    trainer = trainers.BpeTrainer(
        vocab_size=tokens,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=2048
    )


def answer_tokens(tokenizer: Any) -> tuple[int, int]:  # noqa: ANN401
    """Return the first tokens of " Yes." and " No."."""
    yes, no = (tokenizer(f" {answer_text(label)}", add_special_tokens=False)["input_ids"][0] for label in (1, 0))
    return yes, no


# --- arithmetic -----------------------------------------------------------------------------------------------------


def forward_flops(shape: Shape, lengths: Sequence[int]) -> float:
    """FLOP of embedding or scoring rows of `lengths` tokens: 2·P·T + causal attention within each; no LM head."""
    return plan.forward_flops(shape, _work(lengths))


def tuning_flops(shape: Shape, lengths: Sequence[int]) -> float:
    """FLOP of a LoRA step: 4·P·T (forward, and gradients of the states alone: the base is frozen) + 3 × attention."""
    return plan.tuning_flops(shape, _work(lengths), plan.Setting(width=2, tokens=1))


def _work(lengths: Sequence[int]) -> plan.Work:
    return plan.Work(len(lengths), np.asarray(lengths, dtype=np.int64))


def gemm_rate(shape: Shape, device: torch.device, dtype: torch.dtype, tokens: int = 16_384) -> float:
    """Return the best FLOP/s of dense products on `device`: the model's own shapes and a square, 0.5 s each, in turn.

    The best of them is what MFU is measured against; random values, as zeros draw less power and run faster.
    """
    h, i = shape.hidden, shape.intermediate
    sizes = {(tokens, h, h), (tokens, h, i), (tokens, i, h)}
    if device.type == "cuda":
        sizes.add((8192, 8192, 8192))
    return max(_product_rate(m, k, n, device, dtype) for m, k, n in sorted(sizes))


def _product_rate(m: int, k: int, n: int, device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    a = torch.randn(m, k, device=device, dtype=dtype)
    b = torch.randn(n, k, device=device, dtype=dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)

    def several(times: int) -> None:
        for _ in range(times):
            torch.matmul(a, b.t(), out=out)

    several(3)
    once, _ = timed(lambda: several(1), device)
    times = max(1, min(1000, round(seconds / max(once, 1e-6))))
    taken, _ = timed(lambda: several(times), device)
    return 2.0 * m * n * k * times / taken


def mfu(flops: float, seconds: float, rate: float) -> float:
    """Return model FLOP utilisation: `flops` in `seconds`, over `rate` FLOP/s."""
    return flops / seconds / rate


# --- time and memory ------------------------------------------------------------------------------------------------


def synchronise(device: torch.device) -> None:
    """Wait until a card has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Return seconds and result of `work`, the card's part included."""
    synchronise(device)
    started = time.perf_counter()
    result = work()
    synchronise(device)
    return time.perf_counter() - started, result


@dataclass
class Timing:
    """Seconds of one way in every round, and its last result."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """The process's CPU seconds: what a machine that others use too slows down less."""
    result: Any = None

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    @property
    def median_cpu(self) -> float:
        """Median CPU seconds."""
        return statistics.median(self.cpu)


def interleaved(
    ways: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, warm_up: bool = True
) -> dict[str, Timing]:
    """Run every way once a round, in turn, so that a slow minute of the machine meets all of them.

    Args:
        ways: name → work; the same work of the same size each time.
        rounds: how often.
        device: what is waited for.
        warm_up: run each once before, not counted.
    """
    found = {name: Timing() for name in ways}
    for round_ in range(-int(warm_up), rounds):
        for name, work in ways.items():
            before = time.process_time()
            seconds, result = timed(work, device)
            if round_ >= 0:
                found[name].cpu.append(time.process_time() - before)
                found[name].seconds.append(seconds)
                found[name].result = result
    return found


@dataclass(frozen=True)
class Peak:
    """Bytes held before a piece of work (weights, libraries), and the most held during it."""

    before: int
    highest: int
    context: int = 0
    """On a card: what it holds beside torch's allocator."""
    reserved: int = 0
    """On a card: the most that the allocator had taken from it; it gives back only what another allocation needs."""

    @property
    def used(self) -> int:
        """What the work itself added at its peak."""
        return self.highest - self.before


def peak_memory(work: Callable[[], Any], device: torch.device) -> Peak:
    """Run `work` and return its peak: on a card what torch allocated, on a CPU the process's resident memory.

    Run it apart from timings: before it, caches are emptied.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        synchronise(device)
        free, all_ = torch.cuda.mem_get_info(device)
        context = all_ - free - torch.cuda.memory_reserved(device)
        reserved = torch.cuda.max_memory_reserved(device)
        return Peak(before, torch.cuda.max_memory_allocated(device), context, reserved)
    # Pages that the allocator keeps would hide what the work takes anew.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    # 5 sets the kernel's high-water mark (VmHWM) back to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    return Peak(before, _status("VmHWM"))


def fits(work: Callable[[], Any], device: torch.device, limit: int) -> bool:
    """Return whether `work` ends when torch's allocator may take no more than `limit` bytes of the card."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info(device)[1], device)
    try:
        work()
        synchronise(device)
    except (torch.OutOfMemoryError, InputError):
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    return True


def beside_plan(
    title: str, work: Callable[[], Any], device: torch.device, terms: Sequence[plan.Term], faults: list[str]
) -> dict[str, float]:
    """Print and return a plan's memory over a card's measured one, and whether the work runs in what was planned.

    Measured is what was allocated at the peak and what the context holds, of all and without the base's weights.

    Args:
        title: of what runs.
        work: raises where memory runs out.
        device: a card.
        terms: of `rella.plan`, for the same setting.
        faults: gets a line where the work does not fit, or the plan is off by more than a tenth.
    """
    peak = peak_memory(work, device)
    weights = plan.total([t for t in terms if t.name.startswith("weights")])
    planned, measured = plan.total(terms), peak.highest + peak.context
    found = {"planned_gib": planned / 2**30, "measured_gib": measured / 2**30, "reserved_gib": peak.reserved / 2**30}
    found["plan_ratio"] = planned / measured
    found["plan_ratio_beside_weights"] = (planned - weights) / (measured - weights)
    found["fits_in_plan"] = float(fits(work, device, planned - peak.context))
    runs = "runs" if found["fits_in_plan"] else "DOES NOT RUN"
    print(
        f"  plan of {title}: {found['planned_gib']:.2f} GiB, measured {found['measured_gib']:.2f} with "
        f"{peak.context / 2**30:.2f} of context: {found['plan_ratio']:.3f} ×, beside the weights "
        f"{found['plan_ratio_beside_weights']:.3f} ×; {runs} within it (takes {found['reserved_gib']:.2f} if free)",
        flush=True,
    )
    if not found["fits_in_plan"] or abs(found["plan_ratio"] - 1) > PLAN_TOLERANCE:
        faults.append(f"plan of {title}: {found}")
    return found


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


# --- exactness ------------------------------------------------------------------------------------------------------


@contextmanager
def in_float32(model: Any) -> Iterator[None]:  # noqa: ANN401 - a LlamaForCausalLM
    """Within, the decoder computes in float32, its weights as they are.

    Each part is converted when its turn comes, and has its own weights again after it (not copies, which would leave
    gaps in a card's memory), so a card that holds the model in 16 bit has room for it.
    """
    own: dict[torch.nn.Parameter, torch.Tensor] = {}

    def up(part: torch.nn.Module, seen: Any) -> None:  # noqa: ANN401
        for parameter in part.parameters():
            own[parameter], parameter.data = parameter.data, parameter.data.float()

    def down(part: torch.nn.Module, seen: Any, found: Any) -> None:  # noqa: ANN401
        for parameter in part.parameters():
            parameter.data = own.pop(parameter)

    parts = [model.model.embed_tokens, *model.model.layers, model.model.norm]
    hooks = [hook for p in parts for hook in (p.register_forward_pre_hook(up), p.register_forward_hook(down))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def exact_states(m: Machine, rows: Sequence[npt.NDArray[np.int32]]) -> list[torch.Tensor]:
    """Return each row's last hidden states, (L, D) float32, computed in float32 one row at a time."""
    # Not in inference mode: weights converted there could not be tuned afterwards.
    with torch.no_grad(), in_float32(m.model):
        ids = (torch.from_numpy(row.astype(np.int64)).to(m.device)[None] for row in rows)
        return [m.model.model(input_ids=i, use_cache=False).last_hidden_state[0].float() for i in ids]


def worse(errors: Mapping[str, float], dtype: torch.dtype, absolute: float = 1e-5) -> str:
    """Say how ours is wrong, or nothing: "" where it is as exact as it should be.

    In float32 no way may be farther from the exact result than `absolute`. In 16 bit every order of adding up gives
    other roundings: there ours may be twice as far from it as the farthest of the others, no more.

    Args:
        errors: way → distance from the exact result; `ours` among them.
        dtype: of the model.
        absolute: limit in float32.
    """
    others = max((error for name, error in errors.items() if name != "ours"), default=math.inf)
    limit = absolute if dtype == torch.float32 else 2 * others
    found = errors["ours"]
    return "" if found <= limit else f"ours is {found:.1e} from the exact result, which is more than {limit:.1e}"


# --- one run --------------------------------------------------------------------------------------------------------


@dataclass
class Machine:
    """A device with a model on it, shared by all benchmarks of one run."""

    device: torch.device
    dtype: torch.dtype
    shape: Shape
    model: Any
    """A frozen `LlamaForCausalLM`."""
    tokenizer: Any
    gemm: float
    """FLOP/s of dense products, of `gemm_rate`."""

    @property
    def gpu(self) -> bool:
        """Whether the device is a card."""
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        """Of the model's shape."""
        return next((name for name, shape in SHAPES.items() if shape == self.shape), "llama")

    def setting(self, tokens: int, rows: int = 1) -> plan.Setting:
        """Return what decides the memory of a pass here."""
        return plan.Setting(width=self.dtype.itemsize, tokens=tokens, rows=rows, gpu=self.gpu)

    def describe(self) -> str:
        """Return one line: device, threads, model, dtype, rate."""
        name = torch.cuda.get_device_name(self.device) if self.gpu else f"CPU, {torch.get_num_threads()} threads"
        return f"{name}: {self.name}, {str(self.dtype)[6:]}; dense products {self.gemm / 1e12:.2f} TFLOP/s"


def machine(device: str = "auto", shape: str = "auto", precision: str = "auto") -> Machine:
    """Build the model where it will run.

    Args:
        device: `auto` (a card where there is one), `cpu` or `cuda`.
        shape: a name of `SHAPES`; `auto` is Vicuna-13B's on a card, else the small one.
        precision: `float32`, `float16`, `bfloat16`; `auto`: on a card bfloat16 where it has it, else float16.
    """
    chosen = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    where = best_device() if chosen == "cuda" else torch.device("cpu")
    size = SHAPES[shape] if shape != "auto" else (VICUNA_13B if chosen == "cuda" else SMALL)
    if precision == "auto":
        modern = chosen == "cuda" and torch.cuda.get_device_capability(where) >= (8, 0)
        precision = "float32" if chosen == "cpu" else ("bfloat16" if modern else "float16")
    dtype: torch.dtype = getattr(torch, precision)
    rate = gemm_rate(size, where, dtype, 16_384 if chosen == "cuda" else 2048)
    return Machine(where, dtype, size, build_model(size, where, dtype), bench_tokenizer(), rate)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the flags that all benchmarks of the language model have."""
    found = argparse.ArgumentParser(description=(doc or "").split("\n\n")[0])
    found.add_argument("--quick", action="store_true", help="under a minute on a CPU: less of everything")
    found.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    found.add_argument("--shape", choices=("auto", *SHAPES), default="auto", help="of the model (default by device)")
    found.add_argument("--precision", choices=("auto", "float32", "float16", "bfloat16"), default="auto")
    found.add_argument("--json", type=Path, help="write the figures there, flat")
    return found


def finish(faults: Sequence[str]) -> None:
    """End the program with what is wrong, if anything is."""
    if faults:
        sys.exit("\n".join(faults))


def write_figures(figures: Mapping[str, float | str], file: Path | None) -> None:
    """Write flat figures as JSON where a file is given."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(dict(figures), indent=1) + "\n")


def run_alone(doc: str | None, run: Callable[[Machine, bool, list[str]], dict[str, float]]) -> None:
    """What a benchmark does as a script: read the options, measure, print, write the figures, end with its faults."""
    options = parser(doc).parse_args()
    m = machine(options.device, options.shape, options.precision)
    print(m.describe(), flush=True)
    faults: list[str] = []
    write_figures(run(m, options.quick, faults), options.json)
    finish(faults)
