"""Forward passes over many rows: every row once and in place, within the budget, whatever the memory holds."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rella.errors import InputError
from rella.lm.encoding import Ids, token_batches
from rella.lm.passes import CPU_TOKENS, TokenBudget, ahead, plan, run_passes, windows

CPU = torch.device("cpu")
LENGTHS = [1, 40, 7, 7, 120, 2, 63, 64, 65, 19]


def padded(lengths: list[int], passes: list[list[int]]) -> int:
    return sum(max(lengths[i] for i in rows) * len(rows) for rows in passes)


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 400))
def test_a_plan_has_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    passes = plan(lengths, budget)
    assert sorted(itertools.chain(*passes)) == list(range(len(lengths)))
    for rows in passes:
        assert len(rows) == 1 or padded(lengths, [rows]) <= budget
    order = [lengths[i] for i in itertools.chain(*passes)]
    assert order == sorted(lengths, reverse=True)
    assert plan(lengths, budget, bucketing=False) == list(token_batches(lengths, budget, bucketing=False))


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(9, 40))
def test_no_other_cut_costs_less(lengths: list[int], budget: int) -> None:
    ordered = sorted(lengths, reverse=True)

    def cost(passes: list[list[int]]) -> float:
        return padded(ordered, passes) + len(passes) * budget / 64

    every = (
        [list(range(a, b)) for a, b in itertools.pairwise([0, *cuts, len(ordered)])]
        for count in range(len(ordered))
        for cuts in itertools.combinations(range(1, len(ordered)), count)
    )
    best = min(cost(passes) for passes in every if all(padded(ordered, [rows]) <= budget for rows in passes))
    assert cost(plan(ordered, budget)) == pytest.approx(best)


def test_sentences_of_many_lengths_are_hardly_padded() -> None:
    lengths = np.random.default_rng(0).binomial(46, 0.6, 4000).tolist()
    assert sum(lengths) / padded(lengths, plan(lengths, 16384)) > 0.99
    assert sum(lengths) / padded(lengths, list(token_batches(lengths, 16384))) < 0.97


class Adder:
    """Sums each row's real tokens, and has memory for `room` tokens a pass."""

    def __init__(self, room: int | None = None) -> None:
        self.room, self.sizes, self.failures = room, list[int](), 0

    def __call__(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        if self.room is not None and ids.numel() > self.room:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")
        self.sizes.append(ids.numel())
        real = torch.arange(ids.shape[1]) < lengths[:, None]
        return torch.stack([(ids * real).sum(1), lengths], 1)


@pytest.fixture
def rows() -> list[Ids]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, 1000, n).astype(np.int32) for n in LENGTHS]


@pytest.fixture
def expected(rows: list[Ids]) -> np.ndarray:
    return np.array([[r.sum(), len(r)] for r in rows], dtype=np.float32)


@pytest.mark.parametrize("bucketing", [True, False])
@pytest.mark.parametrize("budget", [1, 64, 130, 100_000])
def test_values_stand_where_their_rows_stood(
    budget: int, bucketing: bool, rows: list[Ids], expected: np.ndarray
) -> None:
    counted: list[int] = []
    found = run_passes(rows, Adder(), CPU, 7, TokenBudget(budget), counted.append, bucketing)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    assert sum(counted) == len(rows)
    assert run_passes([], Adder(), CPU, 7, TokenBudget(budget)).shape == (0, 0)


@pytest.mark.parametrize("bucketing", [True, False])
@pytest.mark.parametrize("room", [125, 200, 300])
def test_where_memory_runs_out_the_budget_halves_for_good(
    room: int, bucketing: bool, rows: list[Ids], expected: np.ndarray
) -> None:
    rows, expected = rows * 4, np.tile(expected, (4, 1))
    said: list[str] = []
    budget = TokenBudget(1000, "embed", "--embed.batch-tokens", said.append)
    forward, counted = Adder(room), list[int]()
    found = run_passes(rows, forward, CPU, 7, budget, counted.append, bucketing)
    np.testing.assert_array_equal(found, expected)
    assert sum(counted) == len(rows)
    assert forward.failures == len(said) >= 1
    assert budget.tokens <= room
    assert said[-1].startswith("embed: out of memory in a pass of ")
    assert said[-1].endswith(f"at most {budget.tokens:,} (to start there: --embed.batch-tokens {budget.tokens})")
    failures = forward.failures
    np.testing.assert_array_equal(run_passes(rows, forward, CPU, 7, budget, None, bucketing), expected)
    assert forward.failures == failures, "what was learned holds for the next call"


def test_the_message_names_what_failed_and_half_of_it(rows: list[Ids]) -> None:
    """The budget is of no use to the eye where the pass that failed was far below it."""
    said: list[str] = []
    budget = TokenBudget(20_000, "score", "--score.batch-tokens", said.append)
    run_passes([rows[4]] * 12, Adder(1000), CPU, 0, budget)
    assert said == [
        "score: out of memory in a pass of 1,440 tokens; going on with at most 720 "
        "(to start there: --score.batch-tokens 720)"
    ]


def test_a_row_that_does_not_fit_alone_is_named(rows: list[Ids]) -> None:
    budget = TokenBudget(1000, "score", say=lambda line: None)
    with pytest.raises(InputError, match=r"score: one row of 120 tokens does not fit .*--prompt\.max-tokens"):
        run_passes(rows, Adder(119), CPU, 7, budget)
    assert run_passes(rows[:4], Adder(119), CPU, 7, budget).shape == (4, 2)


def test_a_single_row_gets_a_second_try_with_all_memory_freed(rows: list[Ids], expected: np.ndarray) -> None:
    scattered = iter([torch.OutOfMemoryError("scattered")])
    adder = Adder()

    def forward(ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        for error in scattered:
            raise error
        return adder(ids, lengths)

    np.testing.assert_array_equal(run_passes(rows[:1], forward, CPU, 7, TokenBudget(1000)), expected[:1])


def test_other_errors_are_not_taken_for_memory(rows: list[Ids]) -> None:
    def forward(ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel image")

    with pytest.raises(RuntimeError, match="no kernel image"):
        run_passes(rows, forward, CPU, 7, TokenBudget(1000))


def test_a_failed_pass_leaves_nothing_behind(rows: list[Ids]) -> None:
    """The error's frames hold the pass's tensors: on a card the next try would not find their memory."""
    import gc
    import weakref

    left: list[weakref.ref[torch.Tensor]] = []

    def forward(ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        assert not [r for r in left if r() is not None]
        if ids.numel() > 130:
            states = torch.zeros(10)
            left.append(weakref.ref(states))
            raise torch.OutOfMemoryError("no memory")
        return lengths[:, None]

    gc.disable()
    try:
        run_passes(rows, forward, CPU, 7, TokenBudget(1000, say=lambda line: None))
    finally:
        gc.enable()
    assert left


def test_a_cpu_takes_passes_that_stay_in_its_caches() -> None:
    budget = TokenBudget(16384)
    assert budget.on(CPU) == CPU_TOKENS
    assert budget.on(torch.device("cuda")) == 16384
    assert replace(budget, tokens=100).on(CPU) == 100


def test_windows_are_cut_from_the_largest_down() -> None:
    assert windows([3, 9, 1, 9, 5], 2) == [[1, 3], [4, 0], [2]]
    assert windows([3, 9, 1, 9, 5], 2, bucketing=False) == [[0, 1], [2, 3], [4]]
    assert windows([], 2) == []


def test_the_next_item_is_made_while_this_one_is_used() -> None:
    made = [threading.Event() for _ in range(3)]

    def source() -> Iterator[int]:
        for n, event in enumerate(made):
            event.set()
            yield n

    seen = []
    for n in ahead(source()):
        seen.append(n)
        assert n == 2 or made[n + 1].wait(10), "the next one is not waited for by the caller"
    assert seen == [0, 1, 2]
    assert list(ahead([])) == []


def test_errors_of_the_thread_come_through() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise InputError("too long")

    items = ahead(source())
    assert next(items) == 1
    with pytest.raises(InputError, match="too long"):
        next(items)
