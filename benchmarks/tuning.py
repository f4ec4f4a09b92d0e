"""LoRA tuning (ReiT, §3.3): seconds and memory of a step, ours against what people run, on one model in one process.

    python benchmarks/tuning.py [--quick] [--device cpu|cuda] [--ways NAMES] [--json FILE] [--profile]

(a) the authors' way by their published settings: HF `Trainer` with PEFT, micro-batches of 4 rows as they come, padded
to the longest, logits of the whole vocabulary, activations recomputed (their 8-bit base is left out: it is slower than
the half precision that all ways here share); (b) trl's `SFTTrainer` with completion-only loss, on rows as they come and
on rows grouped by length. Every way runs first without dropout on the same rows in the same order, and the losses must
agree; then all run in turn with the published dropout, and medians count. Ratios are theirs over ours: more is better.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import lm_bench
from benchmarks.lm_bench import Machine, mfu, peak_memory, tuning_flops
from benchmarks.tuning_ways import MICRO_ROWS, NEEDS, OURS, WAYS, Run, Way, Work
from rella import plan
from rella.lm.micro import Limits, cut
from rella.lm.tuning import Row
from rella.prompts import answer_text

TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 6e-2}
"""How far a step's mean loss may be from ours: other kernels, other roundings."""


def make_rows(on: Machine, count: int, k: int) -> list[Row]:
    """Return `count` training rows of about 650 tokens at K = 30, their answers alternately Yes and No."""
    tokenizer = on.tokenizer
    answers = [tuple(tokenizer(f" {answer_text(n)}", add_special_tokens=False)["input_ids"]) for n in (0, 1)]
    prompts = tokenizer(lm_bench.wrapped_prompts(count, k))["input_ids"]
    return [Row(np.array(ids, np.int32), answers[n % 2]) for n, ids in enumerate(prompts)]


def one_process(on: Machine) -> None:
    """Start the group of one worker that `Tuner` needs."""
    import torch.distributed as dist

    if not on.gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not dist.is_initialized():
        with tempfile.NamedTemporaryFile(delete=False) as file:
            meeting = file.name
        os.unlink(meeting)
        backend = "nccl" if on.gpu else "gloo"
        dist.init_process_group(backend, init_method=f"file://{meeting}", rank=0, world_size=1)
    if _fault(("deepspeed",)) is None:
        import logging

        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def available(names: Sequence[str]) -> list[str]:
    """Return the ways that can run here, and say which cannot."""
    found = []
    for name in names:
        fault = _fault(NEEDS.get(name, ()))
        if fault is None:
            found.append(name)
        else:
            print(f"{name}: left out: {fault}", flush=True)
    return found


def _fault(modules: Sequence[str]) -> str | None:
    """Say why one of the modules cannot be used; trl loads its trainer only when it is asked for."""
    try:
        for module in modules:
            importlib.import_module(module)
            if module == "trl":
                importlib.import_module("trl.trainer.sft_trainer")
    except (ImportError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None


def agree(on: Machine, runs: dict[str, Run]) -> float:
    """Return how far losses are from the first way's at most, in nats; every way trains on one batch, the same."""
    first, *others = runs
    gaps = {n: float(np.abs(np.subtract(runs[n].losses, runs[first].losses)).max()) for n in others}
    for name, gap in gaps.items():
        if not gap <= TOLERANCE[on.dtype]:
            print(f"losses of {name} are {gap:.2g} from those of {first}: {runs[name]} {runs[first]}", flush=True)
    return max(gaps.values(), default=0.0)


def compare(
    on: Machine, work: Work, rounds: int, names: Sequence[str], faults: list[str], memory: bool = True
) -> dict[str, float]:
    """Run the ways and return the figures; prints them as they come.

    Args:
        on: device and model.
        work: rows of one run.
        rounds: timed runs of each way.
        names: of `WAYS`; "ours" is what the others are compared with.
        faults: gets what is wrong with a plan's memory.
        memory: whether to measure the peak too, in one more run of each.
    """
    one_process(on)
    names = available(names)
    few = replace(work, rows=work.rows[: work.batch], dropout=0.0)
    peaks: dict[str, lm_bench.Peak] = {}
    same: dict[str, Run] = {}
    for name in list(names):
        try:
            same[name], peak = first_run(on, few, WAYS[name], memory)
        except Exception as error:
            if name in OURS:
                raise
            print(f"{name}: left out: {type(error).__name__}: {str(error)[:300]}", flush=True)
            names.remove(name)
            continue
        peaks |= {} if peak is None else {name: peak}
        print(f"{name}: loss {same[name].losses}, {same[name].seconds[0]:.3f} s{_memory(peak)}", flush=True)
    figures: dict[str, float] = {"loss_gap": agree(on, same)}
    if on.gpu and memory:
        full = replace(few, dropout=work.dropout)
        for name in [n for n in ("ours", "recomputed") if n in names]:
            figures |= beside_plan(on, full, name, faults)
    timings = {name: lm_bench.Timing() for name in names}
    for _ in range(rounds):
        for name in names:
            run = WAYS[name](on, work)
            timings[name].seconds += run.seconds
            timings[name].cpu += run.cpu
    torch.distributed.destroy_process_group()
    return figures | summary(on, work, timings, peaks)


def first_run(on: Machine, work: Work, way: Way, memory: bool) -> tuple[Run, lm_bench.Peak | None]:
    """Return a way's first run, which loads and connects and is in no median, and its peak memory."""
    if not memory:
        return way(on, work), None
    if not on.gpu:
        way(on, work)  # what it leaves behind is not the work's; on a card torch counts its own alone
    found: list[Run] = []
    peak = peak_memory(lambda: found.append(way(on, work)), on.device)
    return found[0], peak


def summary(
    on: Machine, work: Work, timings: dict[str, lm_bench.Timing], peaks: dict[str, lm_bench.Peak]
) -> dict[str, float]:
    """Print and return medians, rates and ratios; memory is what the work adds to weights and libraries."""
    lengths = [row.tokens for row in work.rows]
    flops, base = tuning_flops(on.shape, lengths) / work.steps, "ours" if "ours" in timings else "plain"
    found: dict[str, float] = {"gemm_tflops": on.gemm / 1e12, "tokens_per_row": float(np.mean(lengths))}
    for name, each in timings.items():
        found[f"{name}_seconds"] = each.median
        found[f"{name}_tokens_per_second"] = sum(lengths) / work.steps / each.median
        found[f"{name}_mfu"] = mfu(flops, each.median, on.gemm)
        if name in peaks:
            found[f"{name}_peak_mb"], found[f"{name}_used_mb"] = peaks[name].highest / 2**20, peaks[name].used / 2**20
        said = (
            f"{name:<17} {each.median:9.3f} s a step, {each.median_cpu:8.3f} s of CPU, {found[f'{name}_mfu']:6.1%} MFU"
        )
        if name != base:
            found |= _ratios(name, timings[name], timings[base], None if on.gpu else "cpu")
            said += f", {found[f'ratio_{name}']:.2f} x ours"
            if name in peaks:
                found[f"memory_ratio_{name}"] = peaks[name].used / max(peaks[base].used, 1)
        print(said + _memory(peaks.get(name)), flush=True)
    if on.gpu:
        found["mfu"] = found[f"{base}_mfu"]
    return found


def beside_plan(on: Machine, few: Work, name: str, faults: list[str]) -> dict[str, float]:
    """Print and return what `rella.plan` says of a way's memory, for its widest pass, over the measured one."""
    lengths = np.array([row.tokens for row in few.rows])
    passes = cut(np.arange(few.batch), lengths, Limits(10**6, few.micro_tokens), 1)
    widest = max((piece for pieces in passes for piece in pieces), key=lambda rows: lengths[rows].max() * len(rows))
    setting = on.setting(int(lengths[widest].max()) * len(widest), len(widest))
    setting = replace(setting, dropout=few.dropout, recomputed="full" if name == "recomputed" else "none")
    title = f"{name} (passes of {setting.tokens:,} tokens, {setting.rows} rows)"
    terms = plan.tuning_memory(on.shape, setting)
    found = lm_bench.beside_plan(title, lambda: WAYS[name](on, few), on.device, terms, faults)
    return {f"{name}_{key}": value for key, value in found.items()}


def _ratios(name: str, theirs: lm_bench.Timing, ours: lm_bench.Timing, cpu: str | None) -> dict[str, float]:
    found = {f"ratio_{name}": theirs.median / ours.median}
    return found if cpu is None else found | {f"ratio_{name}_{cpu}": theirs.median_cpu / ours.median_cpu}


def _memory(peak: lm_bench.Peak | None) -> str:
    return "" if peak is None else f", peak {peak.highest / 2**20:,.0f} MB, {peak.used / 2**20:,.0f} of them the work's"


def profile(on: Machine, work: Work) -> str:
    """Return where the time of a step goes, as torch's profiler sees it."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    one_process(on)
    name = available(["ours"]) or ["plain"]
    one = replace(work, rows=work.rows[: work.batch])
    WAYS[name[0]](on, one)
    # On a card without the host's part, which would slow it down.
    activities, by = [ProfilerActivity.CPU], "self_cpu_time_total"
    if on.gpu:
        activities, by = [ProfilerActivity.CUDA], "self_device_time_total"
    with watch(activities=activities) as seen:
        run = WAYS[name[0]](on, one)
    events = seen.key_averages()
    table: str = events.table(sort_by=by, row_limit=45, max_name_column_width=90)
    if on.gpu:
        busy = sum(event.self_device_time_total for event in events) / 1e6
        table += f"\nkernels {busy:.3f} s, step {run.seconds[0]:.3f} s"
    return table


@dataclass(frozen=True)
class Size:
    """How much is run."""

    batch: int
    steps: int
    rounds: int
    k: int
    micro_tokens: int


def size(on: Machine, quick: bool) -> Size:
    """Return how much is run: a step's rows are fewer than the published 128; the quick CPU run has shorter prompts."""
    if on.gpu:
        return Size(batch=16 if quick else 32, steps=1 if quick else 2, rounds=2, k=30, micro_tokens=6144)
    if on.shape == lm_bench.TINY:
        return Size(4, 1, 1, 10, 1200)
    return Size(8, 1, 2, 10, 1200) if quick else Size(32, 1, 5, 30, 2700)


def run(on: Machine, quick: bool, faults: list[str]) -> dict[str, float]:
    """Measure all ways on a machine and return the figures, flat; what is wrong with the losses goes to `faults`."""
    asked = size(on, quick)
    work = Work(make_rows(on, asked.batch * asked.steps, asked.k), asked.batch, asked.micro_tokens)
    _quiet()
    return checked(on, compare(on, work, asked.rounds, list(WAYS), faults), faults)


def checked(on: Machine, figures: dict[str, float], faults: list[str]) -> dict[str, float]:
    """Return the figures; losses that differ by more than rounding go to `faults`."""
    if not figures["loss_gap"] <= TOLERANCE[on.dtype]:
        faults.append(f"tuning: losses differ by {figures['loss_gap']:.2g} nats")
    return figures


def _quiet() -> None:
    import logging

    from transformers.utils import logging as of_transformers

    warnings.filterwarnings("ignore")
    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()
    if _fault(("datasets",)) is None:
        import datasets

        datasets.disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def main() -> None:
    """Measure, print and write the figures."""
    parser = lm_bench.parser(__doc__)
    parser.add_argument("--ways", default=",".join(WAYS), help=f"a comma list of {', '.join(WAYS)}")
    parser.add_argument("--micro-tokens", type=int, help="tokens of one of our passes")
    parser.add_argument("--rows", type=int, default=MICRO_ROWS, help="rows of one of the engineer's passes")
    parser.add_argument("--batch", type=int, help="rows of a step")
    parser.add_argument("--rounds", type=int, help="timed runs of each way")
    parser.add_argument("--no-memory", action="store_true", help="leave the runs out that measure the peak")
    parser.add_argument("--profile", action="store_true", help="show where the time of our step goes, and end")
    chosen = parser.parse_args()
    _quiet()
    on = lm_bench.machine(chosen.device, chosen.shape, chosen.precision)
    print(on.describe(), flush=True)
    asked = size(on, chosen.quick)
    batch = chosen.batch or asked.batch
    rows = make_rows(on, batch * asked.steps, asked.k)
    work = Work(rows, batch, chosen.micro_tokens or asked.micro_tokens, micro_rows=chosen.rows)
    if chosen.profile:
        print(profile(on, work))
        return
    faults: list[str] = []
    rounds, ways = chosen.rounds or asked.rounds, chosen.ways.split(",")
    figures = checked(on, compare(on, work, rounds, ways, faults, not chosen.no_memory), faults)
    lm_bench.write_figures({"device": on.describe(), **figures}, chosen.json)
    lm_bench.finish(faults)


if __name__ == "__main__":
    main()
