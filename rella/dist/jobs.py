"""What every script in `jobs/` does around its one call: parse, show the configuration, run, sum up in a JSON line."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from rella.artifacts import Artifact
from rella.baseline_pipeline import refuse_idle
from rella.baselines import as_text
from rella.cli import Resolved, parse, resolve
from rella.config import DATASETS, Experiment
from rella.data.facts import checks, table1_text
from rella.dist.figures import Figures, estimates, full_shot
from rella.dist.run import Runner
from rella.errors import ArtifactError, InputError, RellaError, WorkerError
from rella.pipeline import Pipeline, Variant, chosen_variants
from rella.report.tables import METRICS, Row, table3

MOST_LINES = 12
"""Of the text of an error that the program does not know."""


def main(
    name: str,
    description: str,
    action: Callable[[Runner], Figures] | Callable[[Runner, Resolved], Figures],
    argv: Sequence[str] | None = None,
    adjust: Callable[[Resolved], Resolved] = lambda resolved: resolved,
    group: str = "",
) -> int:
    """Run one job and return its exit status; the last line of output is a JSON object with its figures.

    `adjust` has the last word on what nobody has set; a job with a `group` of flags of its own gets all.

    0: done; 1: something that the user can mend; 2: a wrong flag; 3: a fault of the program; 130: interrupted.
    """
    started = time.monotonic()
    try:
        resolved = adjust(parse(argv, f"jobs/{name}.py", description, group))
        _announce(resolved)
        with Runner(resolved.experiment) as runner:
            arguments = (runner, resolved) if group else (runner,)
            figures = _instead(runner, name, resolved) or action(*arguments)
    except Exception as error:
        if os.environ.get("RELLA_DEBUG"):
            raise
        return _explain(name, error)
    except KeyboardInterrupt:
        print(f"\n{name}: stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    e = resolved.experiment
    seconds = round(time.monotonic() - started, 1)
    summary = {"job": name, "dataset": e.dataset, "model": e.model, **figures, "seconds": seconds}
    print(json.dumps(summary), flush=True)
    return 0


def _explain(name: str, error: Exception) -> int:
    """Print one screen about an error and return the exit status; the traceback of a fault goes to a file."""
    from rella.dist.session import explained

    known = explained(error)
    if isinstance(known, RellaError) and not (isinstance(known, WorkerError) and not known.ours):
        print(f"\n{name}: {known}\n(RELLA_DEBUG=1 shows where it happened)", file=sys.stderr)
        return 1
    lines = (str(known) or type(known).__name__).splitlines()
    shown = "\n".join(lines[:MOST_LINES] + ["..."] * (len(lines) > MOST_LINES))
    kind = "" if isinstance(known, WorkerError) else f"{type(known).__name__}: "
    trace = "".join(traceback.format_exception(error)) + getattr(known, "trace", "")
    with tempfile.NamedTemporaryFile("w", prefix=f"rella-{name}-", suffix=".log", delete=False) as file:
        file.write(trace)
    print(
        f"\n{name}: unexpected {kind}{shown}\nThis is a fault of the program or of its environment, and not of what "
        f"you asked for; the same command goes on where it was. Traceback: {file.name}",
        file=sys.stderr,
    )
    return 3


def _announce(resolved: Resolved) -> None:
    print(f"Configuration\n{resolved.describe()}\n", flush=True)


def prepare_job(runner: Runner) -> Figures:
    """Raw files to users, items, interactions and samples; prints Table 1."""
    artifact = runner.prepare()
    e, facts = runner.experiment, artifact.manifest().facts
    usual = resolve({"dataset": e.dataset, "model": e.model}).experiment.data if e.dataset in DATASETS else e.data
    known = checks(e.dataset, facts, e.data, usual)
    print(f"\nTable 1\n{table1_text(e.dataset, facts, known)}\n")
    own = runner.source.own
    if own is not None and own.interactions.time is None and e.data.split_by == "time":
        print("Without a time column the split follows the file's rows; --data.split-by user cuts by user.\n")
    return {**_facts(artifact), **({"facts_that_differ": [c.name for c in known if not c.holds]} if known else {})}


def _instead(runner: Runner, name: str, resolved: Resolved) -> Figures | None:
    """Do what is asked for in place of the job, if anything is."""
    if resolved.plan:
        return plan_job(runner, name, resolved.plan)
    return show_job(runner, resolved.show) if resolved.show else None


def plan_job(runner: Runner, name: str, described: str) -> Figures:
    """What the job would take on a cluster; only the data set is prepared where it is missing."""
    from rella.dist.plan import planned
    from rella.hardware import GIB, read_cluster
    from rella.plan_text import plan_lines

    cluster = read_cluster(described)
    runner.prepare()
    plans, note = planned(runner, cluster, name)
    print(f"\nPlan of jobs/{name}.py on {cluster}; {note}")
    for line in plan_lines(plans, cluster):
        print(line)
    room = cluster.each.memory_gib * GIB
    stages = [
        {"stage": p.title, "seconds": round(p.seconds, 1), "bytes": p.peak, "fits": p.peak <= room} for p in plans
    ]
    return {"plan": str(cluster), "stages": stages}


def show_job(runner: Runner, n: int) -> Figures:
    """A few samples as the model reads them; only the data set is prepared where it is missing."""
    from rella.dist.show import shown_samples

    data, pipeline = runner.prepare(), runner.pipeline(replace(runner.experiment, history="retrieved"))
    found = None if pipeline.retrieve is None else pipeline.retrieve.artifact(runner.storage)
    neighbours = found if found is not None and found.is_complete() else None
    wording = runner.source.wording(runner.experiment)
    print()
    n = min(n, int(data.manifest().facts[pipeline.experiment.score.split]))
    for text in shown_samples(pipeline, data, neighbours, runner.model, wording, n):
        print(text)
    return {"shown": n}


def embed_job(runner: Runner) -> Figures:
    """Items to semantic vectors."""
    pipeline = runner.pipeline(replace(runner.experiment, history="retrieved"))
    runner.run([pipeline], until=pipeline.pca.name)
    return _stage_figures(runner, pipeline, "embed", "pca")


def retrieve_job(runner: Runner) -> Figures:
    """Samples to their most similar behaviours."""
    pipeline = runner.pipeline(replace(runner.experiment, history="retrieved"))
    runner.run([pipeline], until="retrieve")
    return _stage_figures(runner, pipeline, "retrieve")


def score_job(runner: Runner) -> Figures:
    """One set of scores, with any adapter or none.

    Raises:
        ArtifactError: `adapter` is `auto` and the experiment's adapter has not been tuned.
    """
    pipeline = runner.pipeline(runner.experiment)
    if pipeline.reit is not None and not pipeline.reit.artifact(runner.storage).is_complete():
        raise ArtifactError(
            f"there is no adapter at {pipeline.reit.artifact(runner.storage).where()}: tune it with jobs/reit.py and "
            "the same flags, give a PEFT folder with --adapter, or say --adapter none for zero-shot"
        )
    runner.run([pipeline])
    found = estimates(runner, pipeline)
    shown = {m: round(getattr(found, m).value, 6) for m in METRICS}
    spread = {f"{m}_se": round(getattr(found, m).standard_error, 6) for m in METRICS}
    print("\n" + table3([Row(pipeline.score.slug, [found])], caption(runner, pipeline)))
    artifact = pipeline.score.artifact(runner.storage)
    return {**shown, **spread, "rows": artifact.manifest().rows, "scores": artifact.where()}


def reit_job(runner: Runner) -> Figures:
    """The main job: the rows of Table 3 that are asked for, for every seed."""
    experiment, variants = runner.experiment, chosen_variants(runner.experiment)
    if experiment.adapter != "auto":
        raise InputError(f"--adapter {experiment.adapter}: jobs/reit.py tunes adapters; score one with jobs/score.py")
    runs = {v.name: _by_seed(runner, v) for v in variants}
    pipelines = [p for by_seed in runs.values() for p in by_seed]
    runner.run(pipelines)
    rows = [Row(v.title, [estimates(runner, p) for p in runs[v.name]]) for v in variants]
    print("\n" + table3(rows, caption(runner, pipelines[0])))
    _say_where(runner, {v: runs[v.name] for v in variants})
    table = {
        v.name: {m: round(row.mean(m), 6) for m in METRICS} | {"seeds": [round(x, 6) for x in row.values("auc")]}
        for v, row in zip(variants, rows, strict=True)
    }
    return {"variants": table, "rows": pipelines[0].score.artifact(runner.storage).manifest().rows}


def sweep_job(runner: Runner, resolved: Resolved) -> Figures:
    """Many settings, the best of each N, and the curve over N."""
    from rella.dist.sweep import sweep

    return sweep(runner, resolved)


def report_job(runner: Runner, resolved: Resolved) -> Figures:
    """Tables and figures of the paper."""
    from rella.dist.report import report

    return report(runner, resolved)


def report_words(argv: Sequence[str]) -> list[str]:
    """Return a report's command line with the names in front, `table2 figure7`, as the flag that they stand for."""
    first = next((n for n, word in enumerate(argv) if word.startswith("-")), len(argv))
    named = [name for word in argv[:first] for name in word.split(",")]
    return [*([f"--report.what={json.dumps(named)}"] if named else []), *argv[first:]]


WORDS = {
    "--model": "--baseline.model",
    "--search": "--baseline.search",
    "--base": "--textctr.base",
    "--lm": "--model",
}
"""What `jobs/baseline.py` understands by these flags: there the model is the baseline, the LLM lends its vectors."""


def baseline_words(argv: Sequence[str]) -> list[str]:
    """Return a baseline job's command line in the words that all jobs share."""
    split = (word.partition("=") for word in argv)
    return [WORDS.get(flag, flag) + mark + value for flag, mark, value in split]


def baseline_settings(resolved: Resolved) -> Resolved:
    """Return what a baseline job runs: full-shot unless somebody set N.

    Raises:
        InputError: a flag that the chosen baseline does not feel.
    """
    refuse_idle(resolved.experiment, {name for name, source in resolved.sources.items() if source == "flag"})
    return full_shot(resolved)


def baseline_job(runner: Runner) -> Figures:
    """One baseline of Table 2, for every seed; beside it the floor."""
    from rella.dist.fit_ctr import floor

    e = runner.experiment
    pipelines = [runner.baseline(replace(e, seed=seed)) for seed in range(e.seed, e.seed + e.seeds)]
    runner.run(pipelines)
    first, title = pipelines[0], _baseline_title(runner)
    row = Row(title, [estimates(runner, p) for p in pipelines])
    runner.connect()
    facts = [p.baseline.artifact(runner.storage).manifest() for p in pipelines]
    trained, of = facts[0].facts["rows"], first.prepare.artifact(runner.storage).manifest().facts["train"]
    least = floor(runner.share(first, False), replace(first.experiment, shots="all" if trained == of else trained))
    spread = f"over {e.seeds} training seeds" if e.seeds > 1 else "bootstrap over users, 1 training seed"
    rows = first.score.artifact(runner.storage).manifest().rows
    said = (
        f"{e.dataset}, {e.score.split} split, {rows:,} rows ({'all' if e.test_rows == 'all' else 'a seeded subset'}); "
        f"K = {e.k}, N = {e.shots}, {_trained(e, trained, of)}; best step on {e.tune.select_on}; ± {spread}"
    )
    print("\n" + table3([row], said))
    print(f"Floor (shrunk means of user and item): AUC {least['auc']:.4f}, log loss {least['log_loss']:.4f}, "
          f"accuracy {least['accuracy']:.4f}\n\nArtifacts")  # fmt: skip
    for pipeline in pipelines:
        print(f"  scores   {pipeline.score.artifact(runner.storage).where()}")
        print(f"  weights  {pipeline.baseline.artifact(runner.storage).where()}")
    base = {} if as_text(e.baseline.model) is None else {"base": runner.text_base.name, "train_rows": trained}
    return {
        "baseline": title,
        **base,
        **{m: round(row.mean(m), 6) for m in METRICS},
        "seeds": [{m: round(v, 6) for m, v in zip(METRICS, values, strict=True)}
                  for values in zip(*(row.values(m) for m in METRICS), strict=True)],
        "floor": {m: round(v, 6) for m, v in least.items()},
        "parameters": facts[0].facts["parameters"],
        "rows_per_second": [f.facts["rows_per_second"] for f in facts],
        "rows": rows,
    }  # fmt: skip


def _baseline_title(runner: Runner) -> str:
    """What a table calls the baseline: with SIM's search, or with the pretrained model."""
    model = runner.experiment.baseline.model
    if as_text(model) is not None:
        return f"{model} ({runner.text_base.name})"
    return f"{model} ({runner.experiment.baseline.search})" if model == "sim" else model


def _trained(experiment: Experiment, rows: int, of: int) -> str:
    """What a table says of the rows that a baseline was trained on, and of a limit that somebody has set."""
    limit = experiment.textctr.max_train_rows
    limited = as_text(experiment.baseline.model) is not None and limit == rows != experiment.shots
    which = f"all {of:,} training rows" if rows == of else f"{rows:,} of {of:,} training rows"
    return which + (" (textctr.max_train_rows)" if limited and rows < of else "")


def _by_seed(runner: Runner, variant: Variant) -> list[Pipeline]:
    """One pipeline a training seed; zero-shot has nothing to seed."""
    e = runner.experiment
    seeds = range(e.seed, e.seed + (e.seeds if variant.tuned else 1))
    return [runner.pipeline(variant.apply(replace(e, seed=seed))) for seed in seeds]


def caption(runner: Runner, pipeline: Pipeline) -> str:
    """Return what a table of scores is about: data, split, rows, model, K, N, seeds."""
    e = pipeline.experiment
    rows = pipeline.score.artifact(runner.storage).manifest().rows
    which = "all" if e.test_rows == "all" else "a seeded subset"
    spread = f"over {e.seeds} training seeds" if e.seeds > 1 else "bootstrap over users, 1 training seed"
    chosen = f"best step on {e.tune.select_on}"
    return (
        f"{e.dataset}, {e.score.split} split, {rows:,} rows ({which}); {runner.model.name}, K = {e.score.k}, "
        f"N = {e.shots}; {chosen}; ± {spread}"
    )


def _say_where(runner: Runner, runs: Mapping[Variant, Sequence[Pipeline]]) -> None:
    print("\nArtifacts")
    for variant, pipelines in runs.items():
        for pipeline in pipelines:
            print(f"  {variant.title:<28} scores   {pipeline.score.artifact(runner.storage).where()}")
            if pipeline.reit is not None:
                print(f"  {'':<28} adapter  {pipeline.reit.artifact(runner.storage).where('adapter')}")
    if runner.experiment.dataset == "sample":
        print("\nThe paper's: python jobs/reit.py --dataset ml-1m --model vicuna-13b")
    print()


def _stage_figures(runner: Runner, pipeline: Pipeline, *names: str) -> Figures:
    figures: Figures = {}
    for stage in (s for s in pipeline.stages() if s.name in names):
        figures |= _facts(stage.artifact(runner.storage))
    return figures


def _facts(artifact: Artifact) -> Figures:
    manifest = artifact.manifest()
    return {manifest.stage: artifact.where(), **{k: v for k, v in manifest.facts.items() if isinstance(v, int | float)}}
