"""An experiment → stages → keys. Pure: what is there and what is missing is asked of a storage by the caller."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

from rella.artifacts import Artifact, Json, digest
from rella.backbones import lora_targets_for
from rella.config import Experiment, History, Mix, leaves
from rella.errors import InputError
from rella.models import ModelIdentity
from rella.stages import BASELINE, EMBED, MLM, PCA, PREPARE, REIT, RETRIEVE, SCORE, TEXTCTR
from rella.storage import Storage
from rella.wording import Wording, item_part, prompt_part

VERSIONS = {PREPARE: 2, EMBED: 1, PCA: 1, RETRIEVE: 1, REIT: 1, BASELINE: 1, MLM: 1, TEXTCTR: 1, SCORE: 1}
"""Raised when a stage's output changes for the same configuration; part of every key."""

MAX_AUTO_PCA = 512
"""d of §3.2."""
MAX_AUTO_VALID = 2000
ANSWER_TOKENS = 8
"""Room that a prompt leaves for the answer in the model's context."""


@dataclass(frozen=True)
class Stage:
    """One step of an experiment and everything that its result depends on."""

    name: str
    dataset: str
    slug: str
    config: Mapping[str, Json]
    inputs: Mapping[str, Stage] = field(default_factory=dict)
    identity: Mapping[str, Json] = field(default_factory=dict)

    @property
    def version(self) -> int:
        """The algorithm's version."""
        return VERSIONS[self.name]

    @cached_property
    def key(self) -> str:
        """SHA-256 of what changes the result, as 64 hex digits."""
        return digest(
            {
                "stage": self.name,
                "version": self.version,
                "config": dict(self.config),
                "inputs": {name: stage.key for name, stage in self.inputs.items()},
                "identity": dict(self.identity),
            }
        )

    @property
    def path(self) -> str:
        """Where the artifact lies below the storage: `<dataset>/<stage>/<slug>-<12 hex>`."""
        return f"{self.dataset}/{self.name}/{self.slug}-{self.key[:12]}"

    def artifact(self, storage: Storage) -> Artifact:
        """Return the stage's place in `storage`."""
        return Artifact(storage, self.path, self.key)


@dataclass(frozen=True)
class Variant:
    """One row of Table 3: what it trains on and what it is tested on."""

    name: str
    title: str
    mix: Mix = "mixed"
    history: History = "retrieved"
    tuned: bool = True
    half: bool = False

    def apply(self, experiment: Experiment) -> Experiment:
        """Return `experiment` as this variant runs it.

        Raises:
            InputError: half of N asked for, and N is `all`.
        """
        shots = experiment.shots
        if self.half:
            if shots == "all":
                raise InputError("variant half-n needs a number of --shots, not `all`")
            shots = shots // 2
        adapter = experiment.adapter if self.tuned else "none"
        return replace(experiment, mix=self.mix, history=self.history, shots=shots, adapter=adapter)


VARIANTS = {
    v.name: v
    for v in (
        Variant("ours", "ReLLa (Ours)"),
        Variant("wo-mixture", "ReLLa (w/o Mixture)", mix="retrieved"),
        Variant("wo-retrieval", "ReLLa (w/o Retrieval)", mix="original", history="recent"),
        Variant("half-n", "ReLLa (½N-shot)", half=True),
        Variant("wo-it", "ReLLa (w/o IT)", tuned=False),
        Variant("wo-it-retrieval", "ReLLa (w/o IT & Retrieval)", history="recent", tuned=False),
    )
}
"""The rows of Table 3 (§4.5), in its order."""


def chosen_variants(experiment: Experiment) -> list[Variant]:
    """Return the rows of Table 3 that the experiment asks for.

    Raises:
        InputError: an unknown name, with the known ones.
    """
    wanted = experiment.variants
    if wanted == "auto":
        wanted = "all" if experiment.dataset == "sample" else "ours"
    names = list(VARIANTS) if wanted == "all" else [n.strip() for n in wanted.split(",")]
    unknown = [n for n in names if n not in VARIANTS]
    if unknown:
        raise InputError(f"variants: unknown {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    return [VARIANTS[n] for n in names]


def restarted_stages(experiment: Experiment) -> set[str]:
    """Return the words of `restart`: stages, `unfinished`, `all`; nothing for `none`.

    Raises:
        InputError: an unknown word, with the known ones.
    """
    words = {w.strip() for w in experiment.restart.split(",")} - {"", "none"}
    known = (*VERSIONS, "unfinished", "all", "none")
    if words - set(known):
        raise InputError(f"restart: unknown {', '.join(sorted(words - set(known)))}; there are {', '.join(known)}")
    return words


def resolve_auto(experiment: Experiment, model: ModelIdentity) -> Experiment:
    """Return the experiment with every `auto` that enters a key replaced by its value.

    Raises:
        InputError: quantised weights with ZeRO-3; pca_dim above the model's hidden size; prompt.max_tokens above its
            context; K below 1 or above what is retrieved; `lora_targets: auto` for an architecture that is not known.
    """
    e = experiment
    scored_k = e.k if e.score.k == "auto" else e.score.k
    for name, k in (("k", e.k), ("score.k", scored_k)):
        if k < 1:
            raise InputError(f"{name} {k}: a prompt shows at least 1 behaviour; give --{name} 1 or more")
        if k > e.retrieve.k_max:
            raise InputError(f"{name} {k}: retrieval keeps {e.retrieve.k_max} behaviours; raise --retrieve.k-max")
    limit = model.max_positions - ANSWER_TOKENS
    tokens = limit if e.prompt.max_tokens == "auto" else e.prompt.max_tokens
    if tokens > limit:
        raise InputError(f"prompt.max_tokens {tokens}: {model.name} reads at most {limit} before the answer")
    dim = min(MAX_AUTO_PCA, model.hidden_size) if e.pca_dim == "auto" else e.pca_dim
    if dim != "none" and not 0 < dim <= model.hidden_size:
        raise InputError(f"pca_dim {dim}: {model.name} has hidden size {model.hidden_size}")
    if e.quantize != "none" and e.tune.zero_stage == 3 and e.adapter == "auto":
        raise InputError(
            f"quantize {e.quantize}: bitsandbytes' weights cannot be sharded by ZeRO-3: take --tune.zero-stage 2, or "
            "--quantize none, which ZeRO-3 shards in 16 bits"
        )
    targets = e.tune.lora_targets
    if targets == "auto":
        targets = lora_targets_for(model.model_type)
    valid = e.tune.valid_rows
    if valid == "auto":
        valid = MAX_AUTO_VALID if e.shots == "all" else min(e.shots, MAX_AUTO_VALID)
    return replace(
        e,
        pca_dim=dim,
        prompt=replace(
            e.prompt, max_tokens=tokens, template=e.dataset if e.prompt.template == "auto" else e.prompt.template
        ),
        tune=replace(e.tune, valid_rows=valid, lora_targets=targets),
        score=replace(e.score, k=scored_k),
    )


def resolved_autos(asked: Experiment, resolved: Experiment) -> dict[str, Json]:
    """Return the fields that were `auto` in `asked`, with the values they have in `resolved`."""
    before = {name: value for name, value, _ in leaves(asked)}
    return {name: value for name, value, _ in leaves(resolved) if before[name] == "auto" != value}


@dataclass(frozen=True)
class Pipeline:
    """The stages of one experiment."""

    experiment: Experiment
    prepare: Stage
    embed: Stage
    pca: Stage
    retrieve: Stage | None
    """None where neither training nor scoring looks at retrieved behaviours."""
    reit: Stage | None
    """None for zero-shot and for an adapter from outside."""
    score: Stage

    def stages(self) -> Iterator[Stage]:
        """Yield what this experiment needs, inputs before what uses them."""
        yield self.prepare
        if self.retrieve is not None:
            yield from (self.embed, self.pca, self.retrieve)
        if self.reit is not None:
            yield self.reit
        yield self.score


def _config(stage: str, experiment: Experiment) -> dict[str, Json]:
    """The fields that change `stage`'s result; those that this experiment cannot feel stay out."""
    idle = set()
    if experiment.dataset != "sample":
        idle |= {"data.sample_users", "data.sample_seed"}
    if stage == RETRIEVE and experiment.retrieve.samples == "all":
        idle |= {"data.seed", "data.subsets"}
    if stage == SCORE and experiment.test_rows == "all":
        idle |= {"data.seed", "data.subsets"}
    if stage == PREPARE and experiment.data.order != "shuffle" and experiment.data.split_by != "user":
        idle.add("data.shuffle_seed")
    if stage == EMBED and not experiment.embed.wrapped:
        idle.add("prompt.wrapper")
    if experiment.quantize == "none":
        idle.add("quantize")
    return {n: v for n, v, stages in leaves(experiment) if stage in stages and n not in idle}


def prepare_stage(experiment: Experiment, raw: Mapping[str, str]) -> Stage:
    """Return the first stage, which no model has a part in."""
    return Stage(PREPARE, experiment.dataset, "samples", _config(PREPARE, experiment), identity={"raw": dict(raw)})


def build(
    experiment: Experiment,
    raw: Mapping[str, str],
    model: ModelIdentity,
    adapter: str | None = None,
    wording: Wording | None = None,
) -> Pipeline:
    """Return the stages of `experiment`.

    Args:
        experiment: with or without `auto` values.
        raw: digests of the data set's original files.
        model: the resolved base model.
        adapter: digest of an adapter from outside; needed where `experiment.adapter` is a folder.
        wording: the data set's sentences; what they say is part of the keys of every stage that reads them.
    """
    e = resolve_auto(experiment, model)
    said = wording or Wording()
    items = {"model": model.digest, "wording": digest(item_part(said))}
    lm = {"model": model.digest, "wording": digest(prompt_part(said))}
    prepare = prepare_stage(e, raw)
    embed = Stage(EMBED, e.dataset, model.name, _config(EMBED, e), {"data": prepare}, items)
    dimensions = "no-pca" if e.pca_dim == "none" else f"d{e.pca_dim}"
    pca = Stage(PCA, e.dataset, f"{model.name}-{dimensions}", _config(PCA, e), {"pooled": embed})
    neighbours = Stage(
        RETRIEVE,
        e.dataset,
        f"{model.name}-{e.distance}-k{e.retrieve.k_max}",
        _config(RETRIEVE, e),
        {"data": prepare, "vectors": pca},
    )
    tuned = e.adapter == "auto"
    trains_retrieved = tuned and e.mix != "original"
    retrieved = {"neighbours": neighbours} if trains_retrieved or e.history == "retrieved" else {}
    reit = _reit(e, {"data": prepare, **retrieved}, lm, model.name) if tuned else None
    score = _score(e, prepare, neighbours, reit, {**lm, **({"adapter": adapter} if adapter else {})}, model.name)
    return Pipeline(e, prepare, embed, pca, neighbours if retrieved else None, reit, score)


def _reit(e: Experiment, inputs: Mapping[str, Stage], lm: Mapping[str, Json], model: str) -> Stage:
    slug = f"{model}-n{e.shots}-k{e.k}-{e.mix}-seed{e.seed}"
    return Stage(REIT, e.dataset, slug, _config(REIT, e), inputs, lm)


def _score(
    e: Experiment, prepare: Stage, neighbours: Stage, reit: Stage | None, identity: Mapping[str, Json], model: str
) -> Stage:
    inputs = {"data": prepare}
    if e.history == "retrieved":
        inputs["neighbours"] = neighbours
    if reit is not None:
        inputs["adapter"] = reit
    how = f"n{e.shots}-{e.mix}-seed{e.seed}" if reit else ("adapter" if "adapter" in identity else "zero-shot")
    slug = f"{model}-{how}-k{e.score.k}-{e.history}-{e.score.split}-{e.test_rows}"
    return Stage(SCORE, e.dataset, slug, _config(SCORE, e), inputs, identity)


def settings(experiment: Experiment) -> dict[str, Json]:
    """Return the fields that change no result, for the manifest."""
    return {name: value for name, value, stages in leaves(experiment) if not stages}


def as_json(model: ModelIdentity) -> dict[str, Json]:
    """Return the model's identity for the manifest."""
    return asdict(model)
