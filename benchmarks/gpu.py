"""Embedding, tuning and scoring on one card, with one model: everything that needs a GPU, in under eight minutes.

    python benchmarks/gpu.py [--quick] [--only NAMES] [--profile] [--json FILE]

Needs torch, transformers and peft; no Ray. The model is Vicuna-13B's shape with random weights, made on the card, so
nothing is downloaded. `--device cpu --shape llama-32x2 --quick` runs the same script on a CPU.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

import torch

from benchmarks import embedding, lm_bench, scoring
from benchmarks.lm_bench import Machine
from rella.lm.embedding import embed_texts

PARTS = ("embedding", "tuning", "scoring")

KINDS = {
    "dense products": ("gemm", "nvjet", "cutlass", "xmma", "::mm", "addmm", "::bmm", "gemv"),
    "attention": ("flash", "fmha", "attention"),
    "copies": ("memcpy", "memset", "copy_"),
}
"""What a kernel's name says; what remains is element-wise."""


def kind_of(kernel: str) -> str:
    """Return a kind of `KINDS`, or the rest."""
    name = kernel.lower()
    # Attention first: its kernels are made of products too.
    for kind in ("attention", "dense products", "copies"):
        if any(word in name for word in KINDS[kind]):
            return kind
    return "element-wise and sums"


def profile(m: Machine, work: Callable[[], Any], rows: int = 12) -> str:
    """Return where the device's time goes: by kind of kernel, and the costliest kernels."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    work()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if m.gpu else [])]
    with watch(activities=activities) as seen:
        seconds, _ = lm_bench.timed(work, m.device)
    spent: dict[str, float] = defaultdict(float)
    for event in seen.key_averages():
        on_device = str(event.device_type).endswith("CUDA") if m.gpu else event.key.startswith("aten::")
        spent[event.key] += (event.self_device_time_total if m.gpu else event.self_cpu_time_total) * on_device / 1e6
    kinds: dict[str, float] = defaultdict(float)
    for name, took in spent.items():
        kinds[kind_of(name)] += took
    lines = [f"  {took:8.3f} s  {kind}" for kind, took in sorted(kinds.items(), key=lambda item: -item[1])]
    lines.append(f"  {seconds - sum(kinds.values()):8.3f} s  nothing (of {seconds:.3f} s; the profiler's own included)")
    top = sorted(spent.items(), key=lambda item: -item[1])[:rows]
    return "\n".join([*lines, *(f"  {took:8.3f} s    {name[:110]}" for name, took in top)])


def profiles(m: Machine) -> None:
    """Print the profiles of a few passes of embedding and of scoring."""
    texts = lm_bench.item_sentences(1100 if m.gpu else 200)
    print("profile of embedding\n" + profile(m, lambda: embed_texts(m.model.model, m.tokenizer, texts)))
    task = scoring.make_task(m, scoring.Size(44 if m.gpu else 4, 1, 1, 1, 1))
    print("profile of scoring\n" + profile(m, lambda: scoring.ours(m, task)), flush=True)


Run = Callable[[Machine, bool, list[str]], dict[str, float]]
"""A part: on the machine, quickly or not, with a list for what is wrong, to its figures."""


def runners() -> dict[str, Run]:
    """Return the parts by name; tuning where its module is there."""
    found: dict[str, Run] = {"embedding": embedding.run, "scoring": scoring.run}
    if (Path(__file__).parent / "tuning.py").exists():
        found["tuning"] = importlib.import_module("benchmarks.tuning").run
    return {name: found[name] for name in PARTS if name in found}


def main() -> None:
    """Measure, print and write the figures."""
    parser = lm_bench.parser(__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help=f"a comma list of {', '.join(PARTS)}")
    parser.add_argument("--profile", action="store_true", help="also show where the time of a few passes goes")
    options = parser.parse_args()
    asked = options.only.split(",")
    if unknown := sorted(set(asked) - set(PARTS)):
        parser.error(f"--only knows {', '.join(PARTS)}, not {', '.join(unknown)}")
    started = time.perf_counter()
    m = lm_bench.machine(options.device, options.shape, options.precision)
    took = time.perf_counter() - started
    print(f"{m.describe()} (ready after {took:.0f} s; torch {torch.__version__})", flush=True)
    faults: list[str] = []
    figures: dict[str, float | str] = {"device": m.describe(), "dense_tflops": m.gemm / 1e12}
    for name, run in runners().items():
        if name not in asked:
            continue
        begun = time.perf_counter()
        figures |= {f"{name}.{key}": value for key, value in run(m, options.quick, faults).items()}
        print(f"  {name} took {time.perf_counter() - begun:.0f} s", flush=True)
        # What is measured is not lost where the next part fails.
        lm_bench.write_figures(figures, options.json)
    if options.profile:
        profiles(m)
    figures["minutes"] = (time.perf_counter() - started) / 60
    print(f"{figures['minutes']:.1f} minutes in all")
    lm_bench.write_figures(figures, options.json)
    lm_bench.finish(faults)


if __name__ == "__main__":
    main()
