"""Tuning: the loss is Eq. 3 whatever the layout, only LoRA moves, the loss scale goes on; DeepSpeed is not at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rella.config import TuneConfig
from rella.lm.lora import add_lora
from rella.lm.tuning import AnswerModel, Progress, Row, Tuner, epoch_order, seed_dropout, validation_steps
from rella.lm.zero import Engine, deepspeed_config


def rows_of(lengths: list[int], answers: list[tuple[int, ...]], seed: int = 0) -> list[Row]:
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, 300, n).astype(np.int32) for n in lengths]
    return [Row(p, a) for p, a in zip(prompts, answers, strict=True)]


def tuner_of(model: Any, rows: list[Row], **changes: Any) -> Tuner:
    quiet: Callable[[Progress], None] = lambda progress: None  # noqa: E731
    tuner = Tuner(model, rows, TuneConfig(**changes), "float32", 2, 0, lambda root: {"auc": 0.5}, quiet)
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
    loss = AnswerModel(shared_base)
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
        AnswerModel(shared_base)(*tuner_of(shared_base, rows)._inputs(np.arange(6)))
    hook.remove()
    assert seen == [(12, shared_base.config.vocab_size)]


@given(st.integers(1, 50), st.integers(1, 60))
def test_validations_are_spread_over_an_epoch_and_end_it(steps: int, per_epoch: int) -> None:
    found = sorted(validation_steps(steps, per_epoch))
    assert found[-1] == steps
    assert found[0] >= 1
    assert len(found) == min(steps, per_epoch)
    gaps = np.diff([0, *found])
    assert gaps.max() - gaps.min() <= 1


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


def test_the_masks_of_a_step_are_those_of_torch_s_own_seeding(monkeypatch: pytest.MonkeyPatch) -> None:
    # Pinned: other masks would be another course for a run that goes on from an older checkpoint.
    torch.manual_seed(((5 * 1_000_003 + 7) * 4_099 + 1) % 2**63)
    wanted = torch.rand(4)
    # What torch's own spends its time on: a stack for each kind of accelerator that is not there.
    monkeypatch.setattr("traceback.format_stack", lambda: pytest.fail("a stack was written down"))
    seed_dropout(5, 7, 1, torch.device("cpu"))
    assert torch.equal(torch.rand(4), wanted)
    for other in ((6, 7, 1), (5, 8, 1), (5, 7, 0)):
        seed_dropout(*other, torch.device("cpu"))
        assert not torch.equal(torch.rand(4), wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_masks_of_a_step_on_a_card_are_those_of_torch_s_own_seeding() -> None:
    for card in (torch.device("cuda"), torch.device("cuda:0")):
        torch.manual_seed((5 * 1_000_003 + 7) * 4_099)
        wanted = torch.nn.functional.dropout(torch.ones(64, device=card))
        seed_dropout(5, 7, 0, card)
        assert torch.equal(torch.nn.functional.dropout(torch.ones(64, device=card)), wanted)


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


def test_the_loss_scale_of_float16_goes_on_where_it_was() -> None:
    """DeepSpeed refuses float16 on most CPUs, so this looks at its loss scale alone."""
    from types import SimpleNamespace

    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    def engine_with(scaler: Any) -> Engine:
        engine = object.__new__(Engine)
        engine.optimiser = SimpleNamespace(loss_scaler=scaler)
        return engine

    first, second = (DynamicLossScaler(2.0**14, 1000, 1.0, 2, False) for _ in range(2))
    # As after an overflow at the fourth of nine steps.
    first.cur_scale, first.cur_iter, first.last_overflow_iter, first.cur_hysteresis = 2.0**13, 9, 3, 1
    before, after = engine_with(first), engine_with(second)
    assert before.loss_scale == 2.0**13
    after._restore_scale(before._scale())
    assert vars(second) == vars(first)
    assert engine_with(None)._scale() == {}
    assert engine_with(None).loss_scale == 1.0


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_deepspeed_s_settings(precision: Any) -> None:
    config = TuneConfig(clip=0.5, zero_stage=1)
    found = deepspeed_config(config, precision, 4096)
    # Passes differ in number from step to step: the engine is told which is a step's last.
    assert (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]) == (1, 1)
    assert found["gradient_clipping"] == 0.5
    assert found["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 4096}
    assert (found["fp16"]["enabled"], found["bf16"]["enabled"]) == (precision == "float16", precision == "bfloat16")


def test_more_settings_are_laid_over_deepspeed_s() -> None:
    more = {"zero_optimization": {"overlap_comm": True}, "fp16": {"initial_scale_power": 10}, "memory_breakdown": True}
    found, plain = (deepspeed_config(TuneConfig(), "float16", 8, s) for s in (more, None))
    assert found["zero_optimization"] == plain["zero_optimization"] | {"overlap_comm": True}
    assert found["fp16"] == {"enabled": True, "initial_scale_power": 10}
    assert found == plain | {k: found[k] for k in more}
