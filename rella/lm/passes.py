"""Forward passes over many rows: longest first, within a token budget that halves when a card's memory runs out.

What embedding and scoring share. The host keeps ahead of the card: it never waits for a pass before it has asked for
the next ones, and texts are tokenised in a thread while earlier ones are computed.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from rella.errors import InputError
from rella.lm.encoding import Ids, pad_right, token_batches

T = TypeVar("T")

CPU_TOKENS = 2048
"""On a CPU a larger pass takes longer per token: its states leave the caches, and pages are mapped anew each time."""

_AHEAD = 3
"""Passes that the host may be ahead of what it has fetched; their inputs and results are small."""

_PASS_SHARE = 64
"""A pass costs about as much as this share of its budget in tokens, before it has any."""

_END = object()


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass
class TokenBudget:
    """Tokens, padding included, that a forward pass may hold; a worker keeps one for all that it does."""

    tokens: int
    title: str = "lm"
    """What runs, for messages: `embed`, `score`."""
    flag: str = "batch_tokens"
    """The option that sets it."""
    say: Callable[[str], None] = _to_stderr
    matched: Callable[[int], int] | None = None
    """Of processes that share a base's weights (`rella.lm.split`): how many passes all of them make, given one's own.
    Memory that runs out then ends the work, as the others would wait for a pass that starts again."""

    def on(self, device: torch.device) -> int:
        """Return the tokens of a pass on this device."""
        return min(self.tokens, CPU_TOKENS) if device.type == "cpu" else self.tokens

    def halve(self, failed: int) -> None:
        """Halve, for good, below a pass of `failed` tokens that did not fit, and say so."""
        fitting = min(self.tokens, failed)
        self.tokens = max(1, fitting // 2)
        self.say(
            f"{self.title}: out of memory in a pass of {failed:,} tokens; going on with at most {self.tokens:,} "
            f"(to start there: {self.flag} {self.tokens})"
        )


def budget_of(tokens: int | TokenBudget) -> TokenBudget:
    """Return a budget for a caller who has none to keep."""
    return tokens if isinstance(tokens, TokenBudget) else TokenBudget(tokens)


@dataclass(frozen=True)
class _Asked:
    """A pass that the device works on: its rows, its results on their way to the host, and when they are there."""

    rows: list[int]
    values: torch.Tensor
    ready: torch.cuda.Event | None

    def fetch(self) -> npt.NDArray[np.float32]:
        if self.ready is not None:
            self.ready.synchronize()
        return self.values.numpy()


def run_passes(
    rows: Sequence[Ids],
    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    device: torch.device,
    pad: int,
    budget: TokenBudget,
    on_done: Callable[[int], None] | None = None,
    bucketing: bool = True,
    without_gradients: Callable[[], AbstractContextManager[Any]] = torch.inference_mode,
) -> npt.NDArray[np.float32]:
    """Return `forward`'s values for every row, in the order of the rows: (rows, D) float32; (0, 0) of no rows.

    Args:
        rows: token ids, each at least one.
        forward: (B, L) int64 ids padded on the right and (B,) int64 lengths, on `device`, to (B, D) values there.
        device: a CPU or one GPU.
        pad: token that fills up; seen by no real token.
        budget: halves where the device's memory runs out; what failed is done again in smaller passes.
        on_done: called with the number of rows of each pass once their values are there.
        bucketing: passes of similar length, the longest first; else the rows as they come.
        without_gradients: `torch.no_grad` for a model that is being trained.

    Raises:
        InputError: a single row does not fit into the device's memory.
    """
    # Weights that are gathered for a layer must not become inference tensors.
    free = without_gradients if budget.matched is None else torch.no_grad
    passes = _Passes(rows, forward, device, pad, budget, bucketing, free)
    own = len(passes.todo)
    if budget.matched is not None and own:
        passes.todo.extend([passes.todo[-1]] * (budget.matched(own) - own))
    out: npt.NDArray[np.float32] | None = None
    for done in passes:
        found = done.fetch()
        if out is None:
            out = np.empty((len(rows), found.shape[1]), dtype=np.float32)
        out[done.rows] = found
        own -= 1
        # Behind its own passes a process repeats the last one for the others' sake.
        if on_done is not None and (budget.matched is None or own >= 0):
            on_done(len(done.rows))
    return np.empty((0, 0), dtype=np.float32) if out is None else out


@dataclass
class _Passes:
    """The passes of `run_passes`, each yielded once it has been asked for and up to `_AHEAD` others behind it."""

    rows: Sequence[Ids]
    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    device: torch.device
    pad: int
    budget: TokenBudget
    bucketing: bool
    free: Callable[[], AbstractContextManager[Any]]

    def __post_init__(self) -> None:
        self.lengths = [len(r) for r in self.rows]
        self.todo = deque(plan(self.lengths, self.budget.on(self.device), self.bucketing))

    def __iter__(self) -> Iterator[_Asked]:
        asked: deque[_Asked] = deque()
        while self.todo or asked:
            if self.todo and len(asked) < _AHEAD:
                batch = self.todo.popleft()
                values = self._values(batch)
                if values is not None:
                    asked.append(_on_its_way(batch, values))
            else:
                yield asked.popleft()

    def _values(self, batch: list[int]) -> torch.Tensor | None:
        """Return the pass's values; where memory ran out None, and its rows are in smaller passes again."""
        values = self._attempt(batch)
        if values is None and len(batch) == 1 and self.budget.matched is None:
            # What lay scattered in the allocator's cache is free now.
            values = self._attempt(batch)
        if values is None:
            _give_way(batch, self.lengths, self.budget)
            rest = list(chain(batch, *self.todo))
            again = plan([self.lengths[i] for i in rest], self.budget.on(self.device), self.bucketing)
            self.todo = deque([rest[i] for i in part] for part in again)
        return values

    def _attempt(self, batch: list[int]) -> torch.Tensor | None:
        with self.free():
            return _attempt(self.forward, [self.rows[i] for i in batch], self.device, self.pad)


def plan(lengths: Sequence[int], budget: int, bucketing: bool = True) -> list[list[int]]:
    """Return row numbers in passes of at most `budget` tokens, padding included, the longest rows first.

    Of all ways to cut the sorted rows it takes the one with the least padding, a pass itself counted as
    budget / `_PASS_SHARE` tokens: item sentences then have under 1% of padding, where filling one pass after the other
    leaves 5%. A row longer than the budget is a pass of its own. Without `bucketing` the rows come in their own order,
    each pass filled.
    """
    if not bucketing:
        return list(token_batches(lengths, budget, bucketing=False))
    size = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-size, kind="stable")
    size = size[order]
    least, cut, first = np.zeros(len(size) + 1), np.zeros(len(size) + 1, dtype=np.int64), 0
    for stop in range(1, len(size) + 1):
        while first < stop - 1 and size[first] * (stop - first) > budget:
            first += 1
        # What rows 0 to stop cost when the last pass starts at `first` or later; its first row is its longest.
        cost = least[first:stop] + size[first:stop] * np.arange(stop - first, 0, -1)
        best = int(cost.argmin())
        least[stop], cut[stop] = cost[best] + budget / _PASS_SHARE, first + best
    passes: list[list[int]] = []
    stop = len(size)
    while stop:
        passes.append(order[cut[stop] : stop].tolist())
        stop = int(cut[stop])
    return passes[::-1]


def _attempt(
    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], rows: Sequence[Ids], device: torch.device, pad: int
) -> torch.Tensor | None:
    """Return the pass's values, or None where memory ran out."""
    try:
        return forward(*pad_right(rows, pad, device)).float()
    except torch.OutOfMemoryError:
        # Nothing is done in here: the error holds the frames that hold the failed pass's tensors.
        pass
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def _give_way(batch: Sequence[int], lengths: Sequence[int], budget: TokenBudget) -> None:
    longest = max(lengths[i] for i in batch)
    if budget.matched is not None:
        raise InputError(
            f"{budget.title}: out of memory in a pass of {longest * len(batch):,} tokens beside this worker's part of "
            f"the base: lower {budget.flag} (now {budget.tokens:,}), or raise --cluster.base-workers"
        )
    if len(batch) == 1:
        raise InputError(
            f"{budget.title}: one row of {longest:,} tokens does not fit into the memory beside the model: shorten it "
            "(prompts: --k or --prompt.max-tokens, item sentences: --prompt.title-chars), or take a smaller model, "
            "16-bit --precision or a larger card"
        )
    budget.halve(longest * len(batch))


def _on_its_way(rows: list[int], values: torch.Tensor) -> _Asked:
    """Start the copy to the host, which takes place when the card gets there."""
    if values.device.type != "cuda":
        return _Asked(rows, values, None)
    there = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    there.copy_(values, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record(torch.cuda.current_stream(values.device))
    return _Asked(rows, there, ready)


def windows(sizes: Sequence[int], rows: int, bucketing: bool = True) -> list[list[int]]:
    """Cut rows, largest first, into windows that are tokenised (and sorted exactly) one at a time.

    Args:
        sizes: about proportional to the rows' tokens, e.g. characters.
        rows: in a window; many passes' worth, as each window ends with a pass that is not full.
        bucketing: largest first, else as they come.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)) if bucketing else list(range(len(sizes)))
    return [order[start : start + rows] for start in range(0, len(order), rows)]


def ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield `items`, the next one made in a thread while the caller works on this one; what it raises comes through."""
    source = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        coming = pool.submit(next, source, _END)
        while (item := coming.result()) is not _END:
            coming = pool.submit(next, source, _END)
            yield item  # type: ignore[misc]
