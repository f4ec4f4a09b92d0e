"""A group of workers on Ray Train: started, started again when one dies, and its errors brought to the driver."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rella.artifacts import Artifact
from rella.config import Experiment
from rella.dist.remote_progress import ProgressHandle
from rella.dist.session import Resources, explained, failure
from rella.errors import ClusterError, RellaError, WorkerError

RESIZE_SECONDS = 15.0
"""How often a group that may grow looks for workers that have come."""


def setup_process(cpus: int) -> None:
    """Make DeepSpeed quiet and keep it from compiling on this worker."""
    import logging
    import warnings

    import torch

    torch.set_num_threads(cpus)
    warnings.filterwarnings("ignore")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On CPUs DeepSpeed would compile a shared-memory all-reduce for a minute; gloo moves a few MB of LoRA just as well.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def guarded(progress: ProgressHandle, work: Callable[[], None]) -> None:
    """Do a worker's work; an error that starting again would not mend goes to the driver, and no later group begins."""
    if progress.failure() is not None:
        return  # An earlier group ended with an error that this one would meet again; the driver reports it.
    try:
        work()
    except Exception as error:
        if isinstance(explained(error), RellaError):
            progress.fail(failure(error))
        raise


def launch(
    work: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    artifact: Artifact,
    experiment: Experiment,
    resources: Resources,
) -> None:
    """Run `work(config)` on a group of workers, again after a worker's death; `config["progress"]` hears of errors.

    Args:
        work: what every worker runs.
        config: its argument.
        artifact: the first that is made, whose storage and name the group's own files take.
        experiment: says how often the group may start again.
        resources: of the group.

    Raises:
        RellaError: the work failed; carries the first worker's error.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    # Ray Train's own bookkeeping, on the storage because every node must see it; what counts goes into the artifacts.
    # A name that was used before would make Ray take up that run, and what a killed driver left is of no use.
    storage, prefix = artifact.storage, f".ray/{Path(artifact.path).name}"
    for left in storage.list(".ray"):
        if left.startswith(f"{prefix}-"):
            storage.delete(left)
    name = f"{Path(prefix).name}-{time.time_ns()}"
    fewest = experiment.cluster.min_workers if resources.most else None
    trainer = TorchTrainer(
        work,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=resources.workers if fewest is None else (fewest, resources.most),
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            use_gpu=bool(resources.gpus),
            resources_per_worker=resources.per_worker(),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage.where(".ray"),
            failure_config=FailureConfig(max_failures=experiment.cluster.max_failures),
        ),
    )
    fault: Exception | None = None
    try:
        trainer.fit()
    except Exception as error:
        fault = error
    told = config["progress"].failure()
    if told is not None:
        raise WorkerError(**told) from fault
    if fault is not None:
        raise _given_up(fault, experiment.cluster.max_failures) from fault
    storage.delete(f".ray/{name}")


def _given_up(fault: Exception, failures: int) -> Exception:
    known = explained(fault)
    if isinstance(known, RellaError):
        return ClusterError(f"training was started {failures + 1} times and failed each time: {known}")
    return WorkerError(f"{type(known).__name__}: {known}", ours=False)
