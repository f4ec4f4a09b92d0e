"""One progress bar a stage, with rate and time left: redrawn on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 10.0
"""Between two lines where the output is not a terminal."""


class Bar:
    """A progress bar on standard error; `to` sets how far it is."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        terminal = sys.stderr.isatty()
        options: dict[str, Any] = {"desc": f"{title:<9}", "total": total, "unit": f" {unit}", "file": sys.stderr}
        options |= {"mininterval": 0.2 if terminal else LOG_SECONDS, "dynamic_ncols": terminal, "smoothing": 0.1}
        if not terminal:
            # In a log every state is a line of its own.
            options |= {"bar_format": "{desc} {percentage:3.0f}% {n_fmt}/{total_fmt}{unit} {rate_fmt} ETA {remaining}"
                        "{postfix}\n", "maxinterval": LOG_SECONDS, "delay": LOG_SECONDS / 2}  # fmt: skip
        self._bar: tqdm[Any] = tqdm(**options)

    def to(self, done: int, note: str = "") -> None:
        """Move to `done`, with a note (loss, AUC) behind the rate."""
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        if done > self._bar.n:
            self._bar.update(done - self._bar.n)

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
