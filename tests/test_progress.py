from __future__ import annotations

import re

import pytest

from rella import progress
from rella.progress import Bar


def test_a_log_gets_whole_lines_with_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Bar("tune", 1000, "rows") as bar:
        clock[0] = 4.0
        bar.to(100, "loss 1.0")
        clock[0] = 12.0
        bar.to(300, "loss 0.5")
        clock[0] = 13.0
        bar.to(400)
        clock[0] = 20.0
        bar.to(1000)
    first, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"tune +30% 300/1,000 rows 25\.0/s ETA 00:28  loss 0\.5", first)
    assert re.fullmatch(r"tune +100% 1,000/1,000 rows 50\.0/s in 00:20  loss 0\.5", last)


@pytest.mark.parametrize("terminal", [False, True])
def test_what_took_no_time_is_no_part_of_the_rate(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that an earlier run left, or that an early stop left out: done, and not by this machine's speed."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    with Bar("fit", 1000, "rows") as bar:
        if bar._bar is not None:
            bar._bar._time = lambda: clock[0]
            bar._bar.start_t = bar._bar.last_print_t = 0.0
        clock[0] = 10.0
        bar.to(600, "loss 1.0", free=500)
        clock[0] = 20.0
        bar.to(1000, free=800)
    shown = capsys.readouterr().err
    if terminal:
        assert re.search(r"600/1000 .*10\.00 rows/s", shown)
        assert re.search(r"1000/1000 .*10\.00 rows/s", shown)
    else:
        first, last = shown.splitlines()[:2]
        assert re.fullmatch(r"fit +60% 600/1,000 rows 10\.0/s ETA 00:40  loss 1\.0", first)
        assert re.fullmatch(r"fit +100% 1,000/1,000 rows 10\.0/s in 00:20  loss 1\.0", last)


def test_a_terminal_gets_one_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Bar("score", 10, "prompts") as bar:
        bar.to(4, "note")
        bar.to(3)
        bar.to(10)
    shown = capsys.readouterr().err
    assert "10/10" in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("terminal", [False, True])
def test_a_line_of_its_own_stays_whole(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    with Bar("embed", 10, "items") as bar:
        bar.to(4)
        bar.say("embed: out of memory")
        bar.to(10)
    lines = [line.split("\r")[-1] for line in capsys.readouterr().err.splitlines()]
    assert "embed: out of memory" in lines
