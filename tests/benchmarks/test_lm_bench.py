"""The arithmetic behind the language model's benchmarks, by hand; and the benchmarks themselves, tiny."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import embedding, gpu, lm_bench, scoring
from benchmarks.lm_bench import Machine

CPU = torch.device("cpu")
TOY = lm_bench.llama(hidden=4, layers=3, heads=2, intermediate=5, vocabulary=100)


def test_parameters_of_matrix_products() -> None:
    # A layer: q, k, v and o of 4 × 4; gate, up and down of 4 × 5.
    assert TOY.matmul_parameters == 3 * (4 * 16 + 3 * 20)
    # As Llama-13B is published: 13.016 billion, of which 2 × 32,000 × 5,120 in embedding and head, 81 norms of 5,120.
    assert lm_bench.VICUNA_13B.matmul_parameters + 2 * 32_000 * 5120 + 81 * 5120 == 13_015_864_320


def test_flops_by_hand() -> None:
    # A row of 3 tokens has 1 + 2 + 3 pairs, one of 2 has 1 + 2; a pair costs 2 · 4 in q·k and 2 · 4 in its
    # weight · v, in each of 3 layers.
    assert lm_bench.forward_flops(TOY, [3, 2]) == 2 * 372 * 5 + 432
    assert lm_bench.tuning_flops(TOY, [3, 2]) == 4 * 372 * 5 + 3 * 432
    assert lm_bench.mfu(6e12, 2.0, 4e12) == 0.75


@pytest.mark.slow
def test_flops_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = lm_bench.build_model(lm_bench.TINY, CPU, torch.float32)
    with FlopCounterMode(display=False) as counter:
        model.model(input_ids=torch.ones((2, 30), dtype=torch.int64))
    # torch counts the whole square of attention, we its causal half with the diagonal.
    products = 2.0 * lm_bench.TINY.matmul_parameters * 60
    square = (lm_bench.forward_flops(lm_bench.TINY, [30, 30]) - products) * 30 / 15.5
    assert counter.get_total_flops() in (products, products + square)
    assert lm_bench.forward_flops(lm_bench.TINY, [30, 30]) == pytest.approx(products + square * 15.5 / 30)


def test_ways_run_in_turn_and_the_median_is_taken() -> None:
    order: list[str] = []
    found = lm_bench.interleaved({n: lambda n=n: order.append(n) or n for n in ("a", "b")}, 2, CPU)
    assert order == ["a", "b"] * 3
    assert found["b"].result == "b"
    assert len(found["a"].seconds) == 2
    assert lm_bench.Timing([3.0, 1.0, 9.0]).median == 3.0


def test_peak_memory_is_what_the_work_takes() -> None:
    kept: list[torch.Tensor] = []
    for size in (60, 20):
        peak = lm_bench.peak_memory(lambda size=size: torch.ones(size, 2**20).sum() and None, CPU)
        assert size * 2**22 * 0.9 < peak.used < size * 2**22 * 1.3 + 2**24
    assert not kept


def test_our_faults_are_told_apart_from_rounding() -> None:
    single, half = torch.float32, torch.bfloat16
    assert lm_bench.worse({"ours": 9e-6, "authors": 1e-7}, single) == ""
    assert "2.0e-05" in lm_bench.worse({"ours": 2e-5, "authors": 1e-3}, single)
    assert lm_bench.worse({"ours": 0.019, "authors": 0.01, "engineer": 0.002}, half) == ""
    assert "more than 2.0e-02" in lm_bench.worse({"ours": 0.021, "authors": 0.01, "engineer": 0.002}, half)


def test_exact_states_are_float32_of_the_same_weights() -> None:
    model = lm_bench.build_model(lm_bench.TINY, CPU, torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    m = Machine(CPU, torch.bfloat16, lm_bench.TINY, model, None, 1.0)
    rows = [np.arange(3, 3 + n, dtype=np.int32) for n in (5, 9)]
    found = lm_bench.exact_states(m, rows)
    # What was converted in inference mode could not be tuned by the next benchmark of a run.
    assert not any(p.is_inference() for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    whole = model.float().model
    for row, states in zip(rows, found, strict=True):
        right = whole(input_ids=torch.from_numpy(row.astype(np.int64))[None]).last_hidden_state[0]
        torch.testing.assert_close(states, right)


def test_kernels_are_told_apart_by_name() -> None:
    assert gpu.kind_of("nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_TNT") == "dense products"
    assert gpu.kind_of("pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>") == "attention"
    assert gpu.kind_of("Memcpy DtoH (Device -> Pinned)") == "copies"
    assert gpu.kind_of("void at::native::vectorized_elementwise_kernel<4, silu>") == "element-wise and sums"


def test_texts_are_of_the_length_that_they_stand_for() -> None:
    tokenizer = lm_bench.bench_tokenizer()
    items = [len(ids) for ids in tokenizer(lm_bench.item_sentences(200))["input_ids"]]
    prompts = [len(ids) for ids in tokenizer(lm_bench.wrapped_prompts(30))["input_ids"]]
    assert 20 <= min(items) <= np.median(items) <= max(items) <= 60
    assert 600 <= np.median(prompts) <= 900
    assert max(prompts) < 2048
    yes, no = lm_bench.answer_tokens(tokenizer)
    assert (tokenizer.decode([yes]), tokenizer.decode([no])) == (" Yes", " No")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sizes of the benchmarks that take a second."""
    monkeypatch.setattr(embedding, "SIZES", {("cpu", True): embedding.Size(40, 3, 10, 4, 1)})
    monkeypatch.setattr(scoring, "SIZES", {("cpu", True): scoring.Size(5, 4, 4, 2, 1, 5)})
    monkeypatch.setattr(lm_bench, "_product_rate", lambda *arguments: 1e11)
    yield
    torch.set_grad_enabled(True)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_card_s_script_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    words = ["gpu.py", "--quick", "--device", "cpu", "--shape", "llama-32x2", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", [*words, "--only", "embedding,scoring"])
    monkeypatch.setattr(embedding, "sentence_transformer", lambda m: None)  # only some machines have it
    gpu.main()
    figures: dict[str, Any] = json.loads(file.read_text())
    for part in ("embedding", "scoring"):
        for key in ("mfu", "ratio_authors", "memory_ratio_authors", "error_ours", "error_authors"):
            assert figures[f"{part}.{key}"] > 0
        assert figures[f"{part}.error_ours"] < 1e-5
    assert figures["scoring.ratio_engineer"] > 0
    shown = capsys.readouterr().out
    assert "engineer  left out" in shown
    assert "minutes in all" in shown


@pytest.mark.slow
def test_a_profile_says_where_the_time_goes() -> None:
    m = Machine(CPU, torch.float32, lm_bench.TINY, lm_bench.build_model(lm_bench.TINY, CPU, torch.float32), None, 1.0)
    shown = gpu.profile(m, lambda: m.model.model(input_ids=torch.ones((4, 300), dtype=torch.int64)))
    assert "dense products" in shown
    assert "aten::mm" in shown


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_wrong_answer_fails_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    right = scoring.ours
    monkeypatch.setattr(scoring, "ours", lambda m, task, *tokens: right(m, task, *tokens) + 0.001)
    monkeypatch.setattr(scoring, "authors_way", right)
    monkeypatch.setattr(scoring, "engineer_way", lambda m, task, batch: right(m, task))
    monkeypatch.setattr(sys, "argv", ["scoring.py", "--quick", "--device", "cpu", "--shape", "llama-32x2"])
    with pytest.raises(SystemExit, match=r"scoring: ours is .* from the exact result"):
        scoring.main()
