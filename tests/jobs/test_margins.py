"""What the demo promises, over three training seeds: `make test-slow`.

`RELLA_TEST_STORAGE` names a storage to take up, e.g. one where `make demo` ran: what is there is not made again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "RELLA_"))}
    kept = os.environ.get("RELLA_TEST_STORAGE")
    environment["RELLA_STORAGE"] = kept or str(tmp_path_factory.mktemp("storage"))
    command = [sys.executable, "jobs/reit.py", "--seeds", "3"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])["variants"]
    return found


def test_retrieval_is_worth_three_points_of_auc_for_every_seed(variants: dict[str, dict[str, Any]]) -> None:
    ours, without = variants["ours"]["seeds"], variants["wo-retrieval"]["seeds"]
    assert len(ours) == len(without) == 3
    assert min(a - b for a, b in zip(ours, without, strict=True)) >= 0.03


def test_every_tuned_variant_beats_its_zero_shot_twin_for_every_seed(variants: dict[str, dict[str, Any]]) -> None:
    twins = {"ours": "wo-it", "wo-mixture": "wo-it", "half-n": "wo-it", "wo-retrieval": "wo-it-retrieval"}
    for tuned, zero_shot in twins.items():
        (untuned,) = variants[zero_shot]["seeds"]
        assert min(variants[tuned]["seeds"]) > untuned, tuned
        assert variants[tuned]["log_loss"] < variants[zero_shot]["log_loss"], tuned
