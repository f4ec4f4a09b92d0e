"""An experiment as typed dataclasses, and the presets that hold the paper's values.

Every field says which stages' results it changes (`stages` in its metadata); those go into the keys of these stages'
artifacts and nowhere else. A field without stages (workers, batch budgets, storage) changes no result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal

from rella.baselines import TEXT_BASELINES, BaselineConfig, TextBaselineConfig
from rella.stages import BASELINE, EMBED, MLM, PCA, PREPARE, REIT, RETRIEVE, SCORE, TEXTCTR, Auto, Precision, Quantize
from rella.stages import changes as _in
from rella.tracking import TrackingConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Mix = Literal["original", "retrieved", "mixed"]
History = Literal["recent", "retrieved"]
Distance = Literal["cosine", "dot", "l2", "l1"]
OnBusy = Literal["wait", "leave"]
Order = Literal["time", "file", "shuffle"]
SplitBy = Literal["time", "user", "column"]
Subsets = Literal["hash", "authors"]


@dataclass(frozen=True)
class DataConfig:
    """From ratings to samples (paper, Appendix B)."""

    positive_above: float = field(default=3.0, metadata=_in(PREPARE))
    """A rating above this many stars is a positive sample."""
    min_history: int = field(default=5, metadata=_in(PREPARE))
    """Samples with fewer earlier behaviours are dropped."""
    order: Order = field(default="time", metadata=_in(PREPARE))
    """Order of a user's behaviours: `time` (ties by user and item), `file` as they come, or `shuffle` by
    `shuffle_seed`, for BookCrossing, which has no time."""
    targets: Literal["every", "last"] = field(default="every", metadata=_in(PREPARE))
    """Which behaviours become samples: `every` one with enough before it, or only each user's `last`."""
    split_by: SplitBy = field(default="time", metadata=_in(PREPARE))
    """What the split cuts: all samples in the order of `time`, the users (`user`, shuffled by `shuffle_seed`), or
    nothing, where your own data has a `column` that says which part a row belongs to."""
    split: tuple[int, int, int] = field(default=(8, 1, 1), metadata=_in(PREPARE))
    """Proportions of train, validation and test. The paper says 8:1 on MovieLens; its code cuts 8:1:1. On BookCrossing
    81:9:10 is 9:1 with a tenth of the training users for validation."""
    shuffle_seed: int = field(default=42, metadata=_in(PREPARE))
    """Seed of both shuffles, which are Python's `random.shuffle`, as in the authors' code."""
    strict: bool = field(default=True, metadata=_in(PREPARE))
    """Whether a rating of an unknown user or item is an error; else it is left out and counted."""
    sample_users: int = field(default=400, metadata=_in(PREPARE))
    """Users of the synthetic data set `sample`; other data sets ignore it."""
    sample_seed: int = field(default=2024, metadata=_in(PREPARE))
    """Seed of the synthetic data set `sample`; other data sets ignore it."""
    seed: int = field(default=42, metadata=_in(RETRIEVE, REIT, BASELINE, MLM, TEXTCTR, SCORE))
    """Chooses the few-shot sets and the subsets of validation and test; all training seeds share them."""
    subsets: Subsets = field(default="hash", metadata=_in(RETRIEVE, REIT, BASELINE, MLM, TEXTCTR, SCORE))
    """How it chooses: nested and uniform by a keyed `hash` of the sample's id, or as the `authors` do (the first N of
    70,000 drawn by `random.sample`; 10,000 on BookCrossing; on MovieLens-25M by pandas, the test rows too)."""


@dataclass(frozen=True)
class EmbedConfig:
    """Item sentences to semantic vectors (§3.2)."""

    pool_bos: bool = field(default=True, metadata=_in(EMBED))
    """Whether the mean over the hidden states includes the first special token."""
    pooling: Literal["mean", "generated"] = field(default="mean", metadata=_in(EMBED))
    """The `mean` over the text's tokens, or, as the authors' hook leaves it, the state of one `generated` token."""
    wrapped: bool = field(default=False, metadata=_in(EMBED))
    """Whether the item's text is put in the conversation template of `prompt.wrapper`, as in the authors' code."""
    batch_tokens: int = 16384
    """Token budget of one forward pass, padding included; halves where a card's memory runs out. A CPU takes at most
    2,048, which its caches hold."""
    shard_items: int = 8192
    """Items in one part."""


@dataclass(frozen=True)
class RetrieveConfig:
    """Semantic user behaviour retrieval, SUBR (§3.2)."""

    k_max: int = field(default=80, metadata=_in(RETRIEVE))
    """Neighbours kept per sample; the top K of any smaller K is a prefix."""
    samples: str = field(default="all", metadata=_in(RETRIEVE))
    """Which samples: `all`, or a comma list of `train`, `valid`, `test`, each with `:N` for its few-shot set or subset
    of N, e.g. `train:2048,valid:2000,test:5000`."""
    shard_pairs: int = 200_000_000
    """(target, earlier behaviour) pairs that a worker takes at a time; what a kill can cost."""
    cut: Literal["auto", "samples", "targets"] = "auto"
    """How the work is cut: into ranges of samples, or by target, so that no target is compared with all items twice,
    and put in order afterwards. `auto`: by target where ranges would repeat many seconds of it."""
    gpu: bool = False
    """Retrieve on GPUs, one worker each, for the same positions; ranges of samples are then the better cut. Not for
    `distance: l1`. Needs numba-cuda."""


@dataclass(frozen=True)
class PromptConfig:
    """What the model reads (Appendix A)."""

    template: str = field(default="auto", metadata=_in(EMBED, REIT, SCORE))
    """Wording: the name of a data set, or `auto` for the experiment's own."""
    variant: Literal["paper", "figure2", "authors"] = field(default="paper", metadata=_in(REIT, MLM, TEXTCTR, SCORE))
    """`paper`: Figures 9 and 10, one wording for both histories. `figure2`: Figure 2's note. `authors`: their code's,
    where on MovieLens-1M the note differs between a sample and its retrieved twin. Other data sets have one wording."""
    wrapper: Literal["vicuna", "native", "plain"] = field(default="vicuna", metadata=_in(EMBED, REIT, SCORE))
    """Conversation template around the prompt: `vicuna` (the paper's for every backbone, D.1.2), the model's own
    (`native`), or `plain`."""
    trailing_blank: bool = field(default=False, metadata=_in(REIT, SCORE))
    """Whether the prompt ends with the blank before the answer (`ASSISTANT: `). In some tokenizers it is a token of its
    own, and the answer moves away from the position that was trained."""
    answer_eos: bool = field(default=False, metadata=_in(REIT))
    """Whether the trained answer ends with the end token."""
    genre: Literal["first", "all"] = field(default="first", metadata=_in(EMBED))
    """Genre in a movie's text: the first listed, or all of them."""
    isbn: bool = field(default=True, metadata=_in(EMBED))
    """Whether a book's text names its ISBN: Figure 11 prints it, §4.1.4 says it is dropped."""
    title_chars: int = field(default=500, metadata=_in(EMBED, REIT, MLM, TEXTCTR, SCORE))
    """Titles and other fields are cut at this many characters (in the paper's data none is as long)."""
    max_tokens: int | Auto = field(default="auto", metadata=_in(REIT, SCORE))
    """Longer prompts lose their oldest behaviours; `auto` is the model's context minus the answer."""


@dataclass(frozen=True)
class TuneConfig:
    """Retrieval-enhanced instruction tuning, ReiT, by LoRA (§3.3, §4.1.4)."""

    learning_rate: float = field(default=1e-3, metadata=_in(REIT))
    """Initial learning rate; falls linearly to 0 at the end of `max_epochs`. The paper: 1e-3 or 1.5e-3."""
    batch_size: int = field(default=128, metadata=_in(REIT))
    """Rows per optimiser step over all workers. The paper: 128 or 256."""
    max_epochs: int = field(default=5, metadata=_in(REIT))
    """Shapes the learning-rate schedule. The paper: 10 on BookCrossing, 5 on MovieLens."""
    stop_after: int | None = field(default=None, metadata=_in(REIT))
    """End after this many epochs of the schedule; the authors' runs stop after about one."""
    patience: int | None = field(default=None, metadata=_in(REIT))
    """End when this many validations in a row have brought no improvement."""
    valid_per_epoch: int = field(default=1, metadata=_in(REIT))
    """Validations in an epoch, evenly spaced; the weights of the best step are kept."""
    weight_decay: float = field(default=0.0, metadata=_in(REIT))
    """AdamW's weight decay."""
    clip: float = field(default=1.0, metadata=_in(REIT))
    """Norm to which gradients are clipped."""
    lora_rank: int = field(default=8, metadata=_in(REIT))
    """Rank of the LoRA update."""
    lora_alpha: int = field(default=16, metadata=_in(REIT))
    """Scale of the LoRA update, alpha / rank."""
    lora_dropout: float = field(default=0.05, metadata=_in(REIT))
    """Dropout on the LoRA branch's input."""
    lora_targets: tuple[str, ...] | Auto = field(default="auto", metadata=_in(REIT))
    """Modules that get an update; `auto` is the model's query and value projections (in Falcon's fused
    `query_key_value` the key rows of the update stay zero)."""
    valid_rows: int | Auto = field(default="auto", metadata=_in(REIT))
    """Seeded validation rows that choose the step; `auto` is min(N, 2000)."""
    select_on: Literal["valid", "test"] = field(default="valid", metadata=_in(REIT, BASELINE, TEXTCTR))
    """Which split chooses the step. `test` reproduces the authors' code; reports say so."""
    micro_batch_rows: int = 16
    """Rows of one forward and backward pass of one worker, at most."""
    micro_batch_tokens: int = 8192
    """Tokens of one forward and backward pass of one worker, padding included, at most (a longer row is alone)."""
    bucketing: bool = True
    """Whether a micro-batch holds rows of similar length (less padding), or rows as they come."""
    packing: bool = False
    """Whether the rows of a micro-batch stand one after the other in one sequence, without any padding; for Llama and
    Mistral."""
    zero_stage: Literal[1, 2, 3] = 2
    """DeepSpeed ZeRO: what is sharded over the workers. 1: optimiser state; 2: gradients too; 3: the base's weights
    too, for cards that do not hold it."""
    checkpoint_seconds: float = 300.0
    """Seconds between two checkpoints, which are taken at a step's end; a killed run loses at most what came after its
    last one. 0 is one every step."""
    gradient_checkpointing: Literal["none", "full"] | int = "none"
    """Which layers' activations are computed again in the backward pass instead of being kept: `none`, all (`full`: a
    fifth of the memory or less, about a third more time), or every n-th."""
    deepspeed: str | None = None
    """A JSON file with more of DeepSpeed's settings, e.g. offload; those in cluster/deepspeed/ say for which card."""


@dataclass(frozen=True)
class ScoreConfig:
    """Pointwise scoring (§2.3) and the test set."""

    split: Literal["train", "valid", "test"] = field(default="test", metadata=_in(SCORE))
    """Which split is scored; `test_rows` then counts its rows."""
    k: int | Auto = field(default="auto", metadata=_in(SCORE))
    """Behaviours in a scored prompt; `auto` is the experiment's K."""
    batch_tokens: int = 16384
    """Token budget of one forward pass, padding included; halves where a card's memory runs out. A CPU takes at most
    2,048, which its caches hold."""
    bucketing: bool = True
    """Whether a forward pass holds prompts of similar length, the longest first (less padding), or as they come."""
    shard_rows: int = 4096
    """Rows in one part."""


@dataclass(frozen=True)
class ClusterConfig:
    """Where the work runs; nothing here changes a result."""

    workers: int | Auto = "auto"
    """Workers of a stage; `auto` is one per GPU, without GPUs one per CPU (at most 8)."""
    gpu: bool | Auto = "auto"
    """Whether workers ask for a GPU; `auto` where the cluster has any."""
    cpus_per_worker: int = 1
    """CPUs (and threads) of one worker."""
    min_workers: int | None = None
    """Training goes on with as few workers as these when others are lost or not there yet, and takes them in, up to
    `workers`, when they come: each time from the last checkpoint. Without it all of `workers` must be there."""
    base_workers: int = 1
    """Workers that share one base in embedding and scoring, each with a part of its weights, for a base that no single
    card holds. Then they are all the workers there are: take a node's cards."""
    max_failures: int = 3
    """How often tuning starts again from its last checkpoint when a worker dies, before the job gives up."""
    on_busy: OnBusy = "wait"
    """When another driver works on the same artifact: wait for it, or leave with a message."""


@dataclass(frozen=True)
class Experiment:
    """One experiment; the names are the paper's. The same words work in every job, in files and in sweeps."""

    dataset: str = field(default="sample", metadata=_in(PREPARE))
    """Data set: `sample` (synthetic, made in seconds), `ml-1m`, `ml-25m`, `bookcrossing`, or a YAML file that describes
    your own data."""
    dataset_file: str | None = None
    """The YAML file of your own data; `--dataset FILE.yaml` sets it."""
    raw_dir: str | None = None
    """Folder or zip with the data set's original files; without it they are downloaded."""
    storage: str | None = None
    """Folder or URI for artifacts; default `$RELLA_STORAGE`, else `~/rella`."""
    model: str = "tiny"
    """Base LLM: a preset (`tiny`, `vicuna-7b`, `vicuna-13b`, `mistral-7b`, `falcon-7b`, `llama-2-70b-chat`), a folder,
    a hub name, or a URI such as s3://bucket/model, which every node copies once. Keys hold the digest of what is in it,
    or the hub's commit, whatever it is called."""
    revision: str | None = None
    """Commit, tag or branch of a hub model; the resolved commit is what keys hold."""
    precision: Precision = field(default="float16", metadata=_in(EMBED, REIT, SCORE))
    """Arithmetic of the frozen base: float16 on V100s, bfloat16 on newer cards, float32 on CPUs."""
    quantize: Quantize = field(default="none", metadata=_in(EMBED, REIT, SCORE))
    """Weights of the frozen base's layers: as `precision` says (`none`), or through bitsandbytes as `int8` (LLM.int8)
    or 4 bits (`nf4`), for cards that do not hold it otherwise; LoRA stays in `precision`. Not for ZeRO-3."""
    k: int = field(default=30, metadata=_in(REIT, BASELINE, MLM, TEXTCTR))
    """K: behaviours in a prompt."""
    shots: int | Literal["all"] = field(default=8192, metadata=_in(REIT, BASELINE, MLM, TEXTCTR))
    """N: few-shot training samples, or `all` for full-shot."""
    mix: Mix = field(default="mixed", metadata=_in(REIT))
    """Training rows: N `original`, N `retrieved`, or both, `mixed` = 2N (§3.3)."""
    history: History = field(default="retrieved", metadata=_in(REIT, SCORE))
    """Behaviours in scored prompts (validation and test): the K most `recent` or the K `retrieved` (SUBR)."""
    test_rows: int | Literal["all"] = field(default="all", metadata=_in(SCORE))
    """Scored rows of the test split: `all`, or a seeded, nested subset of n; every table's caption names it."""
    adapter: str = "auto"
    """What is scored: `auto` = the adapter that this experiment tunes, `none` = zero-shot, or a PEFT folder."""
    distance: Distance = field(default="cosine", metadata=_in(RETRIEVE))
    """Similarity of item vectors (Table 8)."""
    pca_dim: int | Literal["auto", "none"] = field(default="auto", metadata=_in(PCA))
    """Dimensions kept by PCA; `auto` is min(512, the model's hidden size), `none` takes the pooled states as they are
    (as the authors do on BookCrossing)."""
    seed: int = field(default=0, metadata=_in(REIT, BASELINE, MLM, TEXTCTR))
    """Seed of training: order of rows, LoRA initialisation, dropout."""
    seeds: int = 1
    """Train with this many seeds, from `seed` on, and report their mean and spread."""
    restart: str = "none"
    """What to delete and make again first: a comma list of stages (`prepare`, `embed`, `pca`, `retrieve`, `reit`,
    `baseline`, `mlm`, `textctr`, `score`), `unfinished` for parts and checkpoints that a killed job left, `all`, or
    `none`."""
    variants: str = "auto"
    """Rows of Table 3 to run: a comma list of `ours`, `wo-mixture`, `wo-retrieval`, `half-n`, `wo-it`,
    `wo-it-retrieval`; `all`; `auto` is all on `sample` and `ours` elsewhere."""
    data: DataConfig = field(default_factory=DataConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    retrieve: RetrieveConfig = field(default_factory=RetrieveConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    textctr: TextBaselineConfig = field(default_factory=TextBaselineConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def leaves(config: DataclassInstance, prefix: str = "") -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """Yield (dotted name, value, stages whose result it changes) for every field, nested ones included."""
    for f in fields(config):
        value, name = getattr(config, f.name), f"{prefix}{f.name}"
        if is_dataclass(value) and not isinstance(value, type):
            yield from leaves(value, f"{name}.")
        else:
            yield name, value, tuple(f.metadata.get("stages", ()))


Values = Mapping[str, Any]
"""Dotted field name → value; what presets are made of."""

DATASETS: dict[str, Values] = {
    "sample": {"data.positive_above": 3.0},
    "ml-1m": {"data.positive_above": 3.0, "k": 30, "shots": 8192, "tune.max_epochs": 5},
    "ml-25m": {"data.positive_above": 3.0, "k": 30, "shots": 8192, "tune.max_epochs": 5},
    "bookcrossing": {
        "data.positive_above": 5.0,
        "data.order": "shuffle",
        "data.targets": "last",
        "data.split_by": "user",
        "data.split": (81, 9, 10),
        "data.strict": False,
        "k": 60,
        "shots": 256,
        "tune.max_epochs": 10,
    },
}
"""Appendix B and §4.2: the label rule, order and split, K, N of the `< 1%` setting, maximum epochs."""

MODELS: dict[str, Values] = {
    "tiny": {"precision": "float32"},
    "vicuna-7b": {"precision": "float16"},
    "vicuna-13b": {"precision": "float16"},
    "mistral-7b": {"precision": "float16"},
    "falcon-7b": {"precision": "float16"},
    "llama-2-70b-chat": {"precision": "float16", "test_rows": 10_000},
}
"""D.1: the backbones; with the 70B one the paper scores 10,000 test rows."""

TOGETHER: dict[tuple[str, str], Values] = {
    ("sample", "tiny"): {
        "k": 8,
        "shots": 512,
        "test_rows": 1500,
        "pca_dim": 64,
        "tune.batch_size": 32,
        "tune.learning_rate": 6e-3,
        "tune.max_epochs": 3,
        "tune.valid_rows": 300,
    },
}
"""Values for a data set with a model: the demo is short, and a small model wants a larger learning rate."""

_AUTHORS: Values = {
    "prompt.variant": "authors",
    "embed.wrapped": True,
    "embed.pooling": "generated",
    "data.subsets": "authors",
    "tune.select_on": "test",
    "tune.stop_after": 1,
}
_AUTHORS_BY_DATASET: dict[str, Values] = {
    "ml-1m": {},
    "ml-25m": {"distance": "dot", "test_rows": 70_000},
    "bookcrossing": {"distance": "dot", "pca_dim": "none", "data.positive_above": 4.0, "data.split": (9, 0, 1)},
}
_SHOTS = {"ml-1m": (8192, 65536), "ml-25m": (8192, 65536), "bookcrossing": (256, 1024)}

PRESETS: dict[str, Values] = {
    **{
        f"{dataset}-n{shots}": {"dataset": dataset, "model": "vicuna-13b", "shots": shots, "tune.learning_rate": 1e-3}
        for dataset, counts in _SHOTS.items()
        for shots in counts
    },
    **{
        f"{dataset}-authors": {"dataset": dataset, "model": "vicuna-13b", **_AUTHORS, **values}
        for dataset, values in _AUTHORS_BY_DATASET.items()
    },
}
"""Named settings for `--preset`: N for `< 1%` and `< 10%` (§4.2), and what the authors' code does where it differs from
the paper."""

LISTS: dict[str, dict[str, tuple[float, ...]]] = {
    "bookcrossing": {"k": (10, 20, 30, 40, 50, 60), "shots": (128, 256, 512, 1024, 2048, 4096)},
    "ml-1m": {"k": (5, 10, 15, 20, 25, 30), "shots": (512, 1024, 2048, 4096, 8192, 65536)},
    "ml-25m": {"k": (5, 10, 15, 20, 25, 30), "shots": (512, 1024, 2048, 4096, 8192, 65536)},
}
"""What the paper's figures vary: K (Figure 6) and N (Figure 7) by data set."""

BASELINES: dict[str, Values] = {
    name: {f"textctr.{field}": value for field, value in values.items()} for name, values in TEXT_BASELINES.items()
}
"""Appendix C.2: what the LM-based baselines differ in, by `baseline.model`."""

CHOICES: dict[str, tuple[float, ...]] = {"tune.batch_size": (128, 256), "tune.learning_rate": (1e-3, 1.5e-3)}
"""What the paper selects from (§4.1.4)."""
