"""Table 6: parameters counted by hand, the median and the warm-up by steps that count, the paths that are timed."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from rella.analysis.complexity import Complexity, ctr_complexity, lm_complexity, lm_parameters, measure
from rella.baselines import BaselineConfig
from rella.config import TuneConfig
from rella.ctr.features import FeatureSpace
from rella.ctr.fit import predict
from rella.ctr.models import build
from rella.errors import InputError
from rella.lm import scoring
from rella.lm.encoding import Ids
from rella.lm.loading import attach_adapter, describe_base, load_base
from rella.lm.lora import add_lora
from rella.models import TINY, ModelIdentity, identify
from tests.ctr.worlds import random_batch, sample_world

CPU = torch.device("cpu")
PAIR = (301, 17)
RANK = 3
ADAPTED = 2 * 2 * RANK * (32 + 32)
"""2 layers × (q, v) × (A and B of rank 3)."""


def by_hand(vocabulary: int) -> int:
    attention, mlp, norms = 4 * 32 * 32, 3 * 32 * 64, 2 * 32
    return 2 * vocabulary * 32 + 2 * (attention + mlp + norms) + 32


def prompts(count: int) -> list[Ids]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 300, 5 + n).astype(np.int32) for n in range(count)]


class Steps:
    """A step that counts, and takes its time: longer while it is warmed up, and now and then much longer."""

    def __init__(self, milliseconds: list[float]) -> None:
        self.milliseconds, self.count = milliseconds, 0

    def __call__(self) -> None:
        time.sleep(self.milliseconds[self.count] / 1e3)
        self.count += 1


def test_the_median_behind_the_warm_up() -> None:
    steps = Steps([60.0, 60.0, 60.0, 5.0, 5.0, 80.0, 5.0, 5.0])
    found = measure(steps, CPU, batches=5, warm_up=3)
    assert steps.count == 8
    assert 5.0 <= found < 30.0
    steps = Steps([1.0, 20.0, 20.0])
    assert measure(steps, CPU, batches=2, warm_up=1) >= 20.0
    with pytest.raises(InputError, match="at least 1"):
        measure(steps, CPU, batches=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_card_is_waited_for() -> None:
    card = torch.device("cuda")
    x = torch.randn(4096, 4096, device=card)

    def work() -> None:
        for _ in range(20):
            x @ x

    # Asking alone takes well under a millisecond; the products take over 2 of them on any card.
    assert measure(work, card, batches=5) > 2.0


def test_a_base_and_its_adapter_are_counted_by_hand(base: Any, identity: ModelIdentity, tmp_path: Any) -> None:
    whole = by_hand(base.config.vocab_size)
    assert lm_parameters(base) == (whole, 0)
    tuned = add_lora(base, TuneConfig(lora_rank=RANK), seed=0)
    assert lm_parameters(tuned) == (whole + ADAPTED, ADAPTED)
    assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == ADAPTED
    # Attached to be scored with, its weights are frozen.
    tuned.save_pretrained(str(tmp_path), safe_serialization=True)
    (tmp_path / "rella_base.json").write_bytes(describe_base(identity))
    attached = attach_adapter(load_base(identity, "float32", CPU), tmp_path, identity)
    assert not any(p.requires_grad for p in attached.parameters())
    assert lm_parameters(attached) == (whole + ADAPTED, ADAPTED)


def test_packed_weights_are_counted_one_by_one() -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    tiny = identify(str(TINY))
    exact = lm_parameters(load_base(tiny, "float32", CPU))
    for kind in ("nf4", "int8"):
        assert lm_parameters(load_base(tiny, "float32", CPU, quantize=kind)) == exact


def test_a_row_of_the_lm(shared_base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[list[int]] = []
    pad_right = scoring.run_passes.__globals__["pad_right"]

    def seen(rows: Any, *rest: Any) -> Any:
        passes.append([len(r) for r in rows])
        return pad_right(rows, *rest)

    monkeypatch.setitem(scoring.run_passes.__globals__, "pad_right", seen)
    found = lm_complexity("zero-shot", shared_base, prompts(10), PAIR, 0, batch=4, batches=3, warm_up=2)
    # Two whole batches in turn, each one pass.
    assert passes == [[5, 6, 7, 8], [9, 10, 11, 12]] * 2 + [[5, 6, 7, 8]]
    what = "4 prompts of 8 tokens on average, from token ids to the logits of Yes and No"
    device = f"CPU, {torch.get_num_threads()} threads"
    whole = by_hand(shared_base.config.vocab_size)
    assert found == Complexity("zero-shot", whole, 0, found.milliseconds, 4, 3, device, what)
    assert found.milliseconds > 0
    with pytest.raises(InputError, match="out of 3 prompts"):
        lm_complexity("x", shared_base, prompts(3), PAIR, 0)


def test_a_batch_that_does_not_fit_is_no_figure(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = base.base_model
    forward = decoder.forward

    def small_card(input_ids: torch.Tensor, **more: Any) -> Any:
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError
        return forward(input_ids=input_ids, **more)

    monkeypatch.setattr(decoder, "forward", small_card)
    with pytest.raises(InputError, match="batch of 4 prompts, 32 tokens, does not fit"):
        lm_complexity("x", base, prompts(4), PAIR, 0, batches=1, warm_up=0)


def test_a_row_of_a_ctr_model() -> None:
    config, world = BaselineConfig(model="sim", search="hard"), sample_world()
    samples, model = world.batches(config, "train", 5), build(config, world.features, 5, seed=0)
    _, expected = predict(model, samples, CPU, np.arange(2 * 64))
    seen: list[np.ndarray] = []
    model.register_forward_hook(lambda _module, _args, out: seen.append(out.numpy().copy()))
    model.train()
    found = ctr_complexity("SIM", model, samples, batch=64, batches=2, warm_up=0)
    assert model.training
    # The first batches, without dropout, as they are scored.
    np.testing.assert_array_equal(np.concatenate(seen), expected)
    total = sum(p.numel() for p in model.parameters())
    assert (found.parameters, found.trainable, found.batch, found.batches) == (total, total, 64, 2)
    assert found.what == "64 samples of at most 5 behaviours, from feature ids to logits"
    assert found.milliseconds > 0
    with pytest.raises(InputError, match=f"a batch of {len(samples) + 1} out of {len(samples)} samples"):
        ctr_complexity("SIM", model, samples, batch=len(samples) + 1)


class RandomBatches:
    """As many samples as one likes, of random features."""

    k = 30

    def __init__(self, space: FeatureSpace, rows: int) -> None:
        self.space, self.rows = space, rows

    def __len__(self) -> int:
        return self.rows

    def take(self, rows: np.ndarray) -> Any:
        return random_batch(self.space, len(rows), self.k, seed=int(rows[0]))


def test_sim_as_in_table_6() -> None:
    """1.44M on MovieLens-1M with E = 64, all of them trained."""
    config = BaselineConfig(model="sim", embedding_dim=64, dnn_size=256, dnn_layers=3, attention_size=256)
    space = FeatureSpace(count=16_945, fields=8, item_at=5, first_level=16_940, levels=5)
    samples: Any = RandomBatches(space, 1100)
    found = ctr_complexity("SIM", build(config, space, 30, seed=0), samples, batches=2, warm_up=1)
    assert (found.parameters, found.trainable, found.batch) == (1_438_337, 1_438_337, 512)
