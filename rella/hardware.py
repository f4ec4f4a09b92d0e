"""What a cluster is made of, for plans: cards by name with memory and published rates, or a YAML file of your own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from rella.errors import InputError, MissingError

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """One accelerator, or one CPU worker."""

    name: str
    memory_gib: float
    """What a program can have of it, in GiB: a little under what its name says."""
    tflops: float
    """Dense matrix products in 16 bit (float32 on a CPU), as published, in 10^12 operations per second."""
    bf16: bool = True
    """Whether it computes in bfloat16."""
    gpu: bool = True


CARDS = {
    card.name: card
    for card in (
        Card("t4", 14.6, 65.0, bf16=False),
        Card("v100-16gb", 15.8, 125.0, bf16=False),
        Card("v100-32gb", 31.7, 125.0, bf16=False),
        Card("a10g", 22.0, 70.0),
        Card("l4", 22.0, 121.0),
        Card("l40s", 44.4, 362.0),
        Card("rtx-4090", 23.5, 165.0),
        Card("a100-40gb", 39.4, 312.0),
        Card("a100-80gb", 79.2, 312.0),
        Card("h100", 79.1, 989.0),
        Card("h200", 139.8, 989.0),
        Card("cpu", 8.0, 0.08, gpu=False),
    )
}
"""Published rates are those of NVIDIA's data sheets (SXM versions where there are two); `cpu` stands for one core."""


@dataclass(frozen=True)
class ClusterPlan:
    """Equal nodes with equal cards; keys of a YAML file for `--plan`."""

    card: str = "v100-32gb"
    """A name of `CARDS`, or your own together with `memory_gib` and `tflops`."""
    gpus: int = 1
    """Cards of one node; for `cpu` workers of one core."""
    nodes: int = 1
    cpus: int = 8
    """Cores of one node, for retrieval."""
    memory_gib: float | None = None
    """Of one card, instead of what is known of it."""
    tflops: float | None = None
    """Dense 16-bit rate of one card, instead of what is published: measured by benchmarks/gpu.py, for instance."""
    bf16: bool | None = None
    """Whether the card computes in bfloat16, instead of what is known of it."""

    @property
    def workers(self) -> int:
        """One per card."""
        return self.gpus * self.nodes

    @property
    def each(self) -> Card:
        """The card, with what was said of it."""
        known = CARDS.get(self.card)
        if known is None:
            if self.memory_gib is None or self.tflops is None:
                raise InputError(
                    f"--plan: card {self.card!r} is not known ({', '.join(CARDS)}): give memory_gib and tflops with it"
                )
            known = Card(self.card, self.memory_gib, self.tflops)
        return Card(
            known.name,
            known.memory_gib if self.memory_gib is None else self.memory_gib,
            known.tflops if self.tflops is None else self.tflops,
            known.bf16 if self.bf16 is None else self.bf16,
            known.gpu,
        )

    def __str__(self) -> str:
        nodes = f"{self.nodes} nodes of " if self.nodes > 1 else ""
        return f"{nodes}{self.gpus} × {self.card} ({self.each.memory_gib:g} GiB, {self.each.tflops:g} TFLOP/s)"


_KEYS = ("card", "gpus", "nodes", "cpus", "memory_gib", "tflops", "bf16")
_WORDS = re.compile(r"(?:(?P<nodes>\d+)\s*x\s*)?(?P<gpus>\d+)\s*x\s*(?P<card>[\w-]+)", re.IGNORECASE)


def read_cluster(described: str) -> ClusterPlan:
    """Return what `--plan` describes: `8xv100-32gb`, `2x8xa100-80gb` (nodes × cards), or a YAML file's name.

    Raises:
        MissingError: there is no such file.
        InputError: an unknown card, key or value; names it and what there is.
    """
    if described.endswith((".yaml", ".yml")):
        return _checked(_read_file(described), described)
    found = _WORDS.fullmatch(described.strip())
    if found is None:
        raise InputError(
            f"--plan {described!r}: say how many of which card, such as 8xv100-32gb or 2x8xa100-80gb (nodes × cards), "
            f"or give a YAML file; known cards: {', '.join(CARDS)}"
        )
    return _checked(ClusterPlan(found["card"].lower(), int(found["gpus"]), int(found["nodes"] or 1)), described)


def _read_file(path: str) -> ClusterPlan:
    import yaml
    from jsonargparse import ArgumentParser

    file = Path(path).expanduser()
    if not file.is_file():
        raise MissingError(f"--plan {path}: there is no such file")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ClusterPlan, nested_key=None)
    try:
        init = parser.instantiate(parser.parse_object(yaml.safe_load(file.read_text(encoding="utf-8")) or {}))
    except Exception as error:
        said = " ".join(line.strip() for line in str(error).splitlines()[:3])
        raise InputError(f"--plan {path}: {said}") from error
    return ClusterPlan(**{name: init[name] for name in _KEYS})


def _checked(cluster: ClusterPlan, described: str) -> ClusterPlan:
    if min(cluster.gpus, cluster.nodes, cluster.cpus) < 1:
        raise InputError(f"--plan {described}: a cluster has at least one node, card and core")
    if cluster.each.memory_gib <= 0 or cluster.each.tflops <= 0:
        raise InputError(f"--plan {described}: memory_gib and tflops are above 0")
    return cluster
