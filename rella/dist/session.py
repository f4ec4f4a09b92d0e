"""The connection to Ray: what the cluster has, what workers inherit, and what went wrong there."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import traceback
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from rella.config import ClusterConfig
from rella.digests import cache_folder
from rella.dist.remote_progress import RemoteProgress
from rella.errors import ClusterError, RellaError
from rella.storage import SUBMITTED_JOB, Storage

MAX_AUTO_CPU_WORKERS = 8


@dataclass(frozen=True)
class Resources:
    """What one worker asks for, and how many there are."""

    workers: int
    cpus: int
    gpus: int
    most: int = 0
    """Workers that training takes in when they come; 0 where their number is fixed."""

    def per_worker(self) -> dict[str, float]:
        """Return Ray's resource request of one worker."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


def resources(config: ClusterConfig, at_most: int | None = None) -> Resources:
    """Return how many workers a stage gets on the connected cluster.

    Raises:
        ClusterError: more is asked for than the cluster has; says what is missing.
    """
    have = ray.cluster_resources()
    gpus, cpus = int(have.get("GPU", 0)), int(have.get("CPU", 0))
    use_gpu = gpus > 0 if config.gpu == "auto" else config.gpu
    if config.workers == "auto":
        workers = gpus if use_gpu else min(MAX_AUTO_CPU_WORKERS, max(1, cpus // config.cpus_per_worker))
    else:
        workers = config.workers
    room = cpus // config.cpus_per_worker
    room = min(gpus, room) if use_gpu else room
    most = 0
    if config.min_workers is not None:
        # What is not there yet may come.
        most, workers = workers, max(config.min_workers, min(workers, room))
        if config.min_workers > most:
            raise ClusterError(f"cluster.min_workers {config.min_workers} is more than cluster.workers {most}")
    missing = []
    if use_gpu and workers > gpus:
        missing.append(f"{workers} GPUs where the cluster has {gpus}")
    if workers * config.cpus_per_worker > cpus:
        missing.append(f"{workers * config.cpus_per_worker} CPUs where the cluster has {cpus}")
    if workers < 1 or missing:
        flag = "workers" if config.min_workers is None else "min_workers"
        raise ClusterError(
            f"cluster.{flag} {getattr(config, flag)}: needs {' and '.join(missing) or 'at least one'}; "
            f"lower --cluster.{flag.replace('_', '-')} or --cluster.cpus-per-worker, or add nodes"
        )
    return Resources(min(workers, at_most or workers), config.cpus_per_worker, 1 if use_gpu else 0, most)


def worker_environment(gpu: bool | str) -> dict[str, str]:
    """Return the environment variables of every worker process."""
    environment = {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "DS_LOG_LEVEL": "error",
        "PYTHONWARNINGS": "ignore",
        # Compiled kernels outlive a submitted job's working directory.
        "NUMBA_CACHE_DIR": os.environ.get("NUMBA_CACHE_DIR", str(cache_folder() / "numba")),
    }
    # Arrow's own allocator gives memory back and takes it again at every turn: twice the time to read a large table.
    environment["ARROW_DEFAULT_MEMORY_POOL"] = os.environ.get("ARROW_DEFAULT_MEMORY_POOL", "system")
    for name in ("HF_TOKEN", "HF_HOME", "HF_HUB_OFFLINE", "TORCH_EXTENSIONS_DIR"):
        if name in os.environ:
            environment[name] = os.environ[name]
    if gpu is False:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables for what is started inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def quiet_driver() -> None:
    """Keep the libraries' own bars and notices out of the driver's output; errors still show."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    for name in ("ray.data", "ray.train", "ray.tune", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"ray(\.|$)")


@contextmanager
def session(config: ClusterConfig) -> Iterator[None]:
    """Connect to the cluster in `RAY_ADDRESS` or of a submitted job; else start one on this machine, and stop it.

    A local one serves nothing but 127.0.0.1. Inside a session already there nothing happens.
    """
    if ray.is_initialized():
        quiet_driver()
        yield
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "CRITICAL")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    joins = bool(os.environ.get("RAY_ADDRESS")) or SUBMITTED_JOB in os.environ
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    environment = worker_environment(config.gpu)
    quiet_driver()
    if joins:
        try:
            ray.init(**options, runtime_env={"env_vars": environment})
        except ConnectionError as error:
            where = os.environ.get("RAY_ADDRESS", "the cluster of this job")
            raise ClusterError(
                f"no connection to Ray at {where}: `ray status --address {where}` says whether it runs; a cluster that "
                f"`ray start` of 2.60 or later began asks for its token (export RAY_AUTH_MODE=token, and on another "
                f"machine RAY_AUTH_TOKEN_PATH); unset RAY_ADDRESS to start one here ({error})"
            ) from error
    else:
        # What Ray starts first has this environment. Workers of a `runtime_env` would be started anew, by an
        # interpreter of their own.
        with _environment({"RAY_USAGE_STATS_ENABLED": "0"} | environment):
            ray.init(**options, include_dashboard=False, address="local")
    _quiet_data()
    try:
        yield
    finally:
        RemoteProgress.forget()
        ray.shutdown()


_ACTOR_NOTICE = re.compile(rb"\[[^\]\n]* E [^\]\n]*\] core_worker\.cc:\d+: Actor with class name:[^\n]*\n")


@contextmanager
def without_actor_notice() -> Iterator[None]:
    """Keep one message of Ray's C++ side off the terminal while Ray Data runs; all else on standard error passes.

    Ray warns of every restartable actor with arguments in the object store. Ray Data 2.60's actors are all of that
    kind, and it keeps those arguments alive itself.
    """
    sys.stderr.flush()
    terminal, (reader, writer) = os.dup(2), os.pipe()
    os.dup2(writer, 2)
    os.close(writer)

    def pass_on() -> None:
        # The notice comes in one write of less than a pipe's atomic size, so never cut in two.
        while chunk := os.read(reader, 65536):
            os.write(terminal, _ACTOR_NOTICE.sub(b"", chunk))

    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)
        thread.join(timeout=1)
        if not thread.is_alive():  # A child process may hold the pipe open for longer.
            os.close(reader)
            os.close(terminal)


def root_cause(error: BaseException) -> BaseException:
    """Return the error that a worker raised, from under what Ray wrapped around it.

    What one of our own errors was raised from stays below it: the message that the user can act on is on top.
    """
    if not type(error).__module__.startswith("ray."):
        return error
    failures = getattr(error, "worker_failures", None)
    below = next(iter(failures.values()), None) if failures else getattr(error, "cause", None) or error.__cause__
    return root_cause(below) if isinstance(below, BaseException) else error


_MEMORY = (
    "lower --cluster.workers, --score.batch-tokens, --embed.batch-tokens, --tune.micro-batch-rows or "
    "--textctr.micro-batch-tokens"
)

_LOST = {
    "OutOfMemoryError": f"a worker ran out of memory (the node's or the card's): {_MEMORY}, or use larger nodes",
    "NodeDiedError": "a node of the cluster died: start the same command again, which goes on where it was",
    "ActorDiedError": "a worker died again and again: look at its node's memory and logs, then start the same command "
    "again, which goes on where it was",
    "ObjectLostError": "what a node held in memory was lost with it: start the same command again, which goes on where "
    "it was",
    "RaySystemError": "the connection to Ray was lost: start the same command again, which goes on where it was",
}


def explained(error: BaseException) -> BaseException:
    """Return what went wrong as one of our own errors where it is known, else the root cause itself."""
    cause = root_cause(error)
    if isinstance(cause, RellaError):
        return cause
    kinds = [k.__name__ for k in type(cause).__mro__ if k.__module__.startswith(("ray.", "torch"))]
    lost = next((_LOST[k] for k in kinds if k in _LOST), None)
    if lost is None:
        return cause
    return ClusterError(f"{lost} ({type(cause).__name__}: {(str(cause).splitlines() or [''])[0][:200]})")


def failure(error: Exception) -> dict[str, Any]:
    """Return a worker's error as the arguments of `WorkerError`, fit for JSON."""
    known = explained(error)
    ours = isinstance(known, RellaError)
    message = str(known) if ours else f"{type(known).__name__}: {known}"
    return {"message": message, "trace": traceback.format_exc(), "ours": ours}


def _quiet_data() -> None:
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


@ray.remote(num_cpus=0)
def _sees(storage: Storage, path: str) -> bool:
    return storage.exists(path)


def check_shared(storage: Storage) -> None:
    """Verify that every node of the cluster sees the storage: written here, read there.

    Raises:
        ClusterError: names the node that does not.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [n for n in ray.nodes() if n["Alive"]]
    if len(nodes) < 2 or not storage.is_local:
        return
    probe = f".probe-{uuid.uuid4().hex}"
    storage.write(probe, b"")
    try:
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            if not ray.get(_sees.options(scheduling_strategy=there).remote(storage, probe)):
                raise ClusterError(
                    f"storage {storage.shown()} is not shared: node {node['NodeManagerAddress']} does not see what "
                    "this one wrote; give a folder on a network mount or a URI such as s3://bucket/rella with --storage"
                )
    finally:
        storage.delete(probe)
