"""Two drivers on one storage and one key: one works, the other waits, leaves or takes over."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

from rella.leases import EXPIRES
from tests.faults.harness import (
    STAGES,
    Place,
    assert_same_adapter,
    assert_same_scores,
    assert_same_tables,
    copied,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]


def test_both_at_once_make_each_stage_once(place: Callable[[str], Place], untouched: Place) -> None:
    here = place("both")
    jobs = [here.start("reit", "--variants", "ours") for _ in range(2)]
    done = [job.end(800) for job in jobs]
    assert [d.code for d in done] == [0, 0], done[0].out + done[1].out
    for stage in STAGES:
        made = sum(len(d.lines(stage, "made")) for d in done)
        found = sum(len(d.lines(stage, "found")) for d in done)
        print(
            f"{stage}: made {made}, found {found}, waited {sum(stage in line for d in done for line in waits(d.out))}"
        )
        assert made == 1, done[0].out + done[1].out
    assert any(waits(d.out) for d in done)
    assert done[0].figures["variants"] == done[1].figures["variants"]
    assert_same_tables(here, untouched)
    assert_same_adapter(here, untouched)
    assert_same_scores(here, untouched)


def waits(out: str) -> list[str]:
    return [line for line in out.splitlines() if "is being made by another driver" in line]


def test_the_second_leaves_with_a_message(place: Callable[[str], Place], untouched: Place) -> None:
    here = copied(untouched, place("leave"), "prepare")
    first = here.start("embed")
    first.until(lambda: here.has("embed", ".beat"))
    # It must not be done before the second has come.
    first.pause()
    second = here.run("embed", "--cluster.on-busy", "leave")
    first.process.send_signal(signal.SIGCONT)
    assert second.code == 1, second.out
    message = [line for line in second.out.splitlines() if line.startswith("embed: ")]
    assert "is being made by another driver" in message[0]
    assert f"process {first.process.pid}, since 20" in message[0]
    assert "Traceback" not in second.out
    done = first.end()
    assert done.code == 0, done.out


def test_the_second_takes_over_at_once_on_the_same_machine(place: Callable[[str], Place], untouched: Place) -> None:
    here = copied(untouched, place("takes"), "prepare")
    first = here.start("embed")
    first.until(lambda: here.has("embed", ".beat"))
    first.pause()
    second = here.start("embed")
    second.until(lambda: waits(second.said()))
    first.kill()
    killed = time.monotonic()
    done = second.end()
    print(f"finished {time.monotonic() - killed:.1f} s after the kill")
    assert done.code == 0, done.out
    assert waits(done.out)
    assert done.lines("embed", "made")
    assert time.monotonic() - killed < EXPIRES
    assert_same_embedding(here, untouched)


def assert_same_embedding(here: Place, untouched: Place) -> None:
    first, second = (p.finished("embed").read().replace_schema_metadata(None) for p in (here, untouched))
    assert first.equals(second)


def can_rename_the_host() -> bool:
    command = shutil.which("unshare")
    return command is not None and os.geteuid() == 0 and subprocess.run([command, "--uts", "true"]).returncode == 0


@pytest.mark.skipif(not can_rename_the_host(), reason="needs root and unshare, to make one driver seem another host's")
def test_the_second_takes_over_after_the_lease_from_another_host(
    place: Callable[[str], Place], untouched: Place
) -> None:
    here = copied(untouched, place("elsewhere"), "prepare")
    under = ("unshare", "--uts", "sh", "-c", 'hostname elsewhere && exec "$0" "$@"')
    first = here.start("embed", under=under)
    first.until(lambda: here.has("embed", ".beat"))
    first.pause()
    second = here.start("embed")
    second.until(lambda: waits(second.said()))
    first.kill()
    killed = time.monotonic()
    done = second.end()
    waited = time.monotonic() - killed
    print(f"finished {waited:.1f} s after the kill; a lease lives {EXPIRES:.0f} s")
    assert done.code == 0, done.out
    assert "elsewhere, process" in waits(done.out)[0]
    assert waited > EXPIRES - 15
    assert_same_embedding(here, untouched)
