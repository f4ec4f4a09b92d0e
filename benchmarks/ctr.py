"""Training of the ID-based CTR models against FuxiCTR's DIN and torch-rechub's DeepFM: samples/s from disk to step.

    python benchmarks/ctr.py [--peers PYTHON] [--raw-dir DIR] [--quick] [--device cpu|cuda] [--json FILE]

PYTHON is the interpreter of an environment of the peers' own, with the same torch as ours:

    python3.11 -m venv peers && peers/bin/pip install torch==2.13.0 fuxictr==2.3.10 torch-rechub==0.9.0

Same samples (MovieLens-1M from DIR, else made-up ratings of its shape), same ids, batch, embeddings, DNN, activation
unit, dropout and learning rate. Each side starts from its own stored form and trains by its own trainer: the four
prepared tables and `Fitter` here; there npz or Parquet with padded histories, their loaders and trainers, with the
loader that a trial finds to be the fastest. After a warm-up the processes run rounds of steps in alternation, each on
all cores; figures are medians over the rounds, ratios their seconds over ours. FuxiCTR's DIN runs as it is by default
(Dice, no softmax) and as ours is (ReLU, softmax); `ratio_peer_din` is against the faster of the two. CPU seconds, of
all processes and threads of a side, are what a machine that has other work as well stretches least.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from benchmarks import ctr_data
from benchmarks.processes import measure
from benchmarks.rounds import MARK, Finished, Gate, say
from benchmarks.runners import Runner, alternate
from rella.baselines import Baseline, BaselineConfig
from rella.ctr.batches import batches_of
from rella.ctr.fit import REPORTED, Fitter
from rella.ctr.models import build, parameters
from rella.lm.tuning import Progress

K = 30
CORES = len(os.sched_getaffinity(0))
MODELS: tuple[Baseline, ...] = ("din", "deepfm")
WORKERS = tuple(n for n in (0, 1, 2, 4, 8) if n <= 2 * CORES)
LOADERS = {
    "din": (*(f"npz:{n}" for n in WORKERS), "parquet:1", "parquet:4"),
    "deepfm": tuple(f"npz:{n}" for n in WORKERS),
}
"""Kind of file, and worker processes (npz) or batches made ahead (Parquet)."""
QUICK = {"din": "npz:1", "deepfm": "npz:2"}
"""Taken without a trial: one batch takes 2.5 and 9 ms of one core to load, and a step 30 ms and more."""
DINS = {"as it is": ["--activation", "Dice"], "as ours": ["--activation", "ReLU", "--softmax"]}


@dataclass(frozen=True)
class Plan:
    """What is run."""

    folder: Path
    device: str
    warm_up: int
    steps: int
    rounds: int
    threads: int
    config: BaselineConfig

    def ours(self, model: Baseline) -> Runner:
        """Return our side."""
        words = [sys.executable, __file__, "--ours", model, "--store", str(self.folder / "store"), *self._steps()]
        return Runner(f"ours-{model}", [*words, "--device", self.device], self.folder, self.threads)

    def peer(self, python: Path, model: Baseline, loader: str, name: str = "", *flags: str) -> Runner:
        """Return a peer's side."""
        store, c = self.folder / "peers", self.config
        sizes = {"batch": c.step_rows, "embedding": c.embedding_dim, "width": c.dnn_size, "layers": c.dnn_layers}
        sizes |= {"attention": c.attention_size}
        words = [str(python), "benchmarks/peers_ctr.py", model, str(store), "--loader", loader]
        words += [w for n, value in sizes.items() for w in (f"--{n}", str(value))]
        words += ["--dropout", str(c.dropout), "--device", self.device, *self._steps(), *flags]
        called = f"peer-{model}-{name or loader}".replace(" ", "-").replace(":", "-")
        return Runner(called, words, self.folder, self.threads)

    def _steps(self) -> list[str]:
        return ["--warm-up", str(self.warm_up), "--steps", str(self.steps)]


def train(options: argparse.Namespace) -> None:
    """Our side: from the stored tables through `Fitter`, unchanged; its reports are where rounds begin and end."""
    prepared, device = ctr_data.read(options.store), torch.device(options.device)
    config = BaselineConfig(model=options.ours, valid_per_epoch=1)
    histories, pinned = prepared.tables.histories(), device.type == "cuda"
    train, valid = (
        batches_of(config, prepared.features, histories, prepared.samples(split), K, pinned=pinned)
        for split in ("train", "valid")
    )
    model = build(config, prepared.features, K, seed=1).to(device)
    gate = Gate(options.warm_up, options.steps)
    say({"parameters": parameters(model), "samples": len(train), "threads": torch.get_num_threads()})

    def report(now: Progress) -> None:
        # One batch's loss stands for those of the steps since the last report.
        gate.losses.append(now.loss)
        gate.after(now.step)

    try:
        Fitter(model, train, valid, config, 1, device, report).run()
    except Finished:
        return
    sys.exit("the data's end came before that of the rounds")


def fastest(plan: Plan, python: Path, model: Baseline) -> tuple[str, dict[str, float]]:
    """Return a peer's fastest loader, and the seconds of a round of each."""
    found: dict[str, float] = {}
    flags = DINS["as ours"] if model == "din" else []
    short = replace(plan, steps=max(REPORTED, plan.steps // 4))
    for loader in LOADERS[model]:
        runner = short.peer(python, model, loader, "", *flags)
        try:
            runner.start()
            runner.ready()
            alternate([runner], 3)
        except SystemExit as error:
            print(f"  {model:<7} loader {loader:<10} does not run: {str(error).splitlines()[-1]}", flush=True)
            continue
        finally:
            runner.stop()
        found[loader] = statistics.median(runner.seconds)
        rate = short.steps * plan.config.step_rows / found[loader]
        print(f"  {model:<7} loader {loader:<10} {rate:10,.0f} samples/s", flush=True)
    if not found:
        sys.exit(f"none of the peer's loaders runs; see what {python} says to: import fuxictr, torch_rechub")
    return min(found, key=lambda name: found[name]), found


def prepared_by(plan: Plan, python: Path | None, raw_dir: Path) -> dict[str, float]:
    """Make every side's stored form; return seconds, bytes and peak memory of each, the process's start included."""
    store, export, figures = plan.folder / "store", plan.folder / "export", dict[str, float]()
    ours = measure([sys.executable, __file__, "--prepare", str(raw_dir), "--store", str(store)])
    made = {"ours": (ours, sum(f.stat().st_size for f in store.rglob("*") if f.is_file()))}
    if python is not None:
        ctr_data.export(ctr_data.read(store), export, K)
        for kind in ("npz", "parquet"):
            words = ["benchmarks/peers_ctr.py", "prepare", kind, str(export), str(plan.folder / "peers")]
            run = measure([str(python), *words])
            made[kind] = run, json.loads(run.last.removeprefix(MARK))["bytes"]
    for name, (run, size) in made.items():
        print(
            f"prepare {name:<8} {run.seconds:6.1f} s, {size / 1e6:7.1f} MB on disk, {run.pss / 1e9:5.2f} GB of memory"
        )
        figures |= {f"prepare_{name}_seconds": run.seconds, f"prepare_{name}_bytes": float(size)}
        figures[f"prepare_{name}_pss"] = float(run.pss)
    return figures


def raced(plan: Plan, model: Baseline, python: Path | None, loader: str) -> dict[str, float]:
    """Run one model's sides in alternation; return the figures."""
    ours, theirs = plan.ours(model), {}
    if python is not None and model == "din":
        theirs = {name: plan.peer(python, model, loader, name, *flags) for name, flags in DINS.items()}
    elif python is not None:
        theirs = {"": plan.peer(python, model, loader, "as it is")}
    runners = [ours, *theirs.values()]
    try:
        for runner in runners:
            runner.start()
            if "parquet" in loader:  # Each starts a Ray of its own, and two at once can be too much for a machine.
                runner.ready()
        for runner in runners:
            runner.ready()
            check(plan, runner, ours)
        alternate(runners, plan.rounds)
    finally:
        for runner in runners:
            runner.stop()
    figures = said(plan, model, ours)
    for name, runner in theirs.items():
        figures |= said(plan, f"peer_{model}{f'_{name}'.replace(' ', '_') if name else ''}", runner)
    if theirs:
        for kind, what in (("", "seconds"), ("cpu_", "cpu")):
            cost = {n: statistics.median(getattr(r, what)) for n, r in theirs.items()}
            ratios = {n: c / statistics.median(getattr(ours, what)) for n, c in cost.items()}
            figures |= {f"{kind}ratio_peer_{model}_{n.replace(' ', '_')}": ratio for n, ratio in ratios.items() if n}
            figures[f"{kind}ratio_peer_{model}"] = min(ratios.values())
    return figures


def check(plan: Plan, runner: Runner, ours: Runner) -> None:
    """Refuse a comparison on different samples, and rounds that do not fit in an epoch, whose end has a validation."""
    samples, wanted = runner.facts["samples"], plan.warm_up + plan.rounds * plan.steps
    if samples != ours.facts["samples"]:
        sys.exit(f"{runner.name} trains on {samples} samples, ours on {ours.facts['samples']}")
    if samples <= wanted * plan.config.step_rows:
        sys.exit(
            f"{samples} samples are too few for {wanted} steps in an epoch: fewer --steps or --rounds, more --users"
        )


def said(plan: Plan, name: str, runner: Runner) -> dict[str, float]:
    """Print one side's figures and return them; its loss has to have fallen."""
    rows = plan.steps * plan.config.step_rows
    rate, first = rows / statistics.median(runner.seconds), runner.facts["first_loss"]
    least, most = rows / max(runner.seconds), rows / min(runner.seconds)
    print(
        f"{name:<19} {rate:9,.0f} samples/s ({least:,.0f} to {most:,.0f})  {runner.facts['parameters']:9,} parameters"
        f"  loss {first:.4f} → {runner.loss:.4f}"
        f"  CPU {1000 * statistics.median(runner.cpu) / plan.steps:.1f} ms a step",
        flush=True,
    )
    if not runner.loss < first:
        sys.exit(f"{runner.name} does not learn: loss {first:.4f} at first, {runner.loss:.4f} at last")
    found = {"samples_per_s": rate, "ms_per_step": 1000 * statistics.median(runner.seconds) / plan.steps}
    found["cpu_ms_per_step"] = 1000 * statistics.median(runner.cpu) / plan.steps
    found |= {"parameters": runner.facts["parameters"], "first_loss": first, "loss": runner.loss}
    return {f"{name}_{what}": float(value) for what, value in found.items()}


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--peers", type=Path, help="interpreter of the peers' environment; without it ours runs alone")
    parser.add_argument("--raw-dir", type=Path, help="MovieLens-1M's original files; else made-up ones of its shape")
    parser.add_argument("--quick", action="store_true", help="under a minute: a fifth of the users, no trial")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if there is one"
    )
    parser.add_argument("--model", choices=MODELS, help="one of the two only")
    parser.add_argument("--users", type=int, help="of the made-up data set; default 6,040")
    parser.add_argument("--steps", type=int, help=f"of a round, a multiple of {REPORTED}; default 200")
    parser.add_argument("--rounds", type=int, help="default 5")
    parser.add_argument("--threads", type=int, default=CORES, help="of each side's operators; default all cores")
    parser.add_argument("--loader", help="of the peers, like npz:2; default: what a trial finds to be the fastest")
    parser.add_argument("--json", type=Path, help="write the figures there, flat")
    parser.add_argument("--ours", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--warm-up", type=int, default=2 * REPORTED, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    options.steps = options.steps or (60 if options.quick else 200)
    options.rounds = options.rounds or (3 if options.quick else 5)
    options.users = options.users or (1200 if options.quick else ctr_data.USERS)
    if options.steps % REPORTED or options.warm_up % REPORTED:
        parser.error(f"--steps is {options.steps}; it must be a multiple of {REPORTED}")
    if options.peers is not None and not options.peers.is_file():
        parser.error(f"--peers is {options.peers}; it must be the interpreter of the peers' environment")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def main(words: Sequence[str] | None = None) -> None:
    """Measure, print and write the figures."""
    options = parsed(words)
    if options.ours:
        return train(options)
    if options.prepare:
        return ctr_data.prepare(options.prepare, options.store)
    figures: dict[str, float] = {"cores": CORES, "threads": options.threads, "gpu": float(options.device == "cuda")}
    with tempfile.TemporaryDirectory() as name:
        steps = (options.warm_up, options.steps, options.rounds)
        plan = Plan(Path(name), options.device, *steps, options.threads, BaselineConfig())
        raw_dir = (options.raw_dir or plan.folder / "raw").resolve()
        if options.raw_dir is None:
            ctr_data.write_raw(raw_dir, options.users)
        figures |= prepared_by(plan, options.peers, raw_dir)
        for model in (options.model,) if options.model else MODELS:
            loader, tried = options.loader or QUICK[model], dict[str, float]()
            if options.peers and not (options.quick or options.loader):
                loader, tried = fastest(plan, options.peers, model)
            figures |= {f"peer_{model}_{n.replace(':', '_')}_seconds": s for n, s in tried.items()}
            figures |= raced(plan, model, options.peers, loader)
    for ratio in [n for n in figures if "ratio_" in n]:
        print(f"{ratio:<26} {figures[ratio]:6.2f}")
    if options.peers is None:
        print("peers: not measured; --peers PYTHON names the interpreter of their environment")
    if options.device == "cpu":
        print("on a GPU: not measured")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
