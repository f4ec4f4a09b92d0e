"""SUBR of synthetic MovieLens-25M through jobs/retrieve.py: time, memory, and how both grow.

    python benchmarks/retrieval_job.py --storage DIR [--quick] [--k K] [--workers] [--json FILE]

Start-up, reading and writing are in the times; what comes before (the data's files, jobs/prepare.py, item vectors of a
random model, 512 dimensions) is made first and kept in DIR. An eighth, a quarter and a half of the users give
time = a + b · pairs, which has to predict all of them. `--workers` also runs all users with one worker of one CPU: once
while the other cores serve Ray and reading, once with everything on one core, as a machine of one core would.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from benchmarks.processes import Measured, measure
from rella.data.synthetic25m import cached_ml25m
from rella.data.synthetic25m_shape import ML_25M

SHARES = (8, 4, 2, 1)
FEW = 600
"""Users of the run that compiles the kernels."""


@dataclass(frozen=True)
class Setting:
    """What all runs share."""

    storage: Path
    k: int

    def command(self, stage: str, users: int, *flags: str) -> list[str]:
        """Return the command of one job on the first `users` users."""
        raw = cached_ml25m(users=None if users == ML_25M.users else users)
        place = self.storage / str(users)
        words = ["--dataset", "ml-25m", "--raw-dir", str(raw), "--storage", str(place), "--model", str(self.model())]
        words += ["--pca-dim", "512", "--retrieve.k-max", str(self.k), "--k", str(self.k)]
        return [sys.executable, f"jobs/{stage}.py", *words, *flags]

    def model(self) -> Path:
        """Return a folder with a random Llama of 512 dimensions, made when it is first asked for."""
        folder = self.storage / "model"
        if not (folder / "config.json").exists():
            make_model(folder)
        return folder


def make_model(folder: Path) -> None:
    """Write a random Llama of 512 dimensions and no layers, which is quick, with the stand-in's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    import rella

    tokenizer = AutoTokenizer.from_pretrained(Path(rella.__file__).parent / "assets" / "tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=64,
        num_hidden_layers=0,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def retrieve(setting: Setting, users: int, *flags: str) -> tuple[Measured, dict[str, float]]:
    """Make what comes before, then measure the retrieval of `users` users; it is dropped and made again."""
    measure(setting.command("embed", users))
    run = measure(setting.command("retrieve", users, "--restart", "retrieve", *flags))
    facts = json.loads(run.last)
    stage = next(float(m[1]) for line in run.lines if (m := re.match(r"retrieve +took +([\d.]+) s", line)))
    return run, {"pairs": float(facts["pairs"]), "samples": float(facts["samples"]), "stage": stage}


def one_worker(setting: Setting, users: int, two: float, start: float) -> dict[str, float]:
    """Run all users with one worker, and again on one core; return the figures, over `two` seconds of all workers."""
    run, _ = retrieve(setting, users, "--cluster.workers", "1")
    figures = {"one_worker": run.seconds, "ratio_workers": run.seconds / two}
    figures["ratio_workers_without_a"] = (run.seconds - start) / (two - start)
    print(f"one worker: {run.seconds:.1f} s, {figures['ratio_workers']:.2f} ×; without the {start:.1f} s that do "
          f"not depend on the pairs {figures['ratio_workers_without_a']:.2f} ×")  # fmt: skip
    pinned = shutil.which("taskset")
    if pinned is not None:
        command = setting.command("retrieve", users, "--restart", "retrieve", "--cluster.workers", "1")
        alone = measure([pinned, "-c", "0", *command]).seconds
        figures |= {"one_core": alone, "ratio_cores": alone / two}
        print(f"one worker and everything else on one core: {alone:.1f} s, {figures['ratio_cores']:.2f} ×")
    return figures


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--storage", type=Path, required=True, help="folder for data and artifacts, several GB")
    parser.add_argument(
        "--quick", action="store_true", help="under a minute once data and vectors are there: few users"
    )
    parser.add_argument("--k", type=int, default=30, help="neighbours kept (default 30)")
    parser.add_argument("--workers", action="store_true", help="also all users with one worker of one CPU")
    parser.add_argument("--json", type=Path, help="write the figures there, flat")
    options = parser.parse_args()
    os.environ.setdefault("RELLA_STORAGE", str(options.storage))
    setting = Setting(options.storage.resolve(), options.k)
    whole = 4000 if options.quick else ML_25M.users
    figures: dict[str, float] = {"users": whole, "k": options.k, "cores": float(os.cpu_count() or 1)}
    # Compilers run once a machine, and their half minute would be in the first figure alone.
    retrieve(setting, FEW, "--retrieve.cut", "targets")
    seconds, pairs = [], []
    for share in (1,) if options.quick else SHARES:
        run, found = retrieve(setting, whole // share)
        seconds.append(run.seconds)
        pairs.append(found["pairs"])
        print(
            f"{whole // share:>7,} users  {found['pairs']:>13,.0f} pairs  {run.seconds:6.1f} s, of which the stage "
            f"{found['stage']:6.1f} s  {run.pss / 2**30:5.2f} GiB",
            flush=True,
        )
    figures |= {"seconds": seconds[-1], "stage_seconds": found["stage"], "gib": run.pss / 2**30, **found}
    if not options.quick:
        b, a = np.polyfit(pairs[:-1], seconds[:-1], 1)
        guess = a + b * pairs[-1]
        figures |= {"a_seconds": a, "b_ns": b * 1e9, "predicted": guess, "prediction_off": guess / seconds[-1] - 1}
        figures["full_over_half"] = seconds[-1] / seconds[-2]
        print(f"time = {a:.1f} s + {b * 1e9:.2f} ns · pairs, from the first three: predicts {guess:.1f} s for all "
              f"({figures['prediction_off']:+.1%}); all takes {figures['full_over_half']:.2f} × half")  # fmt: skip
    if options.workers:
        figures |= one_worker(setting, whole, seconds[-1], figures.get("a_seconds", 0.0))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
