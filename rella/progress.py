"""One progress bar a stage, with rate and time left: redrawn on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 10.0
"""Between two lines where the output is not a terminal."""


class Bar:
    """A progress bar on standard error; `to` sets how far it is."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self._title, self._total, self._unit = f"{title:<9}", total, unit
        self._done, self._free, self._note = 0, 0, ""
        self._started = self._printed = time.monotonic()
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                desc=self._title, total=total, unit=f" {unit}", file=sys.stderr, dynamic_ncols=True, smoothing=0.1
            )

    def to(self, done: int, note: str = "", free: int = 0) -> None:
        """Move to `done`, of which `free` took no time (found, not needed); a note (loss, AUC) is behind the rate."""
        self._note = note or self._note
        if self._bar is not None:
            self._bar.set_postfix_str(self._note, refresh=False)
            # What tqdm takes as done before it began.
            found = min(free - self._free, max(0, done - self._bar.n))
            self._bar.initial += found
            self._bar.n += found
            self._bar.last_print_n += found
            self._bar.update(max(0, done - self._bar.n))
        self._free = max(self._free, free)
        self._done = max(self._done, done)
        if self._bar is None and time.monotonic() - self._printed >= LOG_SECONDS:
            self._print()

    def say(self, line: str) -> None:
        """Print a line of its own on standard error, above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def _print(self) -> None:
        """One line of a log: nothing is redrawn, so nothing is padded or overwritten."""
        self._printed = time.monotonic()
        elapsed = self._printed - self._started
        rate = (self._done - self._free) / elapsed if elapsed else 0.0
        left = tqdm.format_interval((self._total - self._done) / rate) if rate else "?"
        share = 100 * self._done // max(1, self._total)
        ending = f"ETA {left}" if self._done < self._total else f"in {tqdm.format_interval(elapsed)}"
        done = f"{self._done:,}/{self._total:,} {self._unit}"
        line = f"{self._title} {share:3d}% {done} {rate:,.1f}/s {ending}  {self._note}"
        print(line.rstrip(), file=sys.stderr, flush=True)

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        else:
            self._print()
