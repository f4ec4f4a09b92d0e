"""One worker of a fit on several: `fit_script.py RENDEZVOUS RANK WORLD MODEL OUT STORAGE...`; no test by itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rella.artifacts import Artifact
from rella.baselines import BaselineConfig
from rella.ctr.fit import Fitter, predict
from rella.ctr.models import build
from rella.lm.checkpoints import Checkpoints
from rella.storage import Storage
from tests.ctr.worlds import sample_world

KEY = "cd" * 32


def main(rendezvous: str, rank: int, world: int, model: str, out: str, storages: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    found = [fit(rank, world, model, storage) for storage in storages]
    Path(f"{out}.{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


def fit(rank: int, world: int, model: str, storage: str) -> dict[str, Any]:
    data, config, device = sample_world(), fit_config(model), torch.device("cpu")
    # Other weights on every worker: those of worker 0 count.
    made = build(config, data.features, 6, seed=100 * rank)
    checkpoints = None if storage == "none" else Checkpoints(Artifact(Storage(storage), f"d/ctr/x-{KEY[:12]}", KEY))
    train, valid = data.batches(config, "train", 6), data.batches(config, "valid", 6)
    fitter = Fitter(made, train, valid, config, 3, device, lambda progress: None, rank, world, checkpoints)
    course = fitter.run().course
    _, logits = predict(made, valid, device)
    found = {"losses": course.losses, "valid": course.valid, "best": course.best_step, "rows": course.rows}
    return {**found, "logits": logits.tolist(), "resumed": course.resumed_at}


def fit_config(model: str) -> BaselineConfig:
    return BaselineConfig(
        model=model,  # type: ignore[arg-type]
        search="hard",
        embedding_dim=8,
        dnn_size=16,
        attention_size=8,
        gru_size=8,
        dropout=0.0,
        batch_size=700,
        max_epochs=2,
        valid_per_epoch=2,
        patience=None,
        learning_rate=5e-3,
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5], sys.argv[6:])
