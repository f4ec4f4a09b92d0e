"""What SIM's semantic search is worth on MovieLens-1M by vectors that know more of taste than any text: who of the
training split rated what; alone, and with half of the K behaviours the most recent ones.

    python benchmarks/sim_vectors.py --raw-dir DIR [--seeds 3] [--quick] [--json FILE]

Table 2 gives SIM 0.0030 of AUC over DIN. Its vectors are Vicuna's, which a machine without a GPU has not; these are
an SVD of the training split's users × items, in two ways: who rated an item, and how far above their own mean. If no
search gains over recent behaviours with them, better vectors are not what brings the gain. All sides: the network, the
defaults of `rella.baselines`, the split and the step's choice on the validation split of `jobs/baseline.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_matrix
from sklearn.utils.extmath import randomized_svd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from benchmarks import ctr_data
from benchmarks.ctr_data import Prepared
from rella.baselines import BaselineConfig
from rella.ctr.batches import batches_of
from rella.ctr.fit import Fitter, predict
from rella.ctr.models import build
from rella.data.questions import Neighbours
from rella.data.tables import column
from rella.metrics import evaluate
from rella.retrieval.engines import top_k

K, DIMENSIONS = 30, 64
CPU = torch.device("cpu")
SIM = BaselineConfig(model="sim", search="semantic")
SIDES = {
    "DIN, recent": 0,
    "SIM, who rated it": K,
    "SIM, who liked it": K,
    "SIM, half recent, half who liked it": K // 2,
}
"""How many of the K behaviours are retrieved; the others are the most recent ones."""


def item_vectors(prepared: Prepared, liking: bool) -> npt.NDArray[np.float32]:
    """Return (items, DIMENSIONS) vectors from the training samples: of who rated an item, or of who liked it.

    Users are weighed down by their number of ratings. Items that nobody rated in training get small noise.
    """
    train, tables = prepared.samples("train"), prepared.tables
    shape = (len(tables.users), len(tables.items))
    value = np.ones(len(train))
    count = np.bincount(train.user, minlength=shape[0])
    if liking:
        mean = np.bincount(train.user, weights=train.label, minlength=shape[0]) / np.maximum(count, 1)
        value = train.label - mean[train.user]
    value = value / np.sqrt(count[train.user])
    by_item = csr_matrix((value, (train.item, train.user)), shape=shape[::-1])
    left, sizes, _ = randomized_svd(by_item, DIMENSIONS, random_state=0)
    vectors: npt.NDArray[np.float32] = (left * sizes).astype(np.float32)
    noise = np.random.default_rng(0).normal(0, 1e-6, vectors.shape)
    return np.where(vectors.any(axis=1, keepdims=True), vectors, noise).astype(np.float32)


def neighbours(prepared: Prepared, vectors: npt.NDArray[np.float32], retrieved: int) -> Neighbours:
    """Return K behaviours of every sample: the `retrieved` most similar (SUBR, §3.2), then the most recent ones."""
    samples = prepared.tables.samples
    user, item, end = (column(samples, name) for name in ("user", "item", "end"))
    cores = len(os.sched_getaffinity(0))
    offsets, positions = top_k(vectors, prepared.tables.histories(), user, item, end, K, threads=cores)
    if retrieved < K:
        fill_up(offsets, positions, end, retrieved)
    return Neighbours(column(samples, "sample_id"), offsets, positions)


@numba.njit
def fill_up(
    offsets: npt.NDArray[np.int64], positions: npt.NDArray[np.int32], end: npt.NDArray[np.int32], retrieved: int
) -> None:  # pragma: no cover - compiled
    """Put the most recent behaviours in place of all but the first `retrieved`, each once."""
    for s in range(end.size):
        mine = positions[offsets[s] : offsets[s + 1]]
        recent = end[s]
        for place in range(retrieved, mine.size):
            recent -= 1
            while np.any(mine[:retrieved] == recent):
                recent -= 1
            mine[place] = recent


def fitted(prepared: Prepared, config: BaselineConfig, found: Neighbours | None, seed: int) -> dict[str, float]:
    """Fit one model; return its metrics on the test split at the best step on validation, and the seconds."""
    started, histories = time.monotonic(), prepared.tables.histories()
    train, valid, test = (
        batches_of(config, prepared.features, histories, prepared.samples(split), K, found)
        for split in ("train", "valid", "test")
    )
    model = build(config, prepared.features, K, seed)
    Fitter(model, train, valid, config, seed, CPU, lambda _: None).run()
    probability, _ = predict(model, test, CPU)
    metrics = evaluate(test.samples.label, probability)
    return {"auc": metrics.auc, "log_loss": metrics.log_loss, "seconds": time.monotonic() - started}


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--raw-dir", type=Path, help="MovieLens-1M's original files; with --quick made-up ones")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="under a minute: few made-up users, one seed")
    parser.add_argument("--json", type=Path, help="write the figures there, flat")
    options = parser.parse_args()
    if options.raw_dir is None and not options.quick:
        parser.error("--raw-dir: MovieLens-1M's original files, or --quick")
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        raw_dir, store = options.raw_dir or Path(name) / "raw", Path(name) / "store"
        if options.raw_dir is None:
            ctr_data.write_raw(raw_dir, 300)
        ctr_data.prepare(raw_dir, store)
        prepared = ctr_data.read(store)
        for side, retrieved in SIDES.items():
            config, found = SIM if retrieved else replace(SIM, model="din"), None
            if retrieved:
                found = neighbours(prepared, item_vectors(prepared, side.endswith("liked it")), retrieved)
            runs = [fitted(prepared, config, found, seed) for seed in range(1 if options.quick else options.seeds)]
            figures |= said(side, runs)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def said(side: str, runs: list[dict[str, float]]) -> dict[str, float]:
    """Print and return one side's figures: mean and standard deviation over the seeds."""
    name = side.lower().replace(",", "").replace(" ", "_")
    figures = {f"{name}_{what}": float(np.mean([run[what] for run in runs])) for what in runs[0]}
    if len(runs) > 1:
        figures[f"{name}_auc_std"] = float(np.std([run["auc"] for run in runs], ddof=1))
    spread = f" ±{figures[f'{name}_auc_std']:.4f}" if len(runs) > 1 else ""
    print(f"{side:<35} AUC {figures[f'{name}_auc']:.4f}{spread}  log loss {figures[f'{name}_log_loss']:.4f}  "
          f"{figures[f'{name}_seconds']:.0f} s a run", flush=True)  # fmt: skip
    return figures


if __name__ == "__main__":
    main()
