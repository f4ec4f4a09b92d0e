"""The models: their papers' equations, padding of no consequence, gradients everywhere, sizes as published."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch.nn import functional

from rella.baselines import BaselineConfig, IdBaseline
from rella.ctr.batches import Batch
from rella.ctr.features import FeatureSpace
from rella.ctr.layers import CrossNetV2, Dropout, Embeddings, TargetAttention, factorization_machine
from rella.ctr.models import MODELS, build, parameters
from rella.errors import InputError
from tests.ctr.reference import Reference
from tests.ctr.worlds import SPACE, UNRATED, random_batch

K = 5
SMALL = BaselineConfig(
    embedding_dim=4,
    dnn_size=6,
    dnn_layers=2,
    cross_layers=2,
    attention_layers=2,
    attention_size=8,
    attention_heads=2,
    gru_layers=2,
    gru_size=5,
    vertical_kernels=3,
    horizontal_kernels=2,
    dropout=0.2,
    # Large enough for mistakes to show.
    init_std=0.7,
)
VARIANTS = [*((m, "hard") for m in MODELS), ("sim", "soft")]


def small(
    model: Any, search: Any, space: FeatureSpace = SPACE, seed: int = 0
) -> tuple[torch.nn.Module, BaselineConfig]:
    config = replace(SMALL, model=model, search=search)
    made = build(config, space, K, seed=seed).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if p.dim() < 2:  # Biases and scales begin as 0 or 1, which hides what is done with them.
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3)
            assert p.isfinite().all(), name
    return made, config


def width(search: str) -> int:
    return 3 * K if search == "soft" else K


def logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(batch)
    return found


@pytest.mark.parametrize("space", [SPACE, UNRATED], ids=["rated", "unrated"])
@pytest.mark.parametrize(("model", "search"), VARIANTS)
def test_the_forward_pass_is_the_papers(model: str, search: str, space: FeatureSpace) -> None:
    made, config = small(model, search, space)
    batch = random_batch(space, 2 * width(search) + 2, width(search), seed=3)
    found = logits(made, batch)
    assert found.shape == (len(batch),)
    expected = Reference(made, space, config, K).logits(batch)
    assert np.ptp(expected) > 1e-2
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("model", "search"), VARIANTS)
def test_more_padding_changes_nothing(model: str, search: str) -> None:
    made, _ = small(model, search)
    batch = random_batch(SPACE, 20, width(search), seed=4)
    wider = replace(batch, items=functional.pad(batch.items, (0, 7)), ratings=functional.pad(batch.ratings, (0, 7)))
    torch.testing.assert_close(logits(made, wider), logits(made, batch), rtol=0, atol=1e-12)
    short = random_batch(SPACE, 20, width(search), seed=5, lengths=[2] * 20)
    narrow = replace(short, items=short.items[:, :2], ratings=short.ratings[:, :2])
    torch.testing.assert_close(logits(made, narrow), logits(made, short), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("model", "search"), VARIANTS)
def test_samples_do_not_see_each_other(model: str, search: str) -> None:
    made, _ = small(model, search)
    batch = random_batch(SPACE, 20, width(search), seed=6)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = Batch(*(getattr(batch, f.name)[order] for f in fields(batch)))
    torch.testing.assert_close(logits(made, shuffled), logits(made, batch)[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("model", "search"), VARIANTS)
def test_gradients_reach_every_parameter_and_never_the_padding(model: str, search: str) -> None:
    made, config = small(model, search)
    batch = random_batch(SPACE, 64, width(search), seed=7)
    made.train()
    optimiser = torch.optim.AdamW(made.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        functional.binary_cross_entropy_with_logits(made(batch), batch.label.double()).backward()
        missing = [n for n, p in made.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not missing
        optimiser.step()
    for name, p in made.named_parameters():
        if "table" in name:
            assert p.shape == (SPACE.count, 1 if name.startswith("linear") else config.embedding_dim)
            assert not p[0].any()


@pytest.mark.parametrize("model", ["gru4rec", "caser", "sasrec"])
def test_the_order_of_behaviours_counts(model: str) -> None:
    made, _ = small(model, "hard")
    batch = random_batch(SPACE, 8, K, seed=8, lengths=[K] * 8)
    flipped = replace(batch, items=batch.items.flip(1), ratings=batch.ratings.flip(1))
    assert not torch.allclose(logits(made, flipped), logits(made, batch), atol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_ratings_count(model: str) -> None:
    made, _ = small(model, "hard")
    batch = random_batch(SPACE, 8, K, seed=9, lengths=[K] * 8)
    other = replace(batch, ratings=batch.ratings % 5 + 1)
    assert (logits(made, other) - logits(made, batch)).abs().min() > 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("model", "search"), VARIANTS)
def test_a_card_computes_the_same(model: str, search: str) -> None:
    made, _ = small(model, search)
    batch, card = random_batch(SPACE, 20, width(search), seed=10), torch.device("cuda")
    expected = made(batch)
    gradients = torch.autograd.grad(expected.sum(), list(made.parameters()))
    # cuDNN's recurrent layers have no gradients outside training.
    with torch.backends.cudnn.flags(enabled=model != "gru4rec"):
        found = made.to(card)(batch.to(card))
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-9)
    for on_card, own in zip(torch.autograd.grad(found.sum(), list(made.parameters())), gradients, strict=True):
        torch.testing.assert_close(on_card.cpu(), own, rtol=0, atol=1e-9)


def test_the_gradient_of_a_look_up_is_the_embeddings() -> None:
    table, ids = Embeddings(9, 3, 1.0), torch.randint(0, 9, (40,), dtype=torch.int32)
    weight = torch.randn(40, 3)
    (ours,) = torch.autograd.grad((table(ids)[0] * weight).sum(), table.weight)
    theirs = functional.embedding(ids, table.weight, padding_idx=0)
    (expected,) = torch.autograd.grad((theirs * weight).sum(), table.weight)
    torch.testing.assert_close(ours, expected)
    assert not ours[0].any()


def test_attention_is_pad_safe_in_half_precision() -> None:
    attention = TargetAttention(4, 8, 2).half()
    query, steps = torch.randn(3, 4).half(), torch.randn(3, 6, 4).half()
    mask = torch.arange(6) < torch.tensor([6, 2, 0])[:, None]
    weights = attention.weights(query, steps, mask)
    assert weights.isfinite().all()
    assert torch.equal(weights > 0, mask)
    assert weights.sum(1).tolist() == pytest.approx([1.0, 1.0, 0.0], abs=2e-3)


def test_sim_has_table_6s_size() -> None:
    """1.44M on MovieLens-1M with E = 64, a DNN of 256 x 3 and one attention layer of 256."""
    config = BaselineConfig(model="sim", embedding_dim=64, dnn_size=256, dnn_layers=3, attention_size=256)
    ml_1m = FeatureSpace(count=16_945, fields=8, item_at=5, first_level=16_940, levels=5)
    found = parameters(build(config, ml_1m, 30))
    assert found == 1_438_337
    assert round(found / 1e6, 2) == 1.44


def test_a_seed_fixes_the_weights_and_leaves_the_generator() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, two, other = (dict(build(SMALL, SPACE, K, seed=s).named_parameters()) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not torch.equal(one["inputs.table.weight"], other["inputs.table.weight"])


def test_embeddings_begin_small() -> None:
    for model in MODELS:
        config = BaselineConfig(model=model, init_std=0.01)  # type: ignore[arg-type]
        table = build(config, FeatureSpace(5000, 4, 2, 4995, 5), K).get_parameter("inputs.table.weight")
        assert float(table.detach().std()) == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    dropout, x = Dropout(p), torch.ones(999, 1001, requires_grad=True)
    torch.manual_seed(0)
    y = dropout(x)
    y.sum().backward()
    assert float((y == 0).float().mean()) == pytest.approx(p, abs=2e-3)
    assert float(y.detach().max()) == pytest.approx(1 / (1 - p))
    assert x.grad is not None
    assert torch.equal(x.grad, y)
    torch.manual_seed(0)
    assert torch.equal(dropout(x), y)
    assert dropout.eval()(x) is x


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "p5"}, "no ID-based model"),
        ({"gru_size": 0}, "gru_size"),
        ({"dropout": 1.0}, "dropout"),
        ({"attention_heads": 3}, "attention_heads"),
    ],
)
def test_sizes_that_make_no_model_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        build(replace(SMALL, **change), SPACE, K)
    with pytest.raises(InputError, match="k is too small"):
        build(SMALL, SPACE, 0)


def test_every_id_based_name_of_the_configuration_is_built() -> None:
    assert get_args(IdBaseline) == MODELS


def test_layers_are_fuxictrs() -> None:
    """Another library's layers with the same weights, where it is installed."""
    layers = pytest.importorskip("fuxictr.pytorch.layers")
    x = torch.randn(7, 4, 6)
    theirs = layers.InnerProductInteraction(4, output="product_sum")(x)
    torch.testing.assert_close(factorization_machine(x), theirs.squeeze(-1))
    cross, ours = layers.CrossNetV2(24, 2), CrossNetV2(24, 2)
    ours.layers.load_state_dict(cross.cross_layers.state_dict())
    torch.testing.assert_close(ours(x.flatten(1)), cross(x.flatten(1)))
    attention, own = layers.DIN_Attention(6, [8], "ReLU", use_softmax=True), TargetAttention(6, 8, 1)
    linear = [m for m in attention.modules() if isinstance(m, torch.nn.Linear)]
    own.first.load_state_dict(linear[0].state_dict())
    with torch.no_grad():
        own.score.weight.copy_(linear[1].weight)
    query, steps, mask = torch.randn(5, 6), torch.randn(5, 9, 6), torch.arange(9) < torch.arange(1, 6)[:, None]
    torch.testing.assert_close(own(query, steps, mask), attention(query, steps, mask.float()), rtol=1e-5, atol=1e-6)
