"""The embedding stage (§3.2): item sentences on a pool of actors that hold the model once; then PCA."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from rella.artifacts import Artifact, Layout, Part
from rella.config import Experiment
from rella.dist.remote_progress import ProgressHandle, RemoteProgress
from rella.dist.session import Resources
from rella.dist.shards import Shard, cut, run_shards
from rella.dist.split import how_to_load, run_split
from rella.models import ModelIdentity
from rella.prompts import item_text, shown_fields
from rella.schemas import POOLED, check
from rella.wording import Wording

PROJECTION = "projection.npz"

VECTORS = Layout(encodings={"item": "DELTA_BINARY_PACKED", "vector.list.element": "BYTE_STREAM_SPLIT"})
"""Without dictionaries, which no two floats share: half the time to write, a tenth less to keep."""


class EmbedWorker:
    """Holds the model and the items' sentences; makes one part a shard."""

    def __init__(
        self,
        artifact: Artifact,
        data: Artifact,
        experiment: Experiment,
        model: ModelIdentity,
        wording: Wording,
        cpus: int,
        progress: ProgressHandle,
        split: bool = False,
    ) -> None:
        import torch

        from rella.lm.loading import best_device, load_tokenizer
        from rella.lm.passes import TokenBudget
        from rella.lm.reading import Reader

        torch.set_num_threads(cpus)
        load, matched = how_to_load(split)
        self.artifact, self.experiment, self.progress = artifact, experiment, progress
        tokens = experiment.embed.batch_tokens
        self.budget = TokenBudget(tokens, "embed", "--embed.batch-tokens", progress.say, matched)
        self.device = threading.Lock()
        self.tokenizer = load_tokenizer(model)
        reader = Reader(self.tokenizer, model, experiment.prompt, wording)
        rows = data.read("items").to_pylist()
        self.texts = [item_text(wording, shown_fields(row, reader.display)) for row in rows]
        if experiment.embed.wrapped:
            self.texts = [reader.wrapper.wrap(text) for text in self.texts]
        self.generated = experiment.embed.pooling == "generated"
        self.base = load(model, experiment.precision, best_device(), self.generated, experiment.quantize)

    def run(self, shard: Shard) -> Part:
        """Embed the items of a shard and write their part, the latter while another thread embeds the next."""
        with self.device:
            vectors = self.compute(shard)
        return self.write(shard, [(shard, vectors)])

    def compute(self, shard: Shard, repeated: int = 0) -> npt.NDArray[np.float32]:
        """Return the vectors of a shard's items, whoever else computes the first `repeated`."""
        from rella.lm.embedding import embed_texts
        from rella.lm.generated import embed_generated

        texts, report = self.texts[shard.start : shard.stop], self.progress.report
        if self.generated:
            return embed_generated(self.base, self.tokenizer, texts, self.budget, report)
        return embed_texts(self.base, self.tokenizer, texts, self.experiment.embed.pool_bos, self.budget, report)

    def write(self, shard: Shard, found: Sequence[tuple[Shard, npt.NDArray[np.float32]]]) -> Part:
        """Write the part of a shard from its pieces."""
        vectors = np.empty((shard.stop - shard.start, found[0][1].shape[1]), np.float32)
        for piece, values in found:
            vectors[piece.start - shard.start : piece.stop - shard.start] = values
        table = vector_table(np.arange(shard.start, shard.stop, dtype=np.int32), vectors)
        return self.artifact.write_part(table, shard.shard, shard.shards, layout=VECTORS)


def vector_table(item: npt.NDArray[np.int32], vectors: npt.NDArray[np.float32]) -> pa.Table:
    """Return a table of `schemas.POOLED` from (n,) items and (n, D) vectors."""
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    table = pa.table([pa.array(item), column], names=POOLED.names)
    check(table, POOLED, "vectors")
    return table


def vectors_of(table: pa.Table) -> npt.NDArray[np.float32]:
    """Return the (n, D) float32 vectors of a vector table in the order of its items."""
    item = table.column("item").to_numpy()
    flat = table.column("vector").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    if not len(table):
        return flat.reshape(0, 0)
    vectors: npt.NDArray[np.float32] = flat.reshape(len(table), -1)
    return vectors if (np.diff(item) > 0).all() else vectors[np.argsort(item, kind="stable")]


def embed(
    artifact: Artifact,
    data: Artifact,
    experiment: Experiment,
    model: ModelIdentity,
    wording: Wording,
    items: int,
    resources: Resources,
) -> list[Part]:
    """Embed every item of the data set exactly once; return the parts."""
    shards = cut(0, items, experiment.embed.shard_items)
    with RemoteProgress("embed", items, "items") as progress:
        setup = {
            "artifact": artifact,
            "data": data,
            "experiment": experiment,
            "model": model,
            "wording": wording,
            "cpus": resources.cpus,
            "progress": progress.handle,
        }
        kept = lambda shard: progress.handle.kept(shard.stop - shard.start)  # noqa: E731
        if experiment.cluster.base_workers > 1:
            return run_split(EmbedWorker, setup, [artifact], shards, experiment, resources, kept)[0]
        return run_shards(EmbedWorker, setup, [artifact], shards, resources, kept, threads=2)[0]


@ray.remote(num_cpus=1)
def _project(artifact: Artifact, pooled: Artifact, dimensions: int | None) -> list[Part]:
    from rella.pca import fit

    vectors = vectors_of(pooled.read())
    if dimensions is None:
        facts = {"dimensions": vectors.shape[1]}
        return [artifact.write_part(vector_table(np.arange(len(vectors), dtype=np.int32), vectors), 0, 1, facts=facts)]
    projection = fit(vectors, dimensions)
    table = vector_table(np.arange(len(vectors), dtype=np.int32), projection.apply(vectors))
    file = io.BytesIO()
    np.savez(file, mean=projection.mean, components=projection.components, explained=projection.explained)
    facts = {"dimensions": len(projection.components), "explained": round(float(projection.explained.sum()), 6)}
    return [artifact.write_part(table, 0, 1, facts=facts), artifact.write_file(PROJECTION, file.getvalue())]


def project(artifact: Artifact, pooled: Artifact, dimensions: int | None) -> list[Part]:
    """Reduce the pooled vectors by PCA on one node; mean and components are stored beside the vectors.

    Without a number of dimensions the pooled vectors are taken as they are.
    """
    parts: list[Part] = ray.get(_project.remote(artifact, pooled, dimensions))
    return parts
