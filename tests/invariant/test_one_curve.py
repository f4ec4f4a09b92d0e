"""One curve: whatever the workers, micro-batches, accumulation, bucketing and ZeRO stage, killed or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.groups

LAYOUTS = [
    "1 x 8 accumulated",
    "2 x 4 accumulated",
    "4 x 2 accumulated",
    "uneven",
    "as they come",
    "stage 1",
    "stage 3",
    "recomputed",
    "by tokens",
    "packed",
    "with zero2.json",
    "2, stage 1",
    "2, stage 3",
    "2, as they come",
    "2, packed",
]
SLOW_LAYOUTS = [
    "every other layer recomputed",
    "packed, as they come",
    "packed, recomputed, stage 3",
    "with zero1.json",
    "with zero3.json",
    "with zero3-offload.json",
]
RESUMED = {"1 to 2": 4, "2 to 1": 6, "2 to 4": 9, "stage 3 to stage 1": 8}
"""Run → the step at which it went on."""


def test_the_curve_is_that_of_a_plain_loop(runs: dict[str, Any]) -> None:
    """Independent of DeepSpeed, batches, padding and answer-only logits."""
    np.testing.assert_allclose(runs["1 x 16"]["losses"], runs["plain"], rtol=0, atol=1e-5)
    assert max(runs["plain"]) - min(runs["plain"]) > 1, "a curve that is flat would prove nothing"


def test_the_loss_falls(runs: dict[str, Any]) -> None:
    losses = runs["1 x 16"]["losses"]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_one_curve(layout: str, runs: dict[str, Any]) -> None:
    assert_one_curve(layout, runs)


@pytest.mark.slow
@pytest.mark.parametrize("layout", SLOW_LAYOUTS)
def test_every_other_layout_gives_it_too(layout: str, more_runs: dict[str, Any]) -> None:
    assert_one_curve(layout, more_runs)


def assert_one_curve(layout: str, runs: dict[str, Any]) -> None:
    np.testing.assert_allclose(runs[layout]["losses"], runs["1 x 16"]["losses"], rtol=0, atol=1e-5)
    for name, weights in runs["1 x 16"]["best_weights"].items():
        np.testing.assert_allclose(runs[layout]["best_weights"][name], weights, rtol=0, atol=2e-3)


def test_the_layouts_are_what_they_say(runs: dict[str, Any]) -> None:
    """Batches of 16, 16 and 5 rows, four times."""
    assert runs["1 x 16"]["passes"] == [1, 1, 1] * 4
    assert runs["1 x 8 accumulated"]["passes"] == [8, 8, 3] * 4
    assert runs["2 x 4 accumulated"]["passes"] == [4, 4, 2] * 4
    assert runs["4 x 2 accumulated"]["passes"] == [2, 2, 1] * 4
    for run in ("by tokens", "packed"):
        assert len(set(runs[run]["passes"])) > 2, "their number follows the lengths"
    assert sum(runs["packed"]["passes"]) < sum(runs["by tokens"]["passes"])


@pytest.mark.parametrize("run", RESUMED)
def test_a_killed_run_goes_on_with_other_workers(run: str, runs: dict[str, Any]) -> None:
    found = runs[run]
    assert found["resumed_at"][-1] == RESUMED[run]
    np.testing.assert_allclose(found["losses"], runs["1 x 16"]["losses"], rtol=0, atol=1e-5)
    assert found["rows"] == 4 * 37
    assert found["best"] == runs["1 x 16"]["best"]


def test_the_same_layout_resumes_exactly(runs: dict[str, Any]) -> None:
    """To the bit, with dropout."""
    assert runs["dropout, killed"] == {"killed": True}
    found, whole = runs["dropout, resumed"], runs["dropout"]
    assert found["resumed_at"] == [7]
    assert found["losses"] == whole["losses"]
    assert found["best_weights"] == whole["best_weights"]
    assert found["valid"] == whole["valid"]


def test_half_precision_resumes_with_its_float32_weights(runs: dict[str, Any]) -> None:
    """Weights rounded to bfloat16 alone would not do: the masters go on where they were."""
    assert runs["half, resumed"]["losses"] == runs["half, whole"]["losses"]
    assert runs["half, resumed"]["best_weights"] == runs["half, whole"]["best_weights"]
    assert runs["half, resumed"]["resumed_at"] == [4]


def test_stage_3_was_killed_twice(runs: dict[str, Any]) -> None:
    assert runs["stage 3 to stage 1"]["resumed_at"] == [4, 8]


def test_patience_survives(runs: dict[str, Any]) -> None:
    """Validated .9 and .5 before, .4 after: two in a row without improvement, and the first one's weights kept."""
    found = runs["patience, resumed"]
    assert [v["auc"] for v in found["valid"]] == [0.9, 0.5, 0.4]
    assert found["best"] == 3
    assert len(found["losses"]) == 9


@pytest.mark.parametrize("prefix", ["", "2, "])
def test_dropout_repeats_exactly(prefix: str, runs: dict[str, Any]) -> None:
    assert runs[f"{prefix}dropout"]["losses"] == runs[f"{prefix}dropout again"]["losses"]
    assert np.abs(np.subtract(runs[f"{prefix}dropout"]["losses"], runs["1 x 16"]["losses"])).max() > 1e-3


def test_the_seed_changes_the_curve(runs: dict[str, Any]) -> None:
    assert abs(runs["another seed"]["losses"][0] - runs["1 x 16"]["losses"][0]) > 1e-4


@pytest.mark.parametrize("run", ["1 x 16", "stage 1", "stage 3", "2, stage 1", "2, stage 3", "2 to 4"])
def test_frozen_weights_stay_and_all_of_lora_moves(run: str, runs: dict[str, Any]) -> None:
    assert runs[run]["frozen"]
    # 2 layers, q and v, A and B.
    assert len(runs[run]["moved"]) == 8
    assert min(runs[run]["moved"].values()) > 1e-4


def test_the_last_smaller_batch_is_trained(runs: dict[str, Any]) -> None:
    """37 rows in batches of 16: 16, 16 and 5."""
    found = runs["1 x 16"]
    assert len(found["losses"]) == 4 * 3
    assert found["rows"] == 4 * 37
    assert [p[0] for p in found["progress"] if not p[4]][:4] == [16, 32, 37, 53]
    assert {p[1] for p in found["progress"]} == {4 * 37}
    # Two rows for four micro-batches: the two that are empty weigh nothing.
    few = runs["two rows"]
    assert (few["rows"], len(few["losses"])) == (6, 3)
    np.testing.assert_allclose(few["losses"], runs["plain, two rows"], rtol=0, atol=1e-5)


def test_the_best_step_is_kept(runs: dict[str, Any]) -> None:
    """Validation AUCs .5, .9, .9, .6: the second, the earlier of two equals. `kept` starts with the fresh weights."""
    found = runs["scripted"]
    assert found["best"] == 6
    assert found["kept"] == [False, False, True, False, False]
    assert found["valid"] == [{"auc": a, "step": 3 * n} for n, a in enumerate((0.5, 0.9, 0.9, 0.6), 1)]
    assert (runs["last is best"]["best"], runs["last is best"]["kept"][-1]) == (12, True)


def test_validation_several_times_an_epoch(runs: dict[str, Any]) -> None:
    found = runs["often"]
    assert [v["step"] for v in found["valid"]] == [1, 2, 3]
    assert found["best"] == 2
    assert found["kept"] == [False, False, True, False]


def test_patience_and_stop_after_end_it_early(runs: dict[str, Any]) -> None:
    """They do not change what was trained so far: the schedule is that of `max_epochs`."""
    whole, stopped, impatient = runs["scripted"], runs["stopped"], runs["impatient"]
    assert (len(stopped["valid"]), len(impatient["valid"])) == (2, 3)
    for name, epochs in (("stopped", 2), ("impatient", 3)):
        assert runs[name]["losses"] == whole["losses"][: 3 * epochs]
        assert runs[name]["rates"] == whole["rates"][: 3 * epochs]
    assert stopped["best"] == impatient["best"] == 6


def test_the_rate_falls_linearly_to_zero(runs: dict[str, Any]) -> None:
    assert runs["1 x 16"]["rates"] == pytest.approx([0.02 * (1 - step / 12) for step in range(12)], rel=1e-12)


def test_validation_is_without_dropout(runs: dict[str, Any]) -> None:
    assert runs["dropout"]["training_while_validated"] == [False] * 4


@pytest.mark.parametrize("run", ["untrained", "stage 3", "2, stage 3", "2 x 4 accumulated", "4 x 2 accumulated"])
def test_validation_metrics_are_of_all_rows(run: str, runs: dict[str, Any]) -> None:
    """Over all workers at once; with a rate of 0 they are the base model's own, taken one prompt at a time."""
    if run == "untrained":
        expected = runs["one by one"]
        assert {k: runs[run]["valid"][0][k] for k in expected} == pytest.approx(expected, abs=1e-6)
        return
    for found, whole in zip(runs[run]["valid"], runs["1 x 16"]["valid"], strict=True):
        assert found == pytest.approx(whole, abs=1e-4)


def test_progress_is_told_after_every_step_and_epoch(runs: dict[str, Any]) -> None:
    told = runs["1 x 16"]["progress"]
    assert [p[4] for p in told] == [False, False, False, True] * 4
    assert [p[2] for p in told] == [e for e in (1, 2, 3, 4) for _ in range(4)]
    assert [p[3] for p in told if not p[4]] == list(range(1, 13))
