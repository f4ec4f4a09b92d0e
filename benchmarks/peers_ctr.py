"""The other side of benchmarks/ctr.py: FuxiCTR's DIN and torch-rechub's DeepFM, as their documentation has them used.

Runs in the peers' environment; of this repository it needs `benchmarks/rounds.py` only.

    python benchmarks/peers_ctr.py prepare npz|parquet EXPORT STORE
    python benchmarks/peers_ctr.py din|deepfm STORE --loader KIND:WORKERS ...

Both models read all fields, the behaviours' items through the target item's embeddings, and the mean of the behaviours'
ratings as one more field; ids are ready-made, so that no vocabulary is built in their preparation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script

from benchmarks.rounds import Finished, Gate, say

HISTORY, LABEL, DATASET = "history", "label", "ml_1m"
RATES = {"lr": 1e-3, "weight_decay": 0.0}
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Export:
    """What the parent says of the data."""

    names: list[str]
    """Of the fields; then `rating` where there are ratings."""
    sizes: list[int]
    item_at: int
    k: int

    @staticmethod
    def of(folder: Path) -> Export:
        """Read it."""
        return Export(**json.loads((folder / "peer.json").read_text()))

    @property
    def item(self) -> str:
        """The field whose embeddings behaviours share."""
        return self.names[self.item_at]

    @property
    def rating(self) -> str:
        """The field of the behaviours' ratings."""
        return self.names[-1]


def columns(folder: Path) -> dict[str, Ints]:
    """Return the (N,) fields, (N, K) histories and ratings, oldest first, 0 at padding before them, and labels."""
    found, export = {p.stem: np.load(p) for p in folder.glob("*.npy")}, Export.of(folder)
    place = found["end"][:, None] - export.k + np.arange(export.k)
    there = place >= found["start"][:, None]
    place[~there] = 0
    made: dict[str, Ints] = {name: found["fields"][:, n] for n, name in enumerate(export.names[:-1])}
    made |= {HISTORY: found["item"][place] * there, export.rating: found["rating"][place] * there}
    return made | {LABEL: found["label"]}


def prepare(kind: str, folder: Path, store: Path) -> None:
    """Make a stored form: npz, which is torch-rechub's dict of arrays as well, or Parquet; and FuxiCTR's feature map.

    FuxiCTR pads on the left, and where histories are padded makes no difference to either model.
    """
    store.mkdir(parents=True, exist_ok=True)
    made, file = columns(folder), store / f"train.{kind}"
    if kind == "npz":
        np.savez(file, **made)  # type: ignore[arg-type]
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        shaped = {name: pa.array(list(v)) if v.ndim > 1 else pa.array(v) for name, v in made.items()}
        pq.write_table(pa.table(shaped), file)
    (store / "peer.json").write_bytes((folder / "peer.json").read_bytes())
    feature_map(Export.of(folder), store)
    say({"bytes": file.stat().st_size})


def feature_map(export: Export, store: Path) -> None:
    """Write FuxiCTR's `feature_map.json`; what is of the source `item` is what its DIN attends with."""
    sized = zip(export.names, export.sizes, strict=True)
    shared = {"padding_idx": 0, "source": ""}
    specs: dict[str, dict[str, Any]] = {n: {**shared, "type": "categorical", "vocab_size": s + 1} for n, s in sized}
    specs[export.item]["source"] = "item"
    sequence = {"type": "sequence", "max_len": export.k, "feature_encoder": "layers.MaskedAveragePooling()"}
    specs[export.rating] |= sequence
    specs[HISTORY] = {**specs[export.item], **sequence}
    body = {"dataset_id": DATASET, "labels": [LABEL], "features": [{n: spec} for n, spec in specs.items()]}
    (store / "feature_map.json").write_text(json.dumps(body))


@dataclass(frozen=True)
class Gated:
    """A loader that waits between rounds."""

    loader: Any
    gate: Gate
    change: Callable[[Any], Any] = lambda batch: batch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return self.gate.through(map(self.change, self.loader))


def din(options: argparse.Namespace, gate: Gate) -> None:
    """Train FuxiCTR's DIN, of its package's `model_zoo`, by its trainer and one of its loaders."""
    import torch
    from fuxictr.features import FeatureMap
    from fuxictr.pytorch.dataloaders import RankDataLoader
    from fuxictr.pytorch.torch_utils import seed_everything
    from model_zoo.LongCTR.DIN import DIN

    seed_everything(1)
    store, export = options.store, Export.of(options.store)
    maps = []
    for names in (None, export.names):  # The loader's has the history; the model takes it with the item's features.
        one = FeatureMap(DATASET, str(store))
        one.load(str(store / "feature_map.json"), {"use_features": names, "embedding_dim": options.embedding})
        maps.append(one)
    kind, _, workers = options.loader.partition(":")
    if kind == "parquet":
        own_ray(store)
    file = str(store / f"train.{kind}")
    train, _ = RankDataLoader(
        maps[0], "train", file, batch_size=options.batch, shuffle=True, data_format=kind, num_workers=int(workers)
    )
    model = DIN(
        maps[1],
        gpu=0 if options.device == "cuda" else -1,
        dnn_hidden_units=[options.width] * options.layers,
        attention_hidden_units=[options.attention],
        attention_hidden_activations=options.activation,
        din_use_softmax=options.softmax,
        embedding_dim=options.embedding,
        net_dropout=options.dropout,
        learning_rate=RATES["lr"],
        **{"optimizer": "adam", "loss": "binary_crossentropy", "metrics": ["AUC"], "verbose": 0},
        model_root=str(store / "models"),
    )
    model.loss_fn = recorded(model.loss_fn, gate)

    def change(batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Any]:
        rest = dict(batch)
        history, item = rest.pop(HISTORY), rest.pop(export.item)
        return rest, {export.item: torch.cat([history, item[:, None]], dim=1).flatten()}, history > 0

    say({"parameters": count(model), "samples": train.num_samples, "threads": torch.get_num_threads()})
    model.fit(Gated(train, gate, change), epochs=1)


def own_ray(folder: Path) -> None:
    """Start the Ray that the Parquet loader runs on, never joining one that is there."""
    import ray

    ray.init(address="local", include_dashboard=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False


def deepfm(options: argparse.Namespace, gate: Gate) -> None:
    """Train torch-rechub's DeepFM by its trainer; its deep part and its FM part read all fields, as DeepFM has it."""
    import torch
    from torch_rechub.basic.features import SequenceFeature, SparseFeature
    from torch_rechub.models.ranking import DeepFM
    from torch_rechub.trainers import CTRTrainer
    from torch_rechub.utils.data import DataGenerator

    torch.manual_seed(1)
    export, size = Export.of(options.store), {"embed_dim": options.embedding, "padding_idx": 0}
    vocabulary = {name: n + 1 for name, n in zip(export.names, export.sizes, strict=True)}
    fields = [SparseFeature(name, vocabulary[name], **size) for name in export.names[:-1]]
    fields.append(SequenceFeature(HISTORY, vocabulary[export.item], shared_with=export.item, **size))
    fields.append(SequenceFeature(export.rating, vocabulary[export.rating], **size))
    x = dict(np.load(options.store / "train.npz"))
    y = x.pop(LABEL)
    few = {name: values[:1] for name, values in x.items()}
    workers = int(options.loader.partition(":")[2])
    train, *_ = DataGenerator(x, y).generate_dataloader(
        few, y[:1], few, y[:1], batch_size=options.batch, num_workers=workers
    )
    units = {"dims": [options.width] * options.layers, "dropout": options.dropout, "activation": "relu"}
    model = DeepFM(fields, fields, units)
    device = "cuda:0" if options.device == "cuda" else "cpu"
    trainer = CTRTrainer(model, optimizer_params=RATES, n_epoch=1, device=device, model_path=str(options.store))
    trainer.criterion = recorded(trainer.criterion, gate)
    say({"parameters": count(model), "samples": len(y), "threads": torch.get_num_threads()})
    trainer.train_one_epoch(Gated(train, gate))


def recorded(loss: Callable[..., Any], gate: Gate) -> Callable[..., Any]:
    """Return the loss function, which also lets the gate know."""

    def found(*args: Any, **named: Any) -> Any:  # noqa: ANN401
        value = loss(*args, **named)
        gate.losses.append(value.detach())
        return value

    return found


def count(model: Any) -> int:  # noqa: ANN401
    """Return how many parameters a model has."""
    return sum(p.numel() for p in model.parameters())


def main(words: Iterable[str] | None = None) -> None:
    """Prepare or train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("prepare")
    make.add_argument("kind", choices=("npz", "parquet"))
    make.add_argument("export", type=Path)
    make.add_argument("store", type=Path)
    for name in ("din", "deepfm"):
        train = commands.add_parser(name)
        train.add_argument("store", type=Path)
        train.add_argument("--loader", required=True)
        train.add_argument("--device", choices=("cpu", "cuda"), required=True)
        for option in ("batch", "embedding", "width", "layers", "attention", "warm-up", "steps"):
            train.add_argument(f"--{option}", type=int, required=True)
        train.add_argument("--dropout", type=float, required=True)
        train.add_argument("--activation", choices=("Dice", "ReLU"), default="Dice")
        train.add_argument("--softmax", action="store_true")
    options = parser.parse_args(None if words is None else list(words))
    if options.command == "prepare":
        prepare(options.kind, options.export, options.store)
        return
    gate = Gate(options.warm_up, options.steps)
    try:
        (din if options.command == "din" else deepfm)(options, gate)
    except Finished:
        return
    sys.exit("the data's end came before that of the rounds")


if __name__ == "__main__":
    main()
