"""A plan as text: every stage with its memory term by term, its time, and what would fit where it does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rella.hardware import GIB, ClusterPlan
from rella.plan import Change, Term, total


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes."""

    title: str
    what: str
    seconds: float
    how: str
    """Of the time."""
    memory: Sequence[Term] = ()
    """A worker's; empty for stages without a model."""
    changes: Sequence[Change] = ()
    """Settings that would fit, where these do not."""
    notes: Sequence[str] = ()

    @property
    def peak(self) -> int:
        """Bytes of a worker's memory."""
        return total(self.memory)


def plan_lines(plans: Sequence[StagePlan], cluster: ClusterPlan) -> Iterator[str]:
    """Yield the lines of a plan."""
    room = int(cluster.each.memory_gib * GIB)
    told: dict[tuple[Term, ...], str] = {}
    for found in plans:
        yield f"\n{found.title}: {found.what}"
        if found.how:
            yield f"  time    {clock(found.seconds):>9}   {found.how}"
        same = told.setdefault(tuple(found.memory), found.title)
        if same == found.title:
            for term in found.memory:
                yield f"  memory  {gib(term.bytes):>9}   {term.name}: {term.how}"
        if found.memory:
            verdict = "fits" if found.peak <= room else "DOES NOT FIT"
            which = "together" if same == found.title else f"as of {same}"
            yield f"  memory  {gib(found.peak):>9}   {which}, of {gib(room)}: {verdict}"
        for change in found.changes:
            costs = f" ({change.costs})" if change.costs else ""
            yield f"  change  {gib(change.bytes):>9}   with {change.flags}{costs}"
        for note in found.notes:
            yield f"  note    {note}"
    everything = sum(p.seconds for p in plans)
    misfits = [p.title for p in plans if p.peak > room]
    yield f"\ntogether {clock(everything)} on {cluster}" + (
        f"; {len(misfits)} do not fit as they are" if misfits else ""
    )


def gib(size: int) -> str:
    """Return bytes as GiB, or as MiB where they are few."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def clock(seconds: float) -> str:
    """Return a duration as people say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
