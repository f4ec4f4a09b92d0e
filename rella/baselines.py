"""Configuration of the eleven baselines of Table 2 (§4.1.3, Appendix C)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from rella.errors import InputError
from rella.stages import BASELINE, MLM, TEXTCTR, Auto, Precision
from rella.stages import changes as _in

IdBaseline = Literal["deepfm", "autoint", "dcnv2", "gru4rec", "caser", "sasrec", "din", "sim"]
TextBaseline = Literal["ctr-bert", "ptab", "p5"]
Baseline = Literal[IdBaseline, TextBaseline]
Search = Literal["semantic", "hard", "soft"]


@dataclass(frozen=True)
class BaselineConfig:
    """The baselines of §4.1.3. Defaults are values of Appendix C's grids for MovieLens; its K is the experiment's."""

    model: Baseline = field(default="sim", metadata=_in(BASELINE, TEXTCTR))
    """Feature interaction (`deepfm`, `autoint`, `dcnv2`), user behaviour (`gru4rec`, `caser`, `sasrec`, `din`, `sim`),
    or LM-based (`ctr-bert`, `ptab`, `p5`): those are set up under `textctr`, and feel nothing else of `baseline`."""
    search: Search = field(default="semantic", metadata=_in(BASELINE))
    """How SIM finds its K behaviours: those that SUBR retrieved (`semantic`), the most recent ones of the target's
    category (`hard`), or the largest inner products with the target under the learned embeddings (`soft`)."""
    category: str = field(default="auto", metadata=_in(BASELINE))
    """Item field whose values `hard` search compares, by its name in Table 1; `auto` is the genre, the author or the
    category, whichever there is."""
    fill_up: bool = field(default=False, metadata=_in(BASELINE))
    """Whether the most recent behaviours of other categories take the places that `hard` search leaves; a sample
    without any behaviour of the category has the most recent ones in any case."""
    soft_history: int = field(default=256, metadata=_in(BASELINE))
    """`soft` search looks at this many of the most recent behaviours."""
    embedding_dim: int = field(default=32, metadata=_in(BASELINE))
    """Size of a feature's embedding. The paper: 32 or 64 on MovieLens; 8, 16 or 32 on BookCrossing."""
    dropout: float = field(default=0.1, metadata=_in(BASELINE))
    """Dropout in the DNN and in attention blocks. The paper: 0, 0.1 or 0.2."""
    dnn_size: int = field(default=128, metadata=_in(BASELINE))
    """Width of every DNN layer. The paper: 64, 128 or 256 on MovieLens; 32, 64 or 128 on BookCrossing."""
    dnn_layers: int = field(default=3, metadata=_in(BASELINE))
    """DNN layers. The paper: 1 to 3; 3 to 12 for DeepFM and DCNv2 on MovieLens."""
    cross_layers: int = field(default=3, metadata=_in(BASELINE))
    """DCNv2: cross layers. The paper: 3 to 12 on MovieLens, 1 to 3 on BookCrossing."""
    attention_layers: int = field(default=1, metadata=_in(BASELINE))
    """AutoInt and SASRec: attention layers; DIN and SIM: hidden layers of the activation unit. The paper: 3 to 12 for
    AutoInt on MovieLens, else 1 to 3."""
    attention_size: int = field(default=64, metadata=_in(BASELINE))
    """AutoInt and SASRec: width of the attention; DIN and SIM: width of the activation unit. The paper: 64, 128 or 256
    on MovieLens; 32 to 128 on BookCrossing."""
    attention_heads: int = field(default=1, metadata=_in(BASELINE))
    """AutoInt and SASRec: heads, which share the attention's width. The paper: 1 for AutoInt; 1, 2 or 4 for SASRec."""
    gru_layers: int = field(default=1, metadata=_in(BASELINE))
    """GRU4Rec: layers. The paper: 1 to 3."""
    gru_size: int = field(default=64, metadata=_in(BASELINE))
    """GRU4Rec: size of the state. The paper: 64, 128 or 256 on MovieLens; 32 or 64 on BookCrossing."""
    vertical_kernels: int = field(default=4, metadata=_in(BASELINE))
    """Caser: vertical convolution kernels. The paper: 2, 4 or 8."""
    horizontal_kernels: int = field(default=8, metadata=_in(BASELINE))
    """Caser: horizontal convolution kernels of every height. The paper: 4, 8 or 16."""
    learning_rate: float = field(default=1e-3, metadata=_in(BASELINE))
    """AdamW's learning rate, constant."""
    weight_decay: float = field(default=0.0, metadata=_in(BASELINE))
    """AdamW's weight decay."""
    batch_size: int | Auto = field(default="auto", metadata=_in(BASELINE))
    """Samples per optimiser step over all workers; `auto` is 512 for `shots: all`, else 256, which is better on
    MovieLens-1M's validation split at every N. The paper: 256 or 512 on MovieLens, 32 or 64 on BookCrossing."""
    max_epochs: int = field(default=10, metadata=_in(BASELINE))
    """End after this many epochs."""
    valid_per_epoch: int = field(default=4, metadata=_in(BASELINE))
    """Validations in an epoch, evenly spaced; the weights of the best step are kept. The best epoch is the first or
    second, so that one validation an epoch comes too late."""
    patience: int | None = field(default=4, metadata=_in(BASELINE))
    """End when this many validations in a row have brought no improvement."""
    valid_rows: int | Literal["auto", "all"] = field(default="auto", metadata=_in(BASELINE))
    """Validation rows that choose the step: a seeded subset, or `all`; `auto` is all for `shots: all`, else
    min(N, 2000)."""
    init_std: float = field(default=0.01, metadata=_in(BASELINE))
    """Standard deviation of the embeddings at first. Users and items that the training split lacks keep theirs: with
    large ones DeepFM loses almost 3 points of AUC on MovieLens-1M, where 12% of the test rows have a new user."""
    precision: Literal["float32"] = field(default="float32", metadata=_in(BASELINE))
    """Arithmetic; these models are small."""
    checkpoint_seconds: float = 300.0
    """Seconds between two checkpoints besides those after validations, taken at the next report of progress; a killed
    run loses at most what came after its last one."""

    @property
    def step_rows(self) -> int:
        """Return the samples of an optimiser step; of an `auto` that no job has resolved, full-shot's."""
        return FULL_SHOT_BATCH if self.batch_size == "auto" else self.batch_size


FULL_SHOT_BATCH, FEW_SHOT_BATCH = 512, 256
"""`batch_size: auto`."""

_ATTENTION = {"attention_layers", "attention_size"}
_OWN: dict[str, set[str]] = {
    "autoint": {*_ATTENTION, "attention_heads"},
    "dcnv2": {"cross_layers"},
    "gru4rec": {"gru_layers", "gru_size"},
    "caser": {"vertical_kernels", "horizontal_kernels"},
    "sasrec": {*_ATTENTION, "attention_heads"},
    "din": _ATTENTION,
    "sim": {*_ATTENTION, "search"},
}
_OF_SEARCH = {"semantic": set[str](), "hard": {"category", "fill_up"}, "soft": {"soft_history"}}


def idle_fields(config: BaselineConfig) -> set[str]:
    """Return the fields that this ID-based model does not feel, which therefore stay out of its key."""
    special = set().union(*_OWN.values(), *_OF_SEARCH.values())
    felt = _OWN.get(config.model, set()) | (_OF_SEARCH[config.search] if config.model == "sim" else set())
    return special - felt


@dataclass(frozen=True)
class TextBaselineConfig:
    """An LM-based baseline, CTR-BERT, PTab or P5 (Appendix C.2); `text_baseline` gives each one's values."""

    base: str = "bert-base-uncased"
    """Pretrained model: BERT for CTR-BERT and PTab, T5 for P5; a hub name or a folder with safetensors. Keys hold the
    digest of what is in it, or the hub's commit."""
    revision: str | None = None
    """Commit, tag or branch of a hub model; the resolved commit is what keys hold."""
    max_tokens: int = field(default=512, metadata=_in(MLM, TEXTCTR))
    """Tokens of a user's text (CTR-BERT), a row's (PTab) or a prompt (P5); longer ones lose their oldest behaviours.
    BERT reads at most 512; T5's positions are relative, and P5's limit of 1024 is one of memory."""
    max_item_tokens: int | Auto = field(default="auto", metadata=_in(TEXTCTR))
    """CTR-BERT: tokens of an item's text, which is never cut: a longer one is an error, and `auto` has no limit but
    the model's own. Most items take 20 to 50; of the books of BookCrossing one in a thousand takes over 64."""
    tie: bool = field(default=False, metadata=_in(TEXTCTR))
    """CTR-BERT: one tower's weights for users and items."""
    dropout: float = field(default=0.1, metadata=_in(MLM, TEXTCTR))
    """Dropout of the pretrained model and of CTR-BERT's head; 0.1 is BERT's and T5's own."""
    learning_rate: float = field(default=5e-5, metadata=_in(TEXTCTR))
    """Highest learning rate; falls linearly to 0 at the end of `max_epochs`. P5: 5e-4 or 1e-3."""
    warmup: float = field(default=0.05, metadata=_in(TEXTCTR))
    """Share of all steps over which the learning rate rises from 0."""
    batch_size: int = field(default=1024, metadata=_in(TEXTCTR))
    """Rows per optimiser step over all workers."""
    max_epochs: int = field(default=10, metadata=_in(TEXTCTR))
    """Shapes the learning-rate schedule."""
    weight_decay: float = field(default=0.0, metadata=_in(MLM, TEXTCTR))
    """AdamW's weight decay."""
    clip: float | None = field(default=None, metadata=_in(MLM, TEXTCTR))
    """Norm to which gradients are clipped."""
    valid_per_epoch: int = field(default=4, metadata=_in(TEXTCTR))
    """Validations in an epoch, evenly spaced; the weights of the best step are kept. In full-shot each costs a few
    percent of an epoch's training."""
    valid_rows: int | Literal["auto", "all"] = field(default="auto", metadata=_in(TEXTCTR))
    """Validation rows that choose the step: a seeded subset, or `all`; `auto` is all where all training rows are
    taken, else min(N, 2000)."""
    patience: int | None = field(default=None, metadata=_in(TEXTCTR))
    """End when this many validations in a row have brought no improvement."""
    max_train_rows: int | Literal["all"] = field(default="all", metadata=_in(MLM, TEXTCTR))
    """Training rows at most, whatever `shots` says: the few-shot set of that size (seeded by `data.seed`, nested);
    every table's caption names their number."""
    mlm_probability: float = field(default=0.15, metadata=_in(MLM))
    """PTab: share of the tokens that are predicted; of these 80% are masked, 10% replaced and 10% left."""
    mlm_learning_rate: float = field(default=5e-5, metadata=_in(MLM))
    """PTab: `learning_rate` of the further pre-training."""
    mlm_warmup: float = field(default=0.05, metadata=_in(MLM))
    """PTab: `warmup` of the further pre-training."""
    mlm_batch_size: int = field(default=1024, metadata=_in(MLM))
    """PTab: `batch_size` of the further pre-training."""
    mlm_epochs: int = field(default=10, metadata=_in(MLM))
    """PTab: `max_epochs` of the further pre-training."""
    precision: Precision | Auto = field(default="auto", metadata=_in(MLM, TEXTCTR))
    """Arithmetic of the matrix products; weights and optimiser are float32. `auto` is bfloat16 where every card has it,
    else (CPUs, V100s) float32; a V100 is faster in float16, in which T5 overflows."""
    micro_batch_tokens: int = 16384
    """Token budget of one forward and backward pass of one worker, padding included."""
    batch_tokens: int = 65536
    """Token budget of one forward pass when rows are scored, padding included."""
    checkpoint_seconds: float = 300.0
    """Seconds between two checkpoints, which are taken at a step's end. 0 is one every step."""

    @property
    def arithmetic(self) -> Precision:
        """Return the precision.

        Raises:
            InputError: it is still `auto`, which a job resolves by its cards.
        """
        if self.precision == "auto":
            raise InputError("precision is still `auto`: name float32, float16 or bfloat16")
        return self.precision


TEXT_BASELINES: dict[TextBaseline, Mapping[str, Any]] = {
    "ctr-bert": {},
    "ptab": {"warmup": 0.01},
    "p5": {"base": "t5-base", "max_tokens": 1024, "learning_rate": 5e-4, "batch_size": 32, "clip": 1.0},
}
"""Appendix C.2, where a baseline differs from the fields' defaults."""

TEXT_CHOICES: dict[TextBaseline, dict[str, tuple[float, ...]]] = {"p5": {"learning_rate": (5e-4, 1e-3)}}
"""What Appendix C.2 selects from."""


_OF_CTR_BERT = {"max_item_tokens", "tie"}


def as_text(model: Baseline) -> TextBaseline | None:
    """Return the name of an LM-based baseline as one, None for the ID-based ones."""
    return next((name for name in TEXT_BASELINES if name == model), None)


def idle_text_fields(model: TextBaseline) -> set[str]:
    """Return the fields of `TextBaselineConfig` that this model does not feel."""
    of_mlm = {f.name for f in fields(TextBaselineConfig) if f.metadata.get("stages") == (MLM,)}
    return (set() if model == "ctr-bert" else _OF_CTR_BERT) | (set() if model == "ptab" else of_mlm)


def text_baseline(name: TextBaseline) -> TextBaselineConfig:
    """Return a baseline's values of Appendix C.2."""
    return TextBaselineConfig(**TEXT_BASELINES[name])


def mlm_stage(config: TextBaselineConfig) -> TextBaselineConfig:
    """Return the configuration of PTab's further pre-training as that of a fit: it has no validation."""
    return replace(
        config,
        learning_rate=config.mlm_learning_rate,
        warmup=config.mlm_warmup,
        batch_size=config.mlm_batch_size,
        max_epochs=config.mlm_epochs,
        patience=None,
    )
