"""The engine on cards: the same positions, on a card where there is one, and on numba's simulator anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rella.config import Distance
from rella.retrieval import device
from rella.retrieval.engines import top_k
from rella.retrieval.index import Index, Samples
from tests.retrieval.worlds import MAKERS, Floats, world


def test_the_cases_of_simulated_card() -> None:
    cases = Path(__file__).with_name("simulated_card.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    run = subprocess.run(command, env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert "skipped" not in run.stdout
    assert "passed" in run.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("distance", ["cosine", "dot", "l2"])
@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("k", [5, 30, 300])
def test_the_same_positions_on_a_card(make: Callable[..., Floats], distance: Distance, k: int) -> None:
    rng = np.random.default_rng(k)
    vectors = make(rng, 3000, 512)
    histories, columns = world(rng, vectors, [9000, 3, 0, 1, 2000, 600], 4000)
    offsets, right = top_k(vectors, histories, *columns, k, distance)
    out, pairs = np.full(len(right), -1, np.int32), list[int]()
    index, precision = Index.of(vectors, histories, distance), torch.get_float32_matmul_precision()
    device.run(index, Samples(*columns), k, offsets[:-1], out, pairs.append)
    assert np.array_equal(out, right)
    assert sum(pairs) == columns[2].sum()
    assert torch.get_float32_matmul_precision() == precision
