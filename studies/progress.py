"""Progress of one run, in a terminal and elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm


class Progress:
    """Progress of one run: a bar in a terminal, a line now and then elsewhere."""

    FIRST_LINE = 5.0  # seconds; the longer a run lasts, the rarer the lines

    def __init__(self, title: str, unit: str, lines: bool = False) -> None:
        self._title, self._unit = title, unit
        self._started = self._told = time.perf_counter()
        self._first: int | None = None
        self._bars = not lines and sys.stderr.isatty()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int, total: int, text: str = "") -> None:
        """Tell that so much of the whole is done."""
        now = time.perf_counter()
        if self._first is None:
            self._first = done - 1
            if self._bars:
                self._bar = tqdm(
                    total=total, initial=self._first, desc=self._title, unit=self._unit, leave=False
                )
            if self._first > 0:
                self._say(f"goes on after {self._unit} {self._first}")
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
        elif done < total and now - self._told >= max(
            self.FIRST_LINE, (self._told - self._started) / 4
        ):
            self._told = now
            left = (now - self._started) / (done - self._first) * (total - done)
            self._say(f"{self._unit} {done}/{total}  {text}  {left:.0f} s left")

    def _say(self, text: str) -> None:
        line = f"{self._title}  {text}"
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.write(line)
