"""Tables 6 and 9 and Figure 8: what is computed from the data and from the models themselves, in workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from rella.artifacts import Artifact
from rella.dist.dataset import read_tables
from rella.dist.fit_ctr import BaselineScoreTask, BaselineScoreWorker
from rella.dist.remote_progress import ProgressHandle, RemoteProgress
from rella.dist.run import Runner
from rella.dist.score import ScoreTask, ScoreWorker
from rella.dist.session import resources
from rella.dist.work import baseline_score_task, lm_score_task
from rella.models import ModelIdentity
from rella.paper.numbers import K_LIST, numbers
from rella.report.contents import Cell, Column, Heat, HeatRow, Row, Table, Value
from rella.stages import RETRIEVE

if TYPE_CHECKING:
    from rella.analysis.attention import BehaviourAttention
    from rella.analysis.complexity import Complexity
    from rella.dist.report_setup import ReportSetup

CTR_BATCH, LM_BATCH = 512, 4
"""Rows of a batch in Table 6."""
LM_PROMPTS = 60
"""Batches of prompts that are gone through."""

# --- Table 9 --------------------------------------------------------------------------------------------------------


def heterogeneity_table(own: ReportSetup) -> Table:
    """Return the mean number of genres among K recent and K retrieved behaviours of the test rows (Appendix D.4)."""
    pipeline = own.measurements.pipeline(own.zero().by_seed()[0])
    if pipeline.retrieve is None:
        raise RuntimeError("retrieved behaviours without a retrieve stage")
    storage, e = own.runner.storage, own.runner.experiment
    lengths = own.scale.lengths
    own.runner.connect()
    own.runner.run([pipeline], until=RETRIEVE)
    data, neighbours = pipeline.prepare.artifact(storage), pipeline.retrieve.artifact(storage)
    found = ray.get(_heterogeneity.remote(data, neighbours, lengths))
    known = numbers()["table9"] if e.dataset == "ml-1m" else {}
    rows = []
    for key, title in (("recent", "Recent"), ("retrieved", "Retrieved (SUBR)")):
        paper = {k: known[key][K_LIST.index(k)] for k in lengths if known and k in K_LIST}
        cells: dict[str, Cell] = {str(k): Value(value, paper=paper.get(k))
                                  for k, value in zip(lengths, found[key], strict=True)}  # fmt: skip
        rows.append(Row(title, cells, ranked=False))
    columns = [Column(str(k), f"K = {k}", "low", ".2f") for k in lengths]
    caption = f"{e.dataset}, all {found['rows']:,} test rows; vectors of {own.runner.model.name}, {e.distance}"
    return Table("table9", "Table 9: heterogeneity, the mean number of different genres", caption, columns, rows)


@ray.remote(num_cpus=1)
def _heterogeneity(data: Artifact, neighbours: Artifact, lengths: tuple[int, ...]) -> dict[str, object]:
    from rella.analysis.heterogeneity import first_genres, recent_kinds, retrieved_kinds
    from rella.data.questions import Neighbours
    from rella.data.selection import choose, split_ids
    from rella.data.tables import column

    tables = read_tables(data)
    rows = choose(tables.samples, split_ids(tables.samples, "test"))
    name = next(n for n in ("genre", "author", "category") if n in tables.items.schema.names)
    kinds = first_genres(tables.items.column(name).to_pylist())[column(tables.interactions, "item")]
    first, near = column(tables.users, "offset")[rows.user], Neighbours.from_table(neighbours.read())
    recent = [float(recent_kinds(kinds, first, rows.end, k).mean()) for k in lengths]
    closest = [float(retrieved_kinds(kinds, first, rows.end, k, rows.sample_id, near).mean()) for k in lengths]
    return {"recent": recent, "retrieved": closest, "rows": len(rows)}


# --- Table 6 --------------------------------------------------------------------------------------------------------


def complexity_table(own: ReportSetup) -> Table:
    """Return parameters and time of a batch of SIM and ReLLa, measured on one worker (Appendix D.2)."""
    runner, batches = own.runner, own.config.batches
    runner.connect()
    sim, ours = (own.measurements.job(run) for run in (own.maker.fitted("sim"), own.ours()))
    with RemoteProgress("table6", 2, "models") as progress:
        worker = _task(runner, _complexity)
        rows: list[Complexity] = ray.get(
            worker.remote(
                baseline_score_task(runner, sim), lm_score_task(runner, ours), runner.model, batches, progress.handle
            )
        )
    known = numbers()["table6"] if runner.experiment.dataset == "ml-1m" else {}
    columns = [Column("parameters", "Parameters", None, ",.0f"), Column("trainable", "Trainable", None, ",.0f"),
               Column("milliseconds", "Time of a batch (ms)", "low", ",.2f"), Column("what", "A batch")]  # fmt: skip
    lines = []
    for row in rows:
        paper = known.get(row.name, (None, None, None))
        cells: dict[str, Cell] = {
            name: Value(float(getattr(row, name)), paper=number)
            for name, number in zip(("parameters", "trainable", "milliseconds"), paper, strict=True)
        }
        lines.append(Row(row.name, cells | {"what": row.what}, ranked=False))
    notes = [f"Median of {batches} batches after 5 to warm up. Trainable: what the optimiser holds."]
    e = runner.experiment
    caption = f"{e.dataset}; {rows[0].device}; {own.scale.title(e.model)}, K = {e.k}"
    if known:
        notes.append("The paper: an RTX 4090; its 650 million trainable parameters are not what LoRA of rank 8 holds.")
    return Table("table6", "Table 6: complexity", caption, columns, lines, notes)


def _task(runner: Runner, function: Any) -> Any:  # noqa: ANN401 - a remote function
    """Return a remote function with what one worker is given."""
    group = resources(runner.experiment.cluster)
    return function.options(num_cpus=group.cpus, num_gpus=group.gpus)


@ray.remote
def _complexity(
    sim: BaselineScoreTask, ours: ScoreTask, model: ModelIdentity, batches: int, progress: ProgressHandle
) -> list[Complexity]:
    from rella.analysis.complexity import ctr_complexity, lm_complexity
    from rella.data.questions import questions
    from rella.lm.loading import best_device

    cpus = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))
    fitted = BaselineScoreWorker([sim], cpus, progress)
    data, network, samples = fitted.of(0)
    batch = min(CTR_BATCH, len(samples))
    found = [ctr_complexity("SIM", network, data.batches(samples, best_device().type == "cuda"), batch, batches)]
    progress.report(1)
    scoring = ScoreWorker([ours], model, cpus, progress)
    catalogue, samples, neighbours = scoring.data(0)
    e, reader = ours.experiment, scoring.reader(ours)
    few = samples.rows(0, min(len(samples), LM_BATCH * LM_PROMPTS))
    prompts = reader.encoder().encode(questions(catalogue, few, e.history, neighbours, int(e.score.k)))
    pad = int(scoring.tokenizer.pad_token_id)
    found.append(lm_complexity("ReLLa", scoring.adapted(0), prompts, reader.answers().pair, pad, LM_BATCH, batches))
    progress.report(1)
    return found


# --- Figure 8 -------------------------------------------------------------------------------------------------------


def figure8(own: ReportSetup) -> Heat:
    """Return what the target's title attends to, for the base, ReLLa zero-shot and few-shot (§4.6).

    The case: the scored row whose true label ReLLa (few-shot) is surer of than the base by most.
    """
    from rella.analysis.attention import largest_gain

    runner, e = own.runner, own.runner.experiment
    runner.connect()
    runs = {f"{own.scale.title(e.model)}": own.base(), "ReLLa (zero-shot)": own.zero(), "ReLLa (few-shot)": own.ours()}
    ids, labels, before = own.measurements.scores(own.base())
    after = own.measurements.scores(own.ours())[2]
    case = largest_gain(labels, before, after)
    tasks = [lm_score_task(runner, own.measurements.job(run)) for run in runs.values()]
    with RemoteProgress("figure8", len(tasks), "prompts") as progress:
        worker = _task(runner, _attention)
        found: list[BehaviourAttention] = ray.get(worker.remote(tasks, runner.model, int(ids[case]), progress.handle))
    rows = [
        HeatRow(
            title, [f"{t} ({r})" if r else t for t, r in zip(one.titles, one.ratings, strict=True)], one.values.tolist()
        )
        for title, one in zip(runs, found, strict=True)
    ]
    probabilities = ", ".join(f"{title} {own.measurements.scores(run)[2][case]:.3f}" for title, run in runs.items())
    said = "liked" if labels[case] else "not liked"
    notes = [
        f"Target: {found[0].target}, {said}. P(yes): {probabilities}.",
        "Attention of the target title's tokens at the last layer, mean over heads and tokens, summed over a "
        "behaviour's tokens; oldest behaviour first; each line has its own scale.",
        f"The case: the one of {len(ids):,} scored rows whose label few-shot ReLLa is surer of than the base by most.",
    ]
    caption = f"{e.dataset}, {e.score.split} split, sample {int(ids[case])}; K = {e.k}, N = {own.scale.few[-1]:,}"
    return Heat("figure8", "Figure 8: attention to the behaviours", caption, rows, notes)


@ray.remote
def _attention(
    tasks: list[ScoreTask], model: ModelIdentity, sample: int, progress: ProgressHandle
) -> list[BehaviourAttention]:
    from rella.analysis.attention import target_attention
    from rella.data.questions import questions

    cpus = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))
    worker, found = ScoreWorker(tasks, model, cpus, progress), []
    for number, task in enumerate(tasks):
        catalogue, samples, neighbours = worker.data(number)
        row = int(np.searchsorted(samples.sample_id, sample))
        asked = questions(
            catalogue, samples.rows(row, row + 1), task.experiment.history, neighbours, int(task.experiment.score.k)
        )
        found.append(target_attention(worker.adapted(number), worker.reader(task), asked[0]))
        progress.report(1)
    return found
