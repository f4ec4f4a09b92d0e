"""What `precision: auto` stands for on the cluster's cards."""

from __future__ import annotations

import ray

from rella.config import ClusterConfig
from rella.dist.session import resources
from rella.stages import Precision


@ray.remote(num_cpus=0, num_gpus=1)
def _has_bfloat16() -> bool:
    """Whether this node's card multiplies in bfloat16 by itself; a V100 only emulates it, slower than float32."""
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def best_precision(config: ClusterConfig) -> Precision:
    """Return bfloat16 where every node's cards have it, else float32; CPUs take float32.

    Raises:
        ClusterError: more workers are asked for than the cluster has.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not resources(config).gpus:
        return "float32"
    nodes = [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("GPU", 0) >= 1]
    there = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    found: list[bool] = ray.get([_has_bfloat16.options(scheduling_strategy=s).remote() for s in there])
    return "bfloat16" if all(found) else "float32"
