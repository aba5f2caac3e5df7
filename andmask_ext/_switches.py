"""Switches of the process."""

from __future__ import annotations

import threading
from collections.abc import Callable

Switch = tuple[Callable[[], bool], Callable[[bool], object], bool]


class Switches:
    """A context in which switches of the process have other values.

    Threads may be inside at once: the first one in saves the values, the last one out restores
    them.

    Args:
        switches: for each the function that reads it, the one that sets it, and the value inside.
    """

    def __init__(self, *switches: Switch) -> None:
        self._switches = switches
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[bool] = []

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = [read() for read, _, _ in self._switches]
                for _, write, value in self._switches:
                    write(value)
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for (_, write, _), value in zip(self._switches, self._before, strict=True):
                    write(value)
