"""The benchmark of tuning on next to nothing: its ways agree, its figures are what they are called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("bench") / "tuning.json"
    size = ["--quick", "--device", "cpu", "--shape", "llama-32x2", "--batch", "4", "--rounds", "1"]
    ways = ["--ways", "ours,packed,by_hand,authors"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "benchmarks/tuning.py", *size, *ways, "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_all_ways_give_one_loss(figures: dict[str, Any]) -> None:
    assert 0 <= figures["loss_gap"] < 1e-3


def test_the_ratios_are_those_of_the_seconds(figures: dict[str, Any]) -> None:
    for way in ("authors", "by_hand", "packed"):
        assert figures[f"ratio_{way}"] == pytest.approx(figures[f"{way}_seconds"] / figures["ours_seconds"])
    memory = figures["authors_used_mb"] / figures["ours_used_mb"]
    assert figures["memory_ratio_authors"] == pytest.approx(memory, rel=1e-3)
    assert memory > 2, "logits of a whole vocabulary at every position"


def test_mfu_is_flops_by_time_and_rate(figures: dict[str, Any]) -> None:
    """2 layers of 4·32² + 3·32·64 weights, 4 FLOP each a token; attention comes on top."""
    tokens = 4 * figures["tokens_per_row"]
    least = 4 * 2 * (4 * 32**2 + 3 * 32 * 64) * tokens / figures["ours_seconds"] / (figures["gemm_tflops"] * 1e12)
    assert least < figures["ours_mfu"] < 3 * least
    assert figures["ours_tokens_per_second"] == pytest.approx(tokens / figures["ours_seconds"])
