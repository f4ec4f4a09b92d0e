"""From sample columns to the tensors that models take, made as they are needed: no history is ever written out."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from rella.baselines import BaselineConfig
from rella.ctr import kernels
from rella.ctr.features import Features
from rella.ctr.kernels import Behaviours, Filled, Questions
from rella.data.questions import Neighbours
from rella.data.selection import Chosen
from rella.data.tables import Histories
from rella.errors import InputError

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """B samples; a history fills its row from the left, oldest behaviour first, and 0 is the padding."""

    fields: torch.Tensor
    """(B, F) int32 features of the user, then of the target item."""
    items: torch.Tensor
    """(B, K) int32 features of the behaviours' item ids."""
    ratings: torch.Tensor
    """(B, K) int32 rating levels, 1 to L; all 0 where there are no ratings."""
    lengths: torch.Tensor
    """(B,) int64 behaviours."""
    label: torch.Tensor
    """(B,) float32; NaN where it is unknown."""

    def __len__(self) -> int:
        return len(self.label)

    @property
    def mask(self) -> torch.Tensor:
        """(B, K) bool, where there is a behaviour."""
        return torch.arange(self.items.shape[1], device=self.items.device) < self.lengths[:, None]

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; from pinned memory the copy does not wait."""
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))


class Source(Protocol):
    """Which behaviours a sample's history has."""

    def fill(self, out: Filled, rows: Rows, asked: Questions, known: Behaviours) -> None:
        """Fill `out` for the samples at `rows` (B,) of `asked`."""


@dataclass(frozen=True)
class Recent:
    """The K most recent behaviours."""

    def fill(self, out: Filled, rows: Rows, asked: Questions, known: Behaviours) -> None:
        """Fill `out` for the samples at `rows` (B,) of `asked`."""
        kernels.recent(out, rows, asked, known)


@dataclass(frozen=True)
class SameCategory:
    """SIM's hard search: the K most recent behaviours whose item has the target's category.

    Where there is none, the K most recent ones. The paper of SIM takes the category's and no others, but its model
    reads the recent behaviours beside; here they come in by `fill_up` only.
    """

    category: npt.NDArray[np.int32]
    """(I,) by item, from `Features.category`."""
    fill_up: bool = False
    """Whether the most recent behaviours of other categories take the places that are left."""

    def fill(self, out: Filled, rows: Rows, asked: Questions, known: Behaviours) -> None:
        """Fill `out` for the samples at `rows` (B,) of `asked`."""
        kernels.same_category(out, rows, asked, known, self.category, self.fill_up)


@dataclass(frozen=True)
class Retrieved:
    """The K most similar behaviours of a retrieve stage (SUBR), in the order of time."""

    bounds: npt.NDArray[np.int64]
    """(S, 2) where each sample's positions begin and end."""
    positions: npt.NDArray[np.integer]

    @staticmethod
    def of(neighbours: Neighbours, samples: Chosen) -> Retrieved:
        """Find the samples among those that were retrieved for.

        Raises:
            InputError: a sample was not.
        """
        known, wanted = neighbours.sample_id, samples.sample_id
        if not len(known):
            raise InputError("no sample has neighbours: run retrieve with --retrieve.samples all")
        rows = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        missing = known[rows] != wanted
        if missing.any():
            sample = wanted[int(np.argmax(missing))]
            raise InputError(f"sample {sample} has no neighbours: run retrieve with --retrieve.samples all")
        bounds = np.stack([neighbours.offsets[rows], neighbours.offsets[rows + 1]], axis=1)
        return Retrieved(np.ascontiguousarray(bounds), _read_only(neighbours.positions))

    def fill(self, out: Filled, rows: Rows, asked: Questions, known: Behaviours) -> None:
        """Fill `out` for the samples at `rows` (B,) of `asked`."""
        kernels.at_positions(out, rows, asked, known, self.bounds, self.positions)


class Batches:
    """The samples of one split, from which any rows are taken as a batch.

    Args:
        features: of the data set.
        histories: of the data set.
        samples: S samples.
        source: which behaviours; a `Retrieved` must be that of the same samples.
        k: K, behaviours at most.
        pinned: whether batches lie in pinned memory, for copies to a card that do not wait.

    Raises:
        InputError: K is not positive.
    """

    def __init__(
        self, features: Features, histories: Histories, samples: Chosen, source: Source, k: int, pinned: bool = False
    ) -> None:
        if k < 1:
            raise InputError(f"k is {k}; a history takes at least 1 behaviour")
        self.samples, self.source, self.k, self._pinned = samples, source, k, pinned
        self._users, self._items = features.user_fields, features.item_fields
        known = (histories.offset, histories.item, features.item_ids, features.level)
        self._known = Behaviours(*(_read_only(a) for a in known))
        self._asked = Questions(*(_read_only(a) for a in (samples.user, samples.item, samples.end)))

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, rows: Rows) -> Batch:
        """Return the samples at `rows` (B,), in that order."""
        items, ratings = (self._empty((len(rows), self.k), torch.int32) for _ in range(2))
        lengths, label = self._empty((len(rows),), torch.int64), self._empty((len(rows),), torch.float32)
        self.source.fill(Filled(items.numpy(), ratings.numpy(), lengths.numpy()), rows, self._asked, self._known)
        user, item = self.samples.user[rows], self.samples.item[rows]
        width = self._users.shape[1]
        fields = self._empty((len(rows), width + self._items.shape[1]), torch.int32)
        label.numpy()[:] = self.samples.label[rows]
        fields.numpy()[:, :width] = self._users[user]
        fields.numpy()[:, width:] = self._items[item]
        return Batch(fields, items, ratings, lengths, label)

    def prefetched(self, plan: Iterable[Rows]) -> Generator[Batch]:
        """Yield the batch of each element of `plan`; a thread makes the next one while the caller is at work."""
        rest = iter(plan)
        with ThreadPoolExecutor(1) as thread:
            first = next(rest, None)
            coming = None if first is None else thread.submit(self.take, first)
            while coming is not None:
                batch, following = coming.result(), next(rest, None)
                coming = None if following is None else thread.submit(self.take, following)
                yield batch

    def _empty(self, shape: tuple[int, ...], kind: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, pin_memory=self._pinned)


def _read_only(array: Any) -> Any:  # noqa: ANN401 - an array of any type
    """Return a view that cannot be written: shared memory gives no other, and kernels are compiled for each kind."""
    view = array.view()
    view.flags.writeable = False
    return view


def batches_of(
    config: BaselineConfig,
    features: Features,
    histories: Histories,
    samples: Chosen,
    k: int,
    neighbours: Neighbours | None = None,
    pinned: bool = False,
) -> Batches:
    """Return the batches that a model of `config` takes: SIM's by its search, all others' with the K most recent.

    Args:
        config: `model`, `search`, `category`, `fill_up` and `soft_history`.
        features: of the data set.
        histories: of the data set.
        samples: of one split.
        k: K.
        neighbours: of a retrieve stage, for the semantic search.
        pinned: as in `Batches`.

    Raises:
        InputError: semantic search without neighbours, or of samples that lack them; hard search without a category.
    """
    source: Source = Recent()
    if config.model == "sim" and config.search == "soft":
        # The model searches, by embeddings that it learns.
        k = max(k, config.soft_history)
    elif config.model == "sim" and config.search == "hard":
        source = SameCategory(features.category(config.category), config.fill_up)
    elif config.model == "sim":
        if neighbours is None:
            raise InputError("SIM's semantic search needs the neighbours of a retrieve stage; or say --search hard")
        source = Retrieved.of(neighbours, samples)
    return Batches(features, histories, samples, source, k, pinned)
