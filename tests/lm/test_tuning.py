"""Tuning: the loss is Eq. 3 whatever the layout, only LoRA moves, the best epoch is kept; DeepSpeed in one process."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rella.config import TuneConfig
from rella.lm.lora import add_lora
from rella.lm.tuning import AnswerLoss, Progress, Row, Tuner, deepspeed_config, epoch_order, micro_batches


def rows_of(lengths: list[int], answers: list[tuple[int, ...]], seed: int = 0) -> list[Row]:
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, 300, n).astype(np.int32) for n in lengths]
    return [Row(p, a) for p, a in zip(prompts, answers, strict=True)]


def tuner_of(model: Any, rows: list[Row], **changes: Any) -> Tuner:
    quiet: Callable[[Progress], None] = lambda progress: None  # noqa: E731
    tuner = Tuner(model, rows, TuneConfig(**changes), "float32", 2, 0, lambda tuned: {"auc": 0.5}, quiet)
    tuner.device = torch.device("cpu")
    return tuner


def by_full_logits(model: Any, row: Row) -> float:
    """−Σ log P(y_j | x, y_<j) from the whole vocabulary at every position."""
    whole = torch.tensor([[*row.prompt.tolist(), *row.answer]])
    with torch.no_grad():
        log_p = torch.log_softmax(model(input_ids=whole).logits[0].double(), dim=-1)
    start = len(row.prompt)
    return -sum(float(log_p[start + j - 1, token]) for j, token in enumerate(row.answer))


def test_the_loss_is_that_of_the_full_logits(shared_base: Any) -> None:
    rows = rows_of([5, 30, 1, 17], [(40, 41), (50,), (60, 61, 62), (40, 41)])
    tuner = tuner_of(shared_base, rows)
    right = [by_full_logits(shared_base, row) for row in rows]
    loss = AnswerLoss(shared_base)
    for piece in ([0], [1], [2], [3], [0, 1, 2, 3], [3, 1]):
        with torch.no_grad():
            found = loss(*tuner._inputs(np.array(piece)))
        assert found.dtype == torch.float32
        assert float(found) == pytest.approx(sum(right[i] for i in piece), abs=1e-4)
    assert len({round(value, 3) for value in right}) == 4


def test_the_head_is_applied_at_answers_only(shared_base: Any) -> None:
    rows = rows_of([50] * 6, [(40, 41)] * 6)
    seen: list[tuple[int, ...]] = []
    hook = shared_base.get_output_embeddings().register_forward_hook(lambda m, i, out: seen.append(tuple(out.shape)))
    with torch.no_grad():
        AnswerLoss(shared_base)(*tuner_of(shared_base, rows)._inputs(np.arange(6)))
    hook.remove()
    assert seen == [(12, shared_base.config.vocab_size)]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 20), st.integers(0, 3))
def test_micro_batches_are_a_partition(lengths: list[int], count: int, seed: int) -> None:
    batch = np.random.default_rng(seed).permutation(len(lengths))[: max(1, len(lengths) // 2)]
    found = micro_batches(batch, np.array(lengths), count)
    assert len(found) == count
    assert sorted(i for piece in found for i in piece) == sorted(batch.tolist())
    sizes = [len(piece) for piece in found]
    assert max(sizes) - min(sizes) <= 1
    flat = [lengths[i] for piece in found for i in piece]
    assert flat == sorted(flat), "pieces hold rows of similar length"
    # A function of the set of rows: their order in the batch does not count.
    again = micro_batches(np.sort(batch), np.array(lengths), count)
    assert [p.tolist() for p in again] == [p.tolist() for p in found]


def test_the_order_of_an_epoch_is_a_function_of_seed_and_epoch() -> None:
    first = epoch_order(100, 7, 3)
    assert sorted(first.tolist()) == list(range(100))
    np.random.seed(1)
    torch.manual_seed(1)
    assert epoch_order(100, 7, 3).tolist() == first.tolist()
    others = [epoch_order(100, 7, 4), epoch_order(100, 8, 3), epoch_order(100, 3, 7)]
    assert all(other.tolist() != first.tolist() for other in others)
    # Pinned: another order would be another algorithm.
    assert epoch_order(8, 0, 0).tolist() == ORDER


ORDER = [2, 4, 3, 6, 5, 0, 1, 7]


def test_only_lora_trains(base: Any) -> None:
    before = {n: p.clone() for n, p in base.state_dict().items()}
    tuned = add_lora(base, TuneConfig(), seed=0)
    trainable = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    # 2 layers × (q, v) × (A 8×32 + B 32×8).
    assert sum(p.numel() for p in trainable.values()) == 2 * 2 * (8 * 32 + 32 * 8)
    assert all("lora_" in n and (".q_proj." in n or ".v_proj." in n) for n in trainable)
    assert all(bool((p == 0).all()) == ("lora_B" in n) for n, p in trainable.items())
    assert {m.scaling["default"] for m in tuned.modules() if isinstance(getattr(m, "scaling", None), dict)} == {2.0}
    back = tuned.unload()
    assert back.state_dict().keys() == before.keys()
    assert all(torch.equal(back.state_dict()[n], value) for n, value in before.items())


def test_the_targets_rank_and_dropout_asked_for(base: Any) -> None:
    tuned = add_lora(base, TuneConfig(lora_rank=4, lora_targets=("o_proj",), lora_dropout=0.3, lora_alpha=2), seed=0)
    names = {n: tuple(p.shape) for n, p in tuned.named_parameters() if p.requires_grad}
    assert len(names) == 4
    assert set(names.values()) == {(4, 32), (32, 4)}
    assert {m.p for m in tuned.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}
    assert {m.scaling["default"] for m in tuned.modules() if isinstance(getattr(m, "scaling", None), dict)} == {0.5}


def test_lora_starts_from_its_seed(base: Any) -> None:
    starts = []
    for seed in (0, 0, 1):
        tuned = add_lora(base, TuneConfig(), seed)
        starts.append({n: p.detach().clone() for n, p in tuned.named_parameters() if "lora_A" in n})
        base = tuned.unload()
    assert all(torch.equal(starts[0][n], starts[1][n]) for n in starts[0])
    assert not any(torch.equal(starts[0][n], starts[2][n]) for n in starts[0])


def test_a_target_that_is_not_there_is_an_error(base: Any) -> None:
    with pytest.raises(ValueError, match="query_key_value"):
        add_lora(base, TuneConfig(lora_targets=("query_key_value",)), 0)


def test_no_rows_is_an_error(shared_base: Any) -> None:
    with pytest.raises(ValueError, match="no training rows"):
        tuner_of(shared_base, []).run()


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_deepspeed_s_settings(precision: Any) -> None:
    config = TuneConfig(clip=0.5, zero_stage=1, micro_batch_rows=4)
    found = deepspeed_config(config, precision, 8)
    assert (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]) == (4, 8)
    assert (found["gradient_clipping"], found["zero_optimization"]["stage"]) == (0.5, 1)
    assert (found["fp16"]["enabled"], found["bf16"]["enabled"]) == (precision == "float16", precision == "bfloat16")


SCRIPT = """
import json, logging, math, sys, warnings

warnings.filterwarnings("ignore")
import numpy as np
import torch
import torch.distributed as dist

torch.set_num_threads(1)
folder, rendezvous, out = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
import deepspeed

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

from rella.config import TuneConfig
from rella.lm.loading import load_base
from rella.lm.lora import add_lora
from rella.lm.tuning import Row, Tuner, epoch_order
from rella.models import identify

base = load_base(identify(folder), "float32", torch.device("cpu"))
frozen = {n: p.clone() for n, p in base.state_dict().items()}
rng = np.random.default_rng(0)


def row(n):
    # The last token of the prompt tells the answer.
    label = n % 2
    prompt = [*rng.integers(3, 200, rng.integers(3, 20)), 300 + label]
    # Answers of different lengths: a mean over rows is not a mean over tokens.
    return Row(np.array(prompt, np.int32), (310, 312) if label else (311,))


ROWS = [row(n) for n in range(37)]


def lora(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def run(rows=ROWS, aucs=(0.5, 0.9, 0.9, 0.6), seed=0, **changes):
    global base
    chosen = {"learning_rate": 0.02, "batch_size": 16, "max_epochs": 4, "lora_dropout": 0.0, "micro_batch_rows": 16}
    config = TuneConfig(**(chosen | changes))
    tuned = add_lora(base, config, seed)
    start, epochs, told, modes = lora(tuned), [], [], []

    def validate(model):
        epochs.append(lora(model))
        modes.append(model.training)
        return {"auc": aucs[len(epochs) - 1]}

    tuner = Tuner(tuned, rows, config, "float32", 2, seed, validate, told.append)
    result = tuner.run()
    end = lora(tuned)
    same = [all(torch.equal(end[n], e[n]) for n in end) for e in [start, *epochs]]
    base = tuned.unload()
    return {
        "losses": result.losses,
        "rows": result.rows,
        "valid": result.valid,
        "best": result.best_epoch,
        "kept": same,
        "moved": [max(float((b[n] - a[n]).abs().max()) for n in a if "lora_B" in n)
                  for a, b in zip([start, *epochs], epochs)],
        "rates": [p.learning_rate for p in told if p.valid is None],
        "progress": [[p.rows, p.total_rows, p.epoch, p.valid is not None] for p in told],
        "training_while_validated": modes,
    }


def reference(rows, batch_size, epochs, rate, seed=0):
    \"\"\"The same, by full logits, one row at a time, with torch alone.\"\"\"
    global base
    tuned = add_lora(base, TuneConfig(lora_dropout=0.0), seed)
    weights = [p for p in tuned.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    steps, losses = math.ceil(len(rows) / batch_size), []
    for epoch in range(epochs):
        order = epoch_order(len(rows), seed, epoch)
        for step in range(steps):
            batch = [rows[i] for i in order[step * batch_size : (step + 1) * batch_size]]
            optimiser.param_groups[0]["lr"] = rate * (1 - (epoch * steps + step) / (steps * epochs))
            total = 0.0
            for r in batch:
                ids = torch.tensor([[*r.prompt.tolist(), *r.answer]])
                first = len(r.prompt) - 1
                logits = tuned(input_ids=ids).logits[0, first : first + len(r.answer)]
                total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(r.answer), reduction="sum")
            loss = total / sum(len(r.answer) for r in batch)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            losses.append(float(loss))
    base = tuned.unload()
    return losses


answers = {
    "reference": reference(ROWS, 16, 4, 0.02),
    "reference of two": reference(ROWS[:2], 16, 3, 0.02),
    "whole": run(),
    "small": run(micro_batch_rows=4),
    "uneven": run(micro_batch_rows=5, zero_stage=0),
    "dropout": run(lora_dropout=0.3),
    "dropout again": run(lora_dropout=0.3),
    "stopped": run(stop_after=2),
    "impatient": run(patience=1),
    "two rows": run(rows=ROWS[:2], max_epochs=3, micro_batch_rows=4),
    "last is best": run(aucs=(0.1, 0.2, 0.3, 0.4)),
    "another seed": run(seed=1),
}
answers["frozen"] = all(torch.equal(base.state_dict()[n], p) for n, p in frozen.items())
answers["frozen names"] = base.state_dict().keys() == frozen.keys()
with open(out, "w") as file:
    json.dump(answers, file)
"""


@pytest.fixture(scope="module")
def runs(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("deepspeed")
    (folder / "run.py").write_text(textwrap.dedent(SCRIPT))
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "LOCAL_RANK": "0",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "run.py", str(model_folder), str(folder / "meeting"), "answers.json"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "answers.json").read_text())
    return found


def test_the_loss_falls(runs: dict[str, Any]) -> None:
    losses = runs["whole"]["losses"]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_the_curve_is_that_of_a_plain_loop(runs: dict[str, Any]) -> None:
    """Independent of DeepSpeed, batching, padding and answer-only logits."""
    np.testing.assert_allclose(runs["whole"]["losses"], runs["reference"], rtol=1e-5)


@pytest.mark.parametrize("layout", ["small", "uneven"])
def test_every_layout_gives_one_curve(layout: str, runs: dict[str, Any]) -> None:
    np.testing.assert_allclose(runs[layout]["losses"], runs["whole"]["losses"], rtol=0, atol=1e-5)


def test_dropout_repeats_exactly(runs: dict[str, Any]) -> None:
    assert runs["dropout"]["losses"] == runs["dropout again"]["losses"]
    assert runs["dropout"]["losses"] != runs["whole"]["losses"]


def test_the_seed_changes_the_curve(runs: dict[str, Any]) -> None:
    assert abs(runs["another seed"]["losses"][0] - runs["whole"]["losses"][0]) > 1e-4


def test_frozen_weights_stay_and_lora_moves(runs: dict[str, Any]) -> None:
    assert runs["frozen"]
    assert runs["frozen names"]
    assert len(runs["whole"]["moved"]) == 4
    assert min(runs["whole"]["moved"]) > 1e-4


def test_the_last_smaller_batch_is_trained(runs: dict[str, Any]) -> None:
    """37 rows in batches of 16: 16, 16 and 5."""
    found = runs["whole"]
    assert len(found["losses"]) == 4 * 3
    assert found["rows"] == 4 * 37
    assert [p[0] for p in found["progress"] if not p[3]][:4] == [16, 32, 37, 53]
    assert {p[1] for p in found["progress"]} == {4 * 37}
    # Two rows for four micro-batches: the two that are empty weigh nothing.
    few = runs["two rows"]
    assert (few["rows"], len(few["losses"])) == (6, 3)
    np.testing.assert_allclose(few["losses"], runs["reference of two"], rtol=1e-5)
    assert few["moved"][0] > 1e-4


def test_the_best_epoch_is_kept(runs: dict[str, Any]) -> None:
    """Validation AUCs .5, .9, .9, .6: the second, the earlier of two equals. `kept` starts with the fresh weights."""
    found = runs["whole"]
    assert found["best"] == 2
    assert found["kept"] == [False, False, True, False, False]
    assert found["valid"] == [{"auc": a} for a in (0.5, 0.9, 0.9, 0.6)]
    assert (runs["last is best"]["best"], runs["last is best"]["kept"][-1]) == (4, True)


def test_patience_and_stop_after_end_it_early(runs: dict[str, Any]) -> None:
    """They do not change what was trained so far: the schedule is that of `max_epochs`."""
    whole, stopped, impatient = runs["whole"], runs["stopped"], runs["impatient"]
    assert (len(stopped["valid"]), len(impatient["valid"])) == (2, 3)
    for name, epochs in (("stopped", 2), ("impatient", 3)):
        assert runs[name]["losses"] == whole["losses"][: 3 * epochs]
        assert runs[name]["rates"] == whole["rates"][: 3 * epochs]
    assert stopped["best"] == impatient["best"] == 2


def test_the_rate_falls_linearly_to_zero(runs: dict[str, Any]) -> None:
    assert runs["whole"]["rates"] == pytest.approx([0.02 * (1 - step / 12) for step in range(12)], rel=1e-12)


def test_validation_is_without_dropout(runs: dict[str, Any]) -> None:
    assert runs["dropout"]["training_while_validated"] == [False] * 4


def test_progress_is_told_after_every_step_and_epoch(runs: dict[str, Any]) -> None:
    told = runs["whole"]["progress"]
    assert [p[3] for p in told] == [False, False, False, True] * 4
    assert [p[2] for p in told] == [e for e in (1, 2, 3, 4) for _ in range(4)]
    assert not math.isnan(sum(runs["whole"]["losses"]))
