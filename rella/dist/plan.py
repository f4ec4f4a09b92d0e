"""`--plan CLUSTER`: what a job would take there, from the real prompts, before anything but the data is made."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rella import plan
from rella.backbones import BACKBONES, backbone_of
from rella.config import Experiment
from rella.data.fewshot import Purpose
from rella.data.questions import Catalogue, questions
from rella.data.selection import SubsetRule, choose, split_subset
from rella.data.tables import Tables, column
from rella.dist.context import Context
from rella.dist.dataset import catalogue_of, read_tables
from rella.errors import InputError
from rella.hardware import GIB, ClusterPlan
from rella.lm.lengths import Counter, counter_for
from rella.lm.micro import Limits, cut
from rella.models import ModelIdentity
from rella.pipeline import Pipeline, Stage, build, chosen_variants
from rella.plan_text import StagePlan
from rella.shapes import Shape, shape_of
from rella.stages import EMBED, REIT, RETRIEVE, SCORE

DRAWN = 2000
"""Prompts, and item sentences, whose tokens are counted."""
COMFORTABLE = 0.95
"""Of a card's memory: what a setting that is proposed takes at most."""
STEPS = 20
"""Steps whose batches are cut into passes to see how large a pass gets."""


def base_model(runner: Context) -> tuple[ModelIdentity, Shape]:
    """Return the base and its size; for a backbone of the paper nothing is downloaded.

    Raises:
        MissingError: it is no preset, no folder, and not to be had from the hub.
        InputError: an architecture whose size is not known.
    """
    e = runner.experiment
    preset = BACKBONES.get(e.model) or backbone_of(e.model)
    if preset is not None and e.revision is None and preset.revision is not None:
        # As the hub would name it: a pinned commit holds one config.json.
        name, fields = preset.source.rpartition("/")[2].lower(), preset.architecture
        sizes = int(fields["hidden_size"]), int(fields["max_position_embeddings"])
        model = ModelIdentity(name, preset.source, preset.revision, preset.revision, *sizes, preset.model_type)
        return model, shape_of(fields, preset.model_type)
    return runner.model, shape_of(_config_of(runner.model), runner.model.model_type)


def _config_of(model: ModelIdentity) -> dict[str, Any]:
    folder = Path(model.place)
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download

        folder = Path(hf_hub_download(model.source, "config.json", revision=model.revision)).parent
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@dataclass
class Planner:
    """Plans the stages of a job on a cluster."""

    runner: Context
    cluster: ClusterPlan
    tables: Tables
    model: ModelIdentity
    shape: Shape
    counter: Counter
    _lengths: dict[tuple[str, int], plan.Lengths] = field(default_factory=dict)

    @cached_property
    def catalogue(self) -> Catalogue:
        """What prompts are made of."""
        return catalogue_of(self.tables, self.counter.wording, self.counter.display)

    def workers(self, e: Experiment) -> int:
        """Return the workers of a stage: one a card, unless a number is asked for."""
        return self.cluster.workers if e.cluster.workers == "auto" else min(e.cluster.workers, self.cluster.workers)

    @property
    def room(self) -> int:
        """Bytes of one card."""
        return int(self.cluster.each.memory_gib * GIB)

    @property
    def comfortable(self) -> int:
        """Bytes that a changed setting may take."""
        return int(COMFORTABLE * self.room)

    def setting(self, e: Experiment, tokens: int, rows: int = 1) -> plan.Setting:
        """Return what decides a worker's memory in a pass of `tokens` and `rows`."""
        return plan.Setting(
            width=plan.BYTES[e.precision],
            tokens=tokens,
            rows=rows,
            workers=self.workers(e),
            zero_stage=e.tune.zero_stage,
            recomputed=e.tune.gradient_checkpointing,
            dropout=e.tune.lora_dropout,
            rank=e.tune.lora_rank,
            targets=self.shape.targets(e.tune.lora_targets),
            gpu=self.cluster.each.gpu,
            quantize=e.quantize,
            split=e.cluster.base_workers,
        )

    def prompts(self, e: Experiment, split: Purpose, n: int, k: int) -> plan.Work:
        """Return `n` prompts of a split; a seeded part of them is worded and counted."""
        name = (split, k)
        if name not in self._lengths:
            ids = split_subset(self.tables.samples, split, min(n, DRAWN), SubsetRule.of(e))
            chosen = choose(self.tables.samples, ids)
            self._lengths[name] = self.counter.prompts(questions(self.catalogue, chosen, "recent", None, k))
        return plan.Work(n, self._lengths[name])

    def embed(self, stage: Stage, e: Experiment) -> StagePlan:
        """Plan the embedding of all items (§3.2)."""
        items = self.tables.items
        drawn = np.random.default_rng(0).permutation(len(items))[:DRAWN]
        work = plan.Work(len(items), self.counter.items(items.take(np.sort(drawn)).to_pylist(), e.embed.wrapped))
        what = f"{work.rows:,} sentences of {work.lengths.mean():.0f} tokens, {work.tokens:,.0f} in all"
        return self._forward(stage, e, work, what, e.embed.batch_tokens, False)

    def score(self, stage: Stage, e: Experiment) -> StagePlan:
        """Plan the scoring of the test set (§2.3)."""
        split = e.score.split
        n = self._count(split) if e.test_rows == "all" else int(e.test_rows)
        work = self.prompts(e, split, n, int(e.score.k))
        what = f"{_rows(work)} ({split} split, K = {e.score.k})"
        return self._forward(stage, e, work, what, e.score.batch_tokens, True)

    def _forward(self, stage: Stage, e: Experiment, work: plan.Work, what: str, budget: int, head: bool) -> StagePlan:
        from rella.lm.passes import CPU_TOKENS

        flag, longest = f"--{stage.name}.batch-tokens", int(work.lengths.max())
        budget = budget if self.cluster.each.gpu else min(budget, CPU_TOKENS)
        setting = self.setting(e, max(longest, min(budget, int(work.tokens))))

        def memory(tried: plan.Setting) -> list[plan.Term]:
            return plan.forward_memory(self.shape, tried, head)

        terms = memory(setting)
        fits = plan.total(terms) <= self.room
        changes = [] if fits else plan.forward_changes(memory, setting, self.comfortable, longest, flag)
        return self._timed(stage, e, what, plan.forward_flops(self.shape, work), 1, terms, changes)

    def reit(self, stage: Stage, e: Experiment) -> StagePlan:
        """Plan a tuning run (§3.3): its epochs, and the validation in each."""
        shots = self._count("train") if e.shots == "all" else int(e.shots)
        work = self.prompts(e, "train", shots * (2 if e.mix == "mixed" else 1), e.k)
        work = replace(work, lengths=work.lengths + 2)  # The answer and its point.
        valid = self.prompts(e, e.tune.select_on, min(int(e.tune.valid_rows), self._count(e.tune.select_on)), e.k)
        tokens, rows = self._widest(e, work.lengths)
        setting = self.setting(e, tokens, rows)
        terms = plan.tuning_memory(self.shape, setting)
        fits, longest = plan.total(terms) <= self.room, int(work.lengths.max())
        changes = [] if fits else plan.tuning_changes(self.shape, setting, self.comfortable, longest)
        epochs = min(e.tune.max_epochs, e.tune.stop_after or e.tune.max_epochs)
        flops = plan.tuning_flops(self.shape, work, setting)
        # Scored in the same passes, at the rate of tuning: a little too slow.
        flops += e.tune.valid_per_epoch * plan.forward_flops(self.shape, valid)
        what = f"{_rows(work)} an epoch, {epochs} epochs, batch {e.tune.batch_size}; validation on {valid.rows:,}"
        return self._timed(stage, e, what, flops, epochs, terms, changes)

    def _widest(self, e: Experiment, lengths: plan.Lengths) -> tuple[int, int]:
        """Return tokens and rows of the largest pass in a few steps' batches, cut as `rella.lm.tuning` cuts them."""
        limits = Limits(e.tune.micro_batch_rows, e.tune.micro_batch_tokens, e.tune.packing)
        rng = np.random.default_rng(0)
        batches = [rng.integers(0, len(lengths), e.tune.batch_size) for _ in range(STEPS)]
        drawn = lengths[np.concatenate(batches)]
        found = (1, 1)
        for step in range(STEPS):
            batch = np.arange(step * e.tune.batch_size, (step + 1) * e.tune.batch_size)
            passes = cut(batch, drawn, limits, self.workers(e), e.tune.bucketing)
            sizes = [(limits.cost(drawn[p]), len(p)) for pieces in passes for p in pieces if len(p)]
            found = max(found, *sizes)
        return found

    def retrieve(self, _: Stage, e: Experiment) -> StagePlan:
        """Plan SUBR (§3.2), which runs on CPUs unless it is told otherwise."""
        pairs, cores = (
            int(column(self.tables.samples, "end").sum(dtype=np.int64)),
            self.cluster.cpus * self.cluster.nodes,
        )
        which = "" if e.retrieve.samples == "all" else f", if all were asked for and not {e.retrieve.samples}"
        how = f"15 s + {pairs:,} pairs × {plan.PAIR_SECONDS * 1e9:g} ns / {cores} cores"
        what = f"{len(self.tables.samples):,} samples{which}"
        return StagePlan(RETRIEVE, what, plan.retrieval_seconds(pairs, cores), how)

    def _count(self, split: str) -> int:
        import pyarrow.compute as pc

        return int(pc.sum(pc.equal(self.tables.samples.column("split"), split)).as_py() or 0)

    def _timed(
        self,
        stage: Stage,
        e: Experiment,
        what: str,
        flops: float,
        times: int,
        terms: Sequence[plan.Term],
        changes: Sequence[plan.Change],
    ) -> StagePlan:
        card, workers = self.cluster.each, self.workers(e)
        load = plan.loading(self.shape, self.setting(e, 1))
        took = times * plan.seconds(flops, stage.name, card, workers) + load
        share = plan.SHARE_OF_PUBLISHED[stage.name]
        how = f"{flops:.3g} operations" + (f" × {times}" if times > 1 else "")
        how += f" / ({workers} × {card.tflops:g} TFLOP/s × {share}) + {load:.0f} s to read weights"
        notes = []
        if e.precision == "bfloat16" and not card.bf16:
            notes.append(f"{card.name} has no bfloat16: take --precision float16")
        if plan.total(terms) > self.room and not any("--quantize" not in c.flags for c in changes):
            notes.append(self._too_small(terms, e))
        title = stage.name if stage.name == EMBED else f"{stage.name} {stage.slug}"
        return StagePlan(title, what, took, how, terms, changes, notes)

    def _too_small(self, terms: Sequence[plan.Term], e: Experiment) -> str:
        least = plan.total([t for t in terms if t.name.startswith("weights of the base")])
        smaller = [
            f"--model {name} ({shape.parameters(True) * plan.BYTES[e.precision] / GIB:.1f} GiB of weights)"
            for name, shape in ((b.name, shape_of(b.architecture, b.model_type)) for b in BACKBONES.values())
            if shape.parameters(True) * plan.BYTES[e.precision] < 0.85 * self.room and shape.layers < self.shape.layers
        ]
        said = f"the base's weights alone take {least / GIB:.1f} of {self.room / GIB:.1f} GiB: take larger cards"
        return said + (f", or {' or '.join(smaller)}" if smaller else "")


def _rows(work: plan.Work) -> str:
    n = work.lengths
    return f"{work.rows:,} prompts of {n.mean():.0f} tokens (longest {n.max():,}), {work.tokens:,.0f} in all"


def stages_of(runner: Context, model: ModelIdentity, name: str) -> Iterator[tuple[Stage, Pipeline]]:
    """Yield what a job would make, each stage once.

    Raises:
        InputError: a job without a language model's stages.
    """
    known = (EMBED, RETRIEVE, REIT, SCORE)
    if name not in known:
        raise InputError(f"--plan goes with the jobs {', '.join(known)}")
    e = runner.experiment
    asked = [replace(e, history="retrieved")] if name in (EMBED, RETRIEVE) else [e]
    if name == REIT:
        asked = [
            variant.apply(replace(e, seed=seed))
            for variant in chosen_variants(e)
            for seed in range(e.seed, e.seed + (e.seeds if variant.tuned else 1))
        ]
    made = {EMBED: (EMBED,), RETRIEVE: (EMBED, RETRIEVE), REIT: known, SCORE: (EMBED, RETRIEVE, SCORE)}[name]
    wording = runner.source.wording(e)
    found: dict[str, tuple[Stage, Pipeline]] = {}
    for experiment in asked:
        pipeline = build(replace(experiment, adapter=_no_folder(experiment)), runner.raw, model, None, wording)
        for stage in pipeline.stages():
            if stage.name in made:
                found.setdefault(stage.key, (stage, pipeline))
    yield from sorted(found.values(), key=lambda pair: known.index(pair[0].name))


def _no_folder(experiment: Experiment) -> str:
    return experiment.adapter if experiment.adapter in ("auto", "none") else "none"


def planned(runner: Context, cluster: ClusterPlan, name: str) -> tuple[list[StagePlan], str]:
    """Return the plan of each stage that a job would make, in their order, and where token counts come from.

    Args:
        runner: with the experiment; its data set must be prepared.
        cluster: where it would run.
        name: of the job.
    """
    model, shape = base_model(runner)
    todo = list(stages_of(runner, model, name))
    pipeline = todo[0][1]
    tables = read_tables(pipeline.prepare.artifact(runner.storage))
    counter = counter_for(model, pipeline.experiment.prompt, runner.source.wording(runner.experiment))
    planner = Planner(runner, cluster, tables, model, shape, counter)
    by: dict[str, Callable[[Stage, Experiment], StagePlan]] = {
        EMBED: planner.embed,
        RETRIEVE: planner.retrieve,
        REIT: planner.reit,
        SCORE: planner.score,
    }
    plans = []
    for stage, found_in in todo:
        there = stage.artifact(runner.storage).is_vouched_for()
        plans.append(
            StagePlan(f"{stage.name} {stage.slug}", "is there", 0.0, "")
            if there
            else by[stage.name](stage, found_in.experiment)
        )
    return plans, f"tokens are {counter.how}"
