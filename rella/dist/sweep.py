"""Sweeps: upstream stages once, then a trial a setting; the best of each N, as a table and as files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rella.artifacts import Json
from rella.cli import Resolved
from rella.config import Values, leaves
from rella.dist.figures import Figures, estimates, full_shot
from rella.dist.run import Runner
from rella.dist.sweep_trials import Sweep, pipeline_of, room_for_trials, run_trials
from rella.provenance import code_version
from rella.report.tables import METRICS
from rella.stages import RETRIEVE
from rella.sweep import Finished, best_by_shots, trials_of, yaml_of
from rella.sweep_config import Shots, SweepConfig

KEPT_FIELDS = ("dataset", "raw_dir", "model", "revision")
"""Fields of no stage's own that a file for `--config` holds all the same."""


def sweep(runner: Runner, resolved: Resolved) -> Figures:
    """Try every setting; print and write the best of each N.

    Raises:
        ClusterError: no trial fits the cluster, or some failed; the same command goes on where it was.
    """
    config = resolved.sweep or SweepConfig()
    if config.method != "reit":
        resolved = full_shot(resolved)
    trials = trials_of(config, resolved.experiment)
    own = Sweep(runner, config, resolved, trials, [pipeline_of(runner, config, t.experiment) for t in trials])
    runner.say(f"sweep     {len(trials)} trials of {config.method}, space {config.space}")
    left = own.left()
    runner.say(f"sweep     found  {len(own.keys) - len(left)} trials that were finished before")
    # What does not fit is to be said before anything is computed.
    at_once = room_for_trials(runner, config) if left else 0
    runner.run(own.pipelines, until=RETRIEVE)
    if left:
        run_trials(own, left, at_once)
    return _told(own, [own.finished(n) for n in range(len(trials))])


def _told(own: Sweep, finished: Sequence[Finished]) -> Figures:
    """Print the table and the curve, write the files, return the figures."""
    runner, best = own.runner, best_by_shots(finished)
    chosen = {n: own.pipelines[list(finished).index(one)] for n, one in best.items()}
    if own.config.test:
        runner.run(list(chosen.values()))
    own.folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Json]] = []
    for n, one in best.items():
        row: dict[str, Json] = {"shots": n, **one.trial.values, "valid_auc": round(one.valid["auc"], 6)}
        if own.config.test:
            found = estimates(runner, chosen[n])
            row |= {f"test_{m}": round(getattr(found, m).value, 6) for m in METRICS}
            row |= {f"test_{m}_se": round(getattr(found, m).standard_error, 6) for m in METRICS}
        rows.append(row | {"config": str(_write(own, n, one))})
    body = {
        "method": own.config.method,
        "sweep": asdict(own.config),
        "best": rows,
        "trials": [_line(one) for one in finished],
        "code": code_version(),
    }
    (own.folder / "sweep.json").write_text(json.dumps(body, indent=1) + "\n")
    print("\n" + _table(own, rows))
    return {"method": own.config.method, "trials": len(finished), "best": rows, "file": str(own.folder / "sweep.json")}


def _line(one: Finished) -> dict[str, Json]:
    return {**one.trial.values, "shots": one.trial.shots, "valid": dict(one.valid), "seconds": one.seconds,
            "stopped": one.stopped, "artifact": one.artifact}  # fmt: skip


def _write(own: Sweep, n: Shots, one: Finished) -> Path:
    """Write the file that runs the best setting of an N again."""
    job = "jobs/reit.py" if own.config.method == "reit" else f"jobs/baseline.py --model {own.config.method}"
    file = own.folder / f"best-n{n}.yaml"
    note = f"best of {own.config.space} at N = {n}: validation AUC {one.valid['auc']:.6f}; {job} --config {file}"
    file.write_text(yaml_of(one.trial, _said(own.resolved), note))
    return file


def _said(resolved: Resolved) -> Values:
    """Return what the sweep's user set and a file for `--config` has to say again."""
    e = resolved.experiment
    set_ = {
        name for name, source in resolved.sources.items() if source.split()[0] in ("flag", "file", "preset", "call")
    }
    found = {
        name: value
        for name, value, stages in leaves(e)
        if name in set_ and (stages or name in KEPT_FIELDS) and name != "dataset_file"
    }
    return {**found, "dataset": e.dataset_file or e.dataset, "model": e.model}


def _table(own: Sweep, rows: Sequence[Mapping[str, Json]]) -> str:
    """Return the best of each N as a table."""
    names = [n for n in rows[0] if n not in ("shots", "config") and not n.endswith("_se")] if rows else []
    shown = [["N", *(n.rpartition(".")[2] for n in names)]]
    shown += [
        [str(r["shots"]), *(f"{r[n]:.4f}" if "auc" in n or "test" in n else f"{r[n]:g}" for n in names)] for r in rows
    ]
    widths = [max(len(line[i]) for line in shown) for i in range(len(shown[0]))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in shown]
    e = own.runner.experiment
    title = (
        f"{own.config.method} on {e.dataset}, K = {e.k}: best of each N by validation AUC ({len(own.trials)} trials)"
    )
    return "\n".join([title, *lines])
