"""Tuning runs in groups of one, two and four processes, made once for all tests that look at them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("training_script.py")
ROOT = Path(__file__).resolve().parents[2]

SETTINGS = ROOT / "cluster/deepspeed"
"""DeepSpeed's settings that ship; those for float16 do not run on a CPU."""

FIRST: dict[str, dict[str, Any]] = {
    "plain": {"plain": True, "rows": 37, "epochs": 4},
    "plain, two rows": {"plain": True, "rows": 2, "epochs": 3},
    "one by one": {"one_by_one": True},
    "untrained": {"learning_rate": 0.0, "max_epochs": 1},
    "1 x 16": {},
    "1 x 8 accumulated": {"micro_batch_rows": 2},
    "uneven": {"micro_batch_rows": 5, "zero_stage": 1},
    "as they come": {"micro_batch_rows": 4, "bucketing": False},
    "stage 1": {"micro_batch_rows": 4, "zero_stage": 1},
    "stage 3": {"micro_batch_rows": 4, "zero_stage": 3},
    "recomputed": {"micro_batch_rows": 4, "gradient_checkpointing": "full"},
    "by tokens": {"micro_batch_tokens": 150},
    "packed": {"micro_batch_tokens": 150, "packing": True},
    "with zero2.json": {"micro_batch_rows": 4, "max_epochs": 4, "deepspeed": str(SETTINGS / "zero2.json")},
    "scripted": {"aucs": [0.5, 0.9, 0.9, 0.6]},
    "last is best": {"aucs": [0.1, 0.2, 0.3, 0.4]},
    "stopped": {"stop_after": 2, "aucs": [0.5, 0.9]},
    "impatient": {"patience": 1, "aucs": [0.5, 0.9, 0.9]},
    "often": {"valid_per_epoch": 3, "max_epochs": 1, "aucs": [0.5, 0.9, 0.6]},
    "two rows": {"rows": 2, "max_epochs": 3, "micro_batch_rows": 4},
    "another seed": {"seed": 1, "max_epochs": 1},
    "dropout": {"lora_dropout": 0.3},
    "dropout again": {"lora_dropout": 0.3},
    "dropout, killed": {"lora_dropout": 0.3, "at": "dropout", "die_at": 8, "checkpoint_seconds": 0.0},
    "dropout, resumed": {"lora_dropout": 0.3, "at": "dropout"},
    "patience, killed": {"patience": 2, "at": "patience", "aucs": [0.9, 0.5], "die_at": 8, "checkpoint_seconds": 0.0},
    "patience, resumed": {"patience": 2, "at": "patience", "aucs": [0.4, 0.3]},
    "half, whole": {"precision": "bfloat16", "micro_batch_rows": 4},
    "half, killed": {
        "precision": "bfloat16",
        "micro_batch_rows": 4,
        "at": "half",
        "die_at": 5,
        "checkpoint_seconds": 0.0,
    },
    "half, resumed": {"precision": "bfloat16", "micro_batch_rows": 4, "at": "half"},
    "1 to 2, killed": {"at": "1to2", "die_at": 5, "checkpoint_seconds": 0.0},
}
SECOND: dict[str, dict[str, Any]] = {
    "2 x 4 accumulated": {"micro_batch_rows": 2},
    "2, stage 1": {"micro_batch_rows": 4, "zero_stage": 1},
    "2, stage 3": {"micro_batch_rows": 4, "zero_stage": 3},
    "2, as they come": {"micro_batch_rows": 3, "bucketing": False},
    "2, packed": {"micro_batch_tokens": 200, "packing": True},
    "2, dropout": {"lora_dropout": 0.3},
    "2, dropout again": {"lora_dropout": 0.3},
    "1 to 2": {"at": "1to2", "micro_batch_rows": 4},
    "2 to 1, killed": {"at": "2to1", "die_at": 7, "checkpoint_seconds": 0.0},
    "2 to 4, killed": {"at": "2to4", "die_at": 10, "checkpoint_seconds": 0.0, "zero_stage": 1},
    "stage 3, killed": {"at": "stage3", "die_at": 5, "checkpoint_seconds": 0.0, "zero_stage": 3},
    "stage 3, resumed": {"at": "stage3", "zero_stage": 3, "checkpoint_seconds": 0.0, "die_at": 9},
}
THIRD: dict[str, dict[str, Any]] = {
    "2 to 1": {"at": "2to1"},
    "stage 3 to stage 1": {"at": "stage3", "zero_stage": 1},
}
SLOW: dict[str, dict[str, Any]] = {
    "every other layer recomputed": {"micro_batch_rows": 4, "gradient_checkpointing": 2},
    "packed, as they come": {"micro_batch_tokens": 150, "packing": True, "bucketing": False},
    "packed, recomputed, stage 3": {
        "micro_batch_rows": 3,
        "packing": True,
        "gradient_checkpointing": "full",
        "zero_stage": 3,
    },
    **{
        f"with {name}.json": {
            "micro_batch_rows": 4,
            "max_epochs": 4,
            "zero_stage": int(name[4]),
            "deepspeed": str(SETTINGS / f"{name}.json"),
        }
        for name in ("zero1", "zero3", "zero3-offload")
    },
}
"""In the slow tier."""
FOURTH: dict[str, dict[str, Any]] = {
    "2 to 4": {"at": "2to4", "micro_batch_rows": 2},
    "4 x 2 accumulated": {"micro_batch_rows": 2},
}


def launch(model: Path, folder: Path, workers: int, plan: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Run a plan in a group of `workers` processes; return the first one's answers."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    out, meeting = folder / f"answers-{workers}-{len(plan)}.json", folder / f"meeting-{workers}-{len(plan)}"
    arguments = [str(model), str(folder / "storage"), str(meeting)]
    group = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments, str(rank), str(workers), json.dumps(plan), str(out)],
            cwd=folder,
            env=environment | {"LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=(folder / f"err-{workers}-{rank}").open("w"),
        )
        for rank in range(workers)
    ]
    try:
        codes = [process.wait(timeout=280) for process in group]
    finally:
        for process in group:
            process.kill()
    errors = "\n".join((folder / f"err-{workers}-{rank}").read_text()[-3000:] for rank in range(workers))
    assert codes == [0] * workers, errors
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.fixture(scope="session")
def runs(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Name of a run → what it gave."""
    folder = tmp_path_factory.mktemp("curves")
    found: dict[str, Any] = {}
    for workers, plan in ((1, FIRST), (2, SECOND), (1, THIRD), (4, FOURTH)):
        found |= launch(model_folder, folder, workers, plan)
    return found


@pytest.fixture(scope="session")
def more_runs(runs: dict[str, Any], model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Those of `runs`, and those of the slow tier."""
    return runs | launch(model_folder, tmp_path_factory.mktemp("slow"), 1, SLOW)
