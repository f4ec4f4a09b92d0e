"""The fit: one curve for every layout, resuming is exact, the best step is kept; two processes agree with one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from rella.baselines import TextBaseline, TextBaselineConfig, mlm_stage
from rella.lm.checkpoints import TrainingState
from rella.lm.tuning import Progress, epoch_order
from rella.metrics import evaluate
from rella.models import ModelIdentity
from rella.textctr.baselines import load_baseline
from rella.textctr.examples import PairExamples, TextExamples
from rella.textctr.fit import FitResult, TextFitter, micro_batches
from rella.textctr.model import TextModel, weights_of
from rella.textctr.optimiser import Optimiser, learning_rate
from rella.textctr.predict import Validation, predict
from rella.textctr.ptab import load_masked_lm
from tests.textctr.planted import Planted, fitted, numbered, quiet, sequences, small_ctr_bert

CPU = torch.device("cpu")
CONFIG = TextBaselineConfig(
    batch_size=8,
    max_epochs=2,
    learning_rate=2e-3,
    warmup=0.2,
    dropout=0.0,
    valid_per_epoch=2,
    precision="float32",
    micro_batch_tokens=10_000,
    batch_tokens=300,
    max_tokens=128,
)
ROWS, VALID = numbered(17, 0), numbered(15, 1)
"""The last batch of an epoch has one row, so that the second of two ranks has none."""


def figures(result: FitResult) -> list[float]:
    return [*result.course.losses, *(v[name] for v in result.course.valid for name in ("auc", "log_loss"))]


@pytest.fixture(scope="module")
def reference() -> FitResult:
    return fitted(small_ctr_bert(), ROWS, CONFIG, VALID)


def test_the_course(reference: FitResult) -> None:
    course = reference.course
    assert course.steps == 6, "17 rows in batches of 8, 8 and 1, twice"
    assert course.rows == 34
    assert [v["step"] for v in course.valid] == [2, 3, 5, 6]
    best = max(course.valid, key=lambda v: (v["auc"], -v["step"]))
    assert course.best_step == best["step"]


def test_the_first_loss_is_the_mean_over_the_batch(reference: FitResult) -> None:
    model, batch = small_ctr_bert(), epoch_order(17, 0, 0)[:8]
    with torch.no_grad():
        logits = torch.cat([model.click_logits(ROWS, np.array([row])) for row in batch])
    right = nn.functional.binary_cross_entropy_with_logits(logits.double(), torch.from_numpy(ROWS.labels[batch]))
    assert reference.course.losses[0] == pytest.approx(float(right), abs=1e-6)


def by_hand(clip: float | None) -> list[float]:
    """The losses by a plain loop over whole batches."""
    from transformers import get_linear_schedule_with_warmup

    model = small_ctr_bert()
    adam = torch.optim.AdamW(model.parameters(), lr=CONFIG.learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(adam, 2, 6)
    losses = []
    for epoch in range(2):
        order = epoch_order(17, 0, epoch)
        for batch in (order[:8], order[8:16], order[16:]):
            logits, labels = model.click_logits(ROWS, batch), torch.from_numpy(ROWS.labels[batch]).float()
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
            adam.zero_grad()
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            adam.step()
            schedule.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_curve_is_that_of_a_plain_loop(clip: float | None) -> None:
    found = fitted(small_ctr_bert(), ROWS, replace(CONFIG, clip=clip), VALID)
    np.testing.assert_allclose(found.course.losses, by_hand(clip), atol=1e-5)


def test_clipping_changes_the_curve() -> None:
    assert max(abs(a - b) for a, b in zip(by_hand(None), by_hand(0.05), strict=True)) > 1e-4


@pytest.mark.parametrize("budget", [1, 40, 70, 150])
def test_micro_batches_do_not_change_the_curve(budget: int, reference: FitResult) -> None:
    found = fitted(small_ctr_bert(), ROWS, replace(CONFIG, micro_batch_tokens=budget), VALID)
    np.testing.assert_allclose(figures(found), figures(reference), atol=1e-5)


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.integers(1, 5),
    st.integers(1, 200),
    st.integers(0, 3),
)
def test_micro_batches_are_a_partition(lengths: list[int], world: int, budget: int, seed: int) -> None:
    batch = np.random.default_rng(seed).permutation(len(lengths))[: max(1, len(lengths) // 2)]
    sizes = np.array(lengths)
    shares = [micro_batches(batch, sizes, rank, world, budget) for rank in range(world)]
    assert sorted(int(i) for share in shares for piece in share for i in piece) == sorted(batch.tolist())
    counts = [sum(map(len, share)) for share in shares]
    assert max(counts) - min(counts) <= 1
    for piece in (piece for share in shares for piece in share):
        assert len(piece) == 1 or max(sizes[piece]) * len(piece) <= budget
    # A function of the set of rows: their order in the batch does not count.
    again = micro_batches(np.sort(batch), sizes, 0, world, budget)
    assert [p.tolist() for p in again] == [p.tolist() for p in shares[0]]


SCRIPT = """
import sys
import torch, torch.distributed as dist
from pathlib import Path
from safetensors.torch import save_file
from rella.lm.checkpoints import TrainingState
from tests.textctr.planted import Planted, fitted, small_ctr_bert
from tests.textctr.test_fit import CONFIG, ROWS, VALID, figures

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
start = TrainingState.from_bytes((folder / "start").read_bytes(), "k")
for name, state in (("whole", None), ("resumed", start)):
    model = small_ctr_bert()
    if rank and state is None:
        # What the ranks start from is rank 0's.
        torch.nn.init.zeros_(model.head[0].weight)
    found = fitted(model, ROWS, CONFIG, VALID, rank=rank, world=2, start=state)
    curve = torch.tensor(figures(found), dtype=torch.float64)
    tensors = {"figures": curve, "step": torch.tensor(found.course.best_step), **found.best}
    save_file(tensors, folder / f"{name}-{rank}.safetensors")
"""


@pytest.mark.groups
def test_two_processes_give_the_same_curve(reference: FitResult, tmp_path: Path) -> None:
    """From the start, and from a checkpoint that one process wrote."""
    states: list[bytes] = []
    save = lambda state: states.append(state.to_bytes("k"))  # noqa: E731
    fitted(small_ctr_bert(), ROWS, replace(CONFIG, checkpoint_seconds=0.0), VALID, save=save)
    (tmp_path / "start").write_bytes(states[3])
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    repository = Path(__file__).resolve().parents[2]
    ranks = [subprocess.Popen([*command, str(n)], cwd=repository, stderr=subprocess.PIPE, text=True) for n in (0, 1)]
    assert [(r.communicate(timeout=200)[1], r.returncode)[1] for r in ranks] == [0, 0]
    for name in ("whole", "resumed"):
        found, other = (load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in (0, 1))
        assert all(torch.equal(tensor, other[key]) for key, tensor in found.items()), "both ranks end alike"
        np.testing.assert_allclose(found.pop("figures"), figures(reference), atol=1e-5)
        assert int(found.pop("step")) == reference.course.best_step
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, reference.best[key], atol=2e-4, rtol=1e-3)


def same(a: FitResult, b: FitResult) -> bool:
    return (
        (a.course.losses, a.course.valid, a.course.best_step) == (b.course.losses, b.course.valid, b.course.best_step)
        and a.best.keys() == b.best.keys()
        and all(torch.equal(a.best[n], b.best[n]) for n in a.best)
    )


@pytest.mark.parametrize("with_validation", [True, False])
def test_resuming_is_exact(with_validation: bool) -> None:
    """With dropout, from every step, through the bytes of a checkpoint."""
    config, valid = replace(CONFIG, checkpoint_seconds=0.0), VALID if with_validation else None
    states: list[bytes] = []
    whole = fitted(small_ctr_bert(0.1), ROWS, config, valid, save=lambda s: states.append(s.to_bytes("k")))
    assert len(states) == 5, "none after the last step"
    for step, data in enumerate(states, 1):
        state = TrainingState.from_bytes(data, "k")
        assert state is not None
        assert state.course.steps == step
        resumed = fitted(small_ctr_bert(0.1), ROWS, config, valid, start=state)
        assert same(resumed, whole), f"from step {step}"
        assert resumed.course.resumed_at == [step]


def test_dropout_masks_follow_the_seed() -> None:
    torch.manual_seed(1)
    first = fitted(small_ctr_bert(0.3), ROWS, CONFIG, VALID)
    torch.manual_seed(2)
    assert same(fitted(small_ctr_bert(0.3), ROWS, CONFIG, VALID), first)
    assert not same(fitted(small_ctr_bert(0.3), ROWS, CONFIG, VALID, seed=1), first)
    assert first.course.losses[0] != fitted(small_ctr_bert(), ROWS, CONFIG, VALID).course.losses[0]


class Drawing(TextModel[PairExamples]):
    """Remembers the random numbers that its dropout would draw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.drawn: list[float] = []

    def loss(self, examples: PairExamples, rows: Any, epoch: int) -> tuple[torch.Tensor, float]:
        self.drawn.append(float(torch.rand(1)))
        return self.weight.sum(), float(len(rows))


def test_masks_differ_by_seed_step_rank_and_micro_batch() -> None:
    def drawn(seed: int, rank: int) -> list[float]:
        model = Drawing()
        fitted(model, ROWS, replace(CONFIG, micro_batch_tokens=100), seed=seed, rank=rank)
        return model.drawn

    first = drawn(0, 0)
    assert drawn(0, 0) == first
    assert len(first) > 6
    everything = [number for seed, rank in ((0, 0), (1, 0), (0, 1)) for number in drawn(seed, rank)]
    assert len(set(everything)) == len(everything)


def test_the_best_step_s_weights_are_kept() -> None:
    wanted, weights = [0.6, 0.9, 0.9, 0.7], []
    model = small_ctr_bert()

    def validate() -> dict[str, float]:
        weights.append(weights_of(model))
        return {"auc": wanted[len(weights) - 1]}

    found = TextFitter(model, ROWS, CONFIG, 0, quiet, validate).run()
    assert found.course.best_step == 3, "the earliest of equals"
    assert all(torch.equal(found.best[n], weights[1][n]) for n in found.best)
    assert all(torch.equal(p, found.best[n]) for n, p in model.named_parameters()), "the model has them"
    assert not all(torch.equal(found.best[n], weights[3][n]) for n in found.best)


def test_patience() -> None:
    wanted = iter([0.6, 0.9, 0.8, 0.8, 0.7])
    config = replace(CONFIG, patience=2, max_epochs=9)
    found = TextFitter(small_ctr_bert(), ROWS, config, 0, quiet, lambda: {"auc": next(wanted)}).run()
    assert [v["auc"] for v in found.course.valid] == [0.6, 0.9, 0.8, 0.8]
    assert (found.course.steps, found.course.best_step) == (6, 3)


def test_validation_is_of_all_rows_in_float64() -> None:
    model = small_ctr_bert()
    found = Validation(model, VALID, 50)()
    metrics = evaluate(VALID.labels, predict(model, VALID, 10_000).probability)
    assert found == pytest.approx({"auc": metrics.auc, "log_loss": metrics.log_loss, "accuracy": metrics.accuracy})
    assert model.training


def test_progress_is_told() -> None:
    told: list[Progress] = []
    found = fitted(small_ctr_bert(), ROWS, CONFIG, VALID, report=told.append)
    steps = [p for p in told if p.valid is None]
    assert [p.loss for p in steps] == found.course.losses
    assert [(p.epoch, p.step, p.rows, p.total_rows) for p in steps] == [
        (1, 1, 8, 34),
        (1, 2, 16, 34),
        (1, 3, 17, 34),
        (2, 4, 25, 34),
        (2, 5, 33, 34),
        (2, 6, 34, 34),
    ]
    assert [p.learning_rate for p in steps] == pytest.approx([0, 1e-3, 2e-3, 1.5e-3, 1e-3, 5e-4])
    assert [p.step for p in told if p.valid] == [2, 3, 5, 6]


@pytest.mark.parametrize(("warmup", "total"), [(0.05, 100), (0.01, 250), (0.0, 7), (0.05, 3), (1.0, 4)])
def test_the_schedule_is_transformers(warmup: float, total: int) -> None:
    from transformers import get_linear_schedule_with_warmup

    config = replace(CONFIG, warmup=warmup)
    adam = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    schedule = get_linear_schedule_with_warmup(adam, int(np.ceil(warmup * total)), total)
    for step in range(total):
        assert learning_rate(config, step, total) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        adam.step()
        schedule.step()


def test_a_float16_step_that_overflows_is_skipped() -> None:
    model = nn.Linear(2, 1)
    before = weights_of(model)
    optimiser = Optimiser(model, CONFIG, "float16", 1)
    optimiser.backward(model(torch.tensor([[1e38, 1.0]])).sum() * 1e10)
    optimiser.step(0.1, 1.0)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert optimiser.scale == 2.0**13
    optimiser.backward(model(torch.tensor([[1.0, 2.0]])).sum() * 4)
    optimiser.step(0.1, 4.0)
    state = optimiser.state()
    assert (state.steps, state.scale) == (1, {"scale": 2.0**13, "good": 1.0})
    # AdamW's first step is the sign of the gradient, and the moment is that of the unscaled one.
    assert torch.allclose(state.weights["weight"], before["weight"] - 0.1, atol=1e-5)
    assert state.moments["exp_avg"]["weight"][0].tolist() == pytest.approx([0.1, 0.2])
    again = Optimiser(nn.Linear(2, 1), CONFIG, "float16", 1, state)
    assert again.state().scale == state.scale
    again.scale = 1.0
    again.backward(again.named["weight"].sum() * float("inf"))
    with pytest.raises(ArithmeticError, match="at any loss scale"):
        again.step(0.1, 1.0)


def test_bfloat16_is_near_float32(reference: FitResult) -> None:
    found = fitted(small_ctr_bert(), ROWS, replace(CONFIG, precision="bfloat16"), VALID)
    assert found.course.losses != reference.course.losses
    np.testing.assert_allclose(found.course.losses, reference.course.losses, atol=0.05)
    assert {w.dtype for w in found.best.values()} == {torch.float32}


def test_what_goes_wrong_is_said() -> None:
    empty = replace(ROWS, users=ROWS.users.of([]), item=ROWS.item[:0], labels=ROWS.labels[:0])
    with pytest.raises(ValueError, match="no training rows"):
        fitted(small_ctr_bert(), empty, CONFIG, VALID)
    for name in ("batch_size", "max_epochs", "valid_per_epoch"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            fitted(small_ctr_bert(), ROWS, replace(CONFIG, **{name: 0}), VALID)
    unknown = replace(ROWS, labels=np.where(np.arange(17) == 3, np.nan, ROWS.labels))
    with pytest.raises(ValueError, match="training rows without a label"):
        fitted(small_ctr_bert(), unknown, CONFIG, VALID)
    with pytest.raises(ValueError, match="validation rows without a label"):
        fitted(small_ctr_bert(), ROWS, CONFIG, replace(VALID, labels=np.full(15, np.nan)))
    with pytest.raises(ArithmeticError, match="lower the learning rate"):
        fitted(small_ctr_bert(), ROWS, replace(CONFIG, learning_rate=1e30, warmup=0.0), VALID)

    def full(state: TrainingState) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fitted(small_ctr_bert(), ROWS, CONFIG, VALID, save=full)


@pytest.mark.parametrize("name", ["ctr-bert", "ptab", "p5"])
def test_each_baseline_has_one_curve(
    name: TextBaseline, bert: ModelIdentity, t5: ModelIdentity, bert_tokenizer: Any, t5_tokenizer: Any
) -> None:
    identity, tokenizer = (t5, t5_tokenizer) if name == "p5" else (bert, bert_tokenizer)
    planted, curves = Planted.rows(21, 0), []
    examples = planted.pairs(tokenizer) if name == "ctr-bert" else planted.texts(tokenizer)
    for budget in (10_000, 60, 1):
        config = replace(CONFIG, micro_batch_tokens=budget)
        model = load_baseline(name, identity, tokenizer, config, 0, CPU)
        curves.append(figures(fitted(model, examples, config, examples)))
    np.testing.assert_allclose(curves[1], curves[0], atol=1e-5)
    np.testing.assert_allclose(curves[2], curves[0], atol=1e-5)


def test_stage_a_is_one_curve_and_resumes(bert: ModelIdentity, bert_tokenizer: Any) -> None:
    config = mlm_stage(replace(CONFIG, mlm_epochs=2, mlm_batch_size=8, mlm_learning_rate=1e-3, checkpoint_seconds=0.0))
    rows, states = TextExamples(sequences(20, 0), np.full(20, np.nan)), []

    def run(start: TrainingState | None = None, budget: int = 10_000) -> FitResult:
        model = load_masked_lm(bert, bert_tokenizer, config, 0, CPU)
        save = None if start else lambda s: states.append(s.to_bytes("k"))
        return fitted(model, rows, replace(config, micro_batch_tokens=budget), save=save, start=start)

    whole = run()
    np.testing.assert_allclose(run(budget=45).course.losses, whole.course.losses, atol=1e-5)
    assert same(run(TrainingState.from_bytes(states[3], "k")), whole)
    # Each epoch has its own masks.
    model = load_masked_lm(bert, bert_tokenizer, config, 0, CPU)
    assert model.loss(rows, np.arange(20), 0)[1] != model.loss(rows, np.arange(20), 1)[1]
