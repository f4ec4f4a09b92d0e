"""What the three baselines have in common: the two questions that a model answers, and how it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from safetensors.torch import load, save
from torch import nn

from rella.errors import InputError, MissingError
from rella.lm.encoding import Ids, pad_right
from rella.lm.loading import DTYPES, quiet_libraries
from rella.lm.zero import Tensors
from rella.models import ModelIdentity
from rella.stages import Precision
from rella.textctr.examples import Examples, Rows

E = TypeVar("E", bound=Examples)
E_contra = TypeVar("E_contra", bound=Examples, contravariant=True)


class TextModel(nn.Module, Generic[E]):
    """A model that a fit trains: it says what the loss of some rows is."""

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    def loss(self, examples: E, rows: Rows, epoch: int) -> tuple[torch.Tensor, float]:
        """Return the summed loss of some rows, a float32 scalar, and what to divide it by (a mean over all rows).

        Args:
            examples: of the whole training set.
            rows: (B,) which of them.
            epoch: 0 is the first; only masks depend on it.
        """
        raise NotImplementedError


class ScoringModel(TextModel[E]):
    """A model that also says how likely a click is."""

    def logits(self, examples: E, rows: Rows) -> torch.Tensor:
        """Return the logits of yes and no, (B, 2) float32; their softmax is the probability (Eq. 2)."""
        raise NotImplementedError

    def scorer(self, batch_tokens: int) -> Scorer[E]:
        """Return what scores rows with the weights as they are now; see `Scorer`."""
        del batch_tokens
        return PlainScorer(self)


class ClickModel(ScoringModel[E]):
    """A model with one logit a row, trained by the binary cross-entropy; the logit of no is 0."""

    def click_logits(self, examples: E, rows: Rows) -> torch.Tensor:
        """Return (B,) logits."""
        raise NotImplementedError

    def loss(self, examples: E, rows: Rows, epoch: int) -> tuple[torch.Tensor, float]:
        """Return the summed binary cross-entropy and the number of rows."""
        del epoch
        logits = self.click_logits(examples, rows).float()
        labels = torch.as_tensor(examples.labels[rows], dtype=torch.float32, device=logits.device)
        return nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum"), float(len(rows))

    def logits(self, examples: E, rows: Rows) -> torch.Tensor:
        """Return (B, 2) float32, the second column zeros: the softmax is the sigmoid of the first."""
        return with_zero(self.click_logits(examples, rows))


class Scorer(Protocol[E_contra]):
    """Scores rows with weights that stay as they are, so it may keep what it has computed."""

    def prepare(self, examples: E_contra, rows: Rows) -> None:
        """Compute what some rows have in common with others."""

    def logits(self, examples: E_contra, rows: Rows) -> torch.Tensor:
        """Return (B, 2) float32, yes first, of rows that were prepared."""


@dataclass(frozen=True)
class PlainScorer(Generic[E]):
    """The scorer of a model whose rows have nothing in common."""

    model: ScoringModel[E]

    def prepare(self, examples: E, rows: Rows) -> None:
        """Do nothing."""

    def logits(self, examples: E, rows: Rows) -> torch.Tensor:
        """Return the model's logits."""
        return self.model.logits(examples, rows)


def with_zero(click: torch.Tensor) -> torch.Tensor:
    """Return (B,) logits as (B, 2) float32 with zeros for no."""
    yes = click.float()
    return torch.stack([yes, torch.zeros_like(yes)], 1)


def padded(rows: Sequence[Ids], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Return `input_ids` (B, L) int64 padded on the right and `attention_mask` (B, L) int64, 0 at padding."""
    ids, lengths = pad_right(rows, pad, device)
    mask = torch.arange(ids.shape[1], device=device)[None] < lengths[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


def arithmetic(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Return the context in which matrix products are taken in `precision`; weights stay float32."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "float32")


_DROPOUT = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "dropout_rate",
    "dropout",
    "attention_dropout",
    "seq_classif_dropout",
)
"""What configurations of encoders and of T5 call their dropouts."""


def load_pretrained(
    kind: Any,  # noqa: ANN401 - transformers is untyped here
    model: ModelIdentity,
    dropout: float,
    seed: int,
    device: torch.device,
    new: Callable[[str], bool] = lambda name: False,
    num_labels: int | None = None,
) -> Any:  # noqa: ANN401
    """Return a pretrained model in float32 in training mode; only safetensors and no code of the hub's are loaded.

    `HF_HUB_OFFLINE`, `HF_HOME` and the like are the hub library's own.

    Args:
        kind: the class of transformers whose `from_pretrained` loads it.
        model: which one.
        dropout: put in place of every dropout of its configuration.
        seed: of weights that the file does not hold.
        device: a CPU or one GPU.
        new: says which weights the file need not hold.
        num_labels: outputs of a classification head.

    Raises:
        MissingError: no safetensors, or the hub cannot be reached and the cache does not hold it.
        InputError: the file lacks weights, so that a part of the model would be random.
    """
    from transformers import AutoConfig

    where = {"revision": model.revision, "trust_remote_code": False}
    # Weights that the file does not hold are drawn: from the seed, and without moving the caller's generator.
    with quiet_libraries(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            config = AutoConfig.from_pretrained(model.place, **where)
            for name in _DROPOUT:
                if hasattr(config, name):
                    setattr(config, name, dropout)
            if num_labels is not None:
                config.num_labels = num_labels
            loaded, told = kind.from_pretrained(
                model.place,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                **where,
            )
        except OSError as error:
            raise MissingError(
                f"model {model.name} cannot be loaded from {model.source} ({error}): give a folder with *.safetensors "
                "(pickled weights are not loaded), or set HF_HUB_OFFLINE=1 with a filled cache"
            ) from error
    names = {n for n in told["missing_keys"] if not new(n)} | {str(key[0]) for key in told["mismatched_keys"]}
    if names:
        raise InputError(
            f"model {model.name} lacks {len(names)} weights of a {kind.__name__}, e.g. {min(names)}: give another one, "
            "such as bert-base-uncased for CTR-BERT and PTab or t5-base for P5"
        )
    return loaded.to(device).train()


def check_reach(model: ModelIdentity, max_tokens: int) -> None:
    """Verify that an encoder with absolute positions reads texts of `max_tokens`.

    Raises:
        InputError: it reads fewer.
    """
    if max_tokens > model.max_positions:
        raise InputError(f"max_tokens {max_tokens}: {model.name} reads {model.max_positions} tokens; lower max_tokens")


def weights_of(model: nn.Module) -> Tensors:
    """Return a copy of the weights on the CPU, tied ones once, by the name of the parameter."""
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}


def weights_to_bytes(weights: Tensors) -> bytes:
    """Return weights as the content of a safetensors file."""
    return save({name: tensor.contiguous() for name, tensor in weights.items()})


def weights_from_bytes(data: bytes) -> Tensors:
    """Return what `weights_to_bytes` wrote."""
    return load(data)


def put_weights(model: nn.Module, weights: Tensors) -> None:
    """Set all weights of a model to those of `weights_of`.

    Raises:
        InputError: they are another model's.
    """
    own = dict(model.named_parameters())
    odd = own.keys() ^ weights.keys() or {n for n, p in own.items() if p.shape != weights[n].shape}
    if odd:
        raise InputError(f"{len(odd)} weights are not this model's, e.g. {min(odd)}: give the base it was fitted from")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
