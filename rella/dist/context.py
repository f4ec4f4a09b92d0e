"""What a job's stages share: experiment, storage, data source, base model, and data in the object store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from rella.artifacts import Artifact, Json, Part
from rella.baseline_pipeline import BaselinePipeline
from rella.config import Experiment
from rella.data.sources import Source
from rella.models import ModelIdentity, identify
from rella.pipeline import Pipeline, Stage
from rella.storage import Storage, resolve_uri

if TYPE_CHECKING:
    from rella.dist.dataset import Shared

AnyPipeline = Pipeline | BaselinePipeline

Outcome = tuple[list[Part], Mapping[str, Json]]
"""A stage's parts and facts."""


@dataclass(frozen=True)
class Job:
    """A stage to make, and for whom."""

    stage: Stage
    artifact: Artifact
    experiment: Experiment
    found_in: AnyPipeline | None = None
    """None for the first stage, which needs no other."""

    @property
    def pipeline(self) -> AnyPipeline:
        """The pipeline whose artifacts are the stage's inputs."""
        if self.found_in is None:
            raise RuntimeError(f"stage {self.stage.name} has inputs and was asked for without them")
        return self.found_in


@dataclass
class Context:
    """One job's. Ray is not touched before a stage that needs it asks for data."""

    experiment: Experiment
    say: Callable[[str], None] = print
    storage: Storage = field(init=False)
    source: Source = field(init=False)
    raw: Mapping[str, str] = field(init=False)
    _shared: dict[tuple[str, str | None], Shared] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.storage = Storage(resolve_uri(self.experiment.storage))
        self.source = Source.of(self.experiment)
        self.raw = self.source.identity()

    @cached_property
    def model(self) -> ModelIdentity:
        """The base model, resolved when a stage first needs it."""
        return identify(self.experiment.model, self.experiment.revision)

    @cached_property
    def text_base(self) -> ModelIdentity:
        """The pretrained BERT or T5 of an LM-based baseline, resolved when a stage first needs it."""
        return identify(self.experiment.textctr.base, self.experiment.textctr.revision, "--textctr.base")

    def share(self, pipeline: AnyPipeline, retrieved: bool) -> Shared:
        """Return references to the pipeline's data (and neighbours) in the object store, loaded once a session."""
        from rella.dist.dataset import Shared

        found = pipeline.retrieve if retrieved else None
        name = (pipeline.prepare.key, None if found is None else found.key)
        if name not in self._shared:
            neighbours = None if found is None else found.artifact(self.storage)
            self._shared[name] = Shared.load(pipeline.prepare.artifact(self.storage), neighbours)
        return self._shared[name]
