"""The rows of an LM-based baseline, worded by one task or by several."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from rella.artifacts import Artifact
from rella.baselines import TextBaseline
from rella.cli import resolve
from rella.data.samples import assemble
from rella.data.sources import Source
from rella.models import identify
from rella.storage import Storage
from rella.textctr.small import save_bert, save_t5, texts_of


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    from rella.config import ClusterConfig
    from rella.dist.session import session

    assert not ray.is_initialized()
    with session(ClusterConfig()):
        yield


@pytest.mark.ray
@pytest.mark.slow
def test_many_samples_are_worded_by_several_tasks(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows in the same order, whatever the cuts."""
    import ray

    from rella.dist import text_material
    from rella.dist.dataset import Shared
    from rella.dist.text_material import TextTask, text_training_samples

    for name in get_args(TextBaseline):
        e = resolve({"baseline.model": name, "data.sample_users": 60, "k": 4, "shots": 70}).experiment
        e = replace(e, textctr=replace(e.textctr, max_tokens=2000, precision="float32"))
        save = save_t5 if name == "p5" else save_bert
        base = identify(str(save(tmp_path / name, texts_of(e, 50), 1000)))
        source = Source.of(e)
        raw = source.load(e.data)
        tables = assemble(raw, e.data)
        shared = Shared(ray.put(tables))
        artifact = Artifact(Storage(str(tmp_path)), f"sample/textctr/{name}-0123456789ab", "0" * 64)
        task = TextTask(artifact, e, shared, dict(raw.fields), source.wording(e), base, name)
        samples, of = text_training_samples(tables, e)
        assert (len(samples), of) == (70, (np.array(tables.samples["split"].to_pylist()) == "train").sum())
        whole: Any = text_material._worded(task, tables, samples).examples
        lengths = (whole.users if name == "ctr-bert" else whole.texts).lengths
        task = replace(task, experiment=replace(e, textctr=replace(e.textctr, max_tokens=int(lengths.max()) - 3)))
        found: list[Any] = []
        for chunk in (100, 16):
            monkeypatch.setattr(text_material, "CHUNK", chunk)
            found.append(text_material._worded(task, tables, samples))
        one, several = found
        assert several.examples.lengths.tolist() == one.examples.lengths.tolist()
        assert several.examples.labels.tolist() == one.examples.labels.tolist() == samples.label.tolist()
        texts = [m.examples.users if name == "ctr-bert" else m.examples.texts for m in found]
        assert texts[0].digest() == texts[1].digest()
        assert (several.truncated, several.dropped) == (one.truncated, one.dropped)
        assert one.truncated > 0
        if name == "ctr-bert":
            assert several.examples.item.tolist() == samples.item.tolist()
