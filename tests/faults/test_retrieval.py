"""SIGKILL of a worker or of the driver while targets are retrieved for, or while what was found is put in order."""

from __future__ import annotations

import signal
from collections.abc import Callable
from datetime import datetime
from typing import Any

import psutil
import pytest

from tests.faults.harness import Place, Running, copied

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

UPSTREAM = ("prepare", "embed", "pca")
CUT: dict[str, Any] = {"retrieve.cut": "targets", "retrieve.shard_pairs": 4_000}


def found_by_groups(place: Place) -> dict[str, datetime]:
    """What the groups of targets have found so far, and when it was written."""
    return {p: t for p, t in place.files().items() if "/parts/work-" in p and p.endswith(".parquet")}


def assert_same_neighbours(here: Place, untouched: Place) -> None:
    """The same table, and nothing else left below the artifact."""
    first, second = (p.finished("retrieve").read().replace_schema_metadata(None) for p in (here, untouched))
    assert first.equals(second)
    names = [p.rpartition("/parts/")[2] for p in here.storage().list(here.finished("retrieve").path, recursive=True)]
    assert sorted(names) == sorted([n for n in names if n.startswith("part-")] + [n for n in names if "manifest" in n])


def started(here: Place) -> Running:
    job = here.start("retrieve", **CUT)
    job.until(lambda: len(found_by_groups(here)) >= 3)
    return job


def test_the_driver_is_killed_and_only_lost_groups_are_done_again(
    place: Callable[[str], Place], untouched: Place
) -> None:
    here = copied(untouched, place("groups"), *UPSTREAM)
    started(here).kill()
    done = found_by_groups(here)
    assert not here.has("retrieve", "/parts/part-"), "killed too late to tell anything"
    # Killed again, in the second half, when there is nothing left to do but to put it in order.
    second = here.start("retrieve", **CUT)
    second.until(lambda: here.has("retrieve", "/parts/part-") or here.has("retrieve", "manifest.json"))
    after = found_by_groups(here)
    # Those that are gone went with the manifest.
    assert not {p for p in done if after.get(p, done[p]) != done[p]}, "what was found is not looked for again"
    assert set(done) <= set(after) or here.has("retrieve", "manifest.json")
    if not here.has("retrieve", "manifest.json"):
        second.kill()
    else:
        second.end()
    last = here.run("retrieve", **CUT)
    assert last.code == 0, last.out
    print(f"{len(done)} groups were done at the first kill, {len(after)} at the second")
    assert_same_neighbours(here, untouched)


def test_a_worker_is_killed_and_its_group_is_done_by_another(place: Callable[[str], Place], untouched: Place) -> None:
    here = copied(untouched, place("worker"), *UPSTREAM)
    job = started(here)
    before = found_by_groups(here)
    victims = job.workers("MapWorker")
    assert victims, [p.cmdline() for p in psutil.Process(job.process.pid).children(recursive=True)]
    victims[0].send_signal(signal.SIGKILL)
    job.until(lambda: len(found_by_groups(here)) > len(before) + 2 or here.has("retrieve", "manifest.json"))
    after = found_by_groups(here)
    assert not {p for p in before if after.get(p, before[p]) != before[p]}
    done = job.end()
    assert done.code == 0, done.out
    assert_same_neighbours(here, untouched)
