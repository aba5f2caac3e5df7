"""Time and memory of functions that do the same in different ways.

Contestants of one case are timed alternately in one process, so that a busy machine hits all of
them alike. Read ratios, not milliseconds.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.benchmark import Timer

import andmask_ext as am

Step = Callable[[], object]
ROUNDS = 9


@dataclass
class Row:
    """One contestant in one case; times in seconds, memory in MiB."""

    case: str
    contestant: str
    threads: int
    isa: str
    median: float  # of the rounds; 0 if there is none
    iqr: float  # interquartile range
    minimum: float
    gigabytes_per_second: float  # bytes of the case over the median
    ratio: float  # median to that of the case's yardstick
    megabytes: float | None = None  # at the peak, where it was measured
    memory_ratio: float | None = None
    process: float | None = None  # at the peak of the whole process
    process_ratio: float | None = None
    note: str = ""  # why there are no figures, or what they need for a reading

    @property
    def key(self) -> tuple[str, str, int]:
        """What two runs of a benchmark have in common."""
        return self.case, self.contestant, self.threads


def untimed(case: str, contestant: str, seconds: float = 0.0, note: str = "") -> Row:
    """Make the row of a contestant that was called once, or not at all."""
    isa = str(am.build_info()["isa"])
    times = (seconds, 0.0, seconds)
    return Row(case, contestant, torch.get_num_threads(), isa, *times, 0.0, 0.0, note=note)


def measure(
    case: str,
    contestants: Mapping[str, Step],
    *,
    bytes_moved: float,
    yardstick: str,
    prepare: Mapping[str, Step] | None = None,
    rounds: int = ROUNDS,
    seconds_per_round: float = 0.05,
    patience: float = 0.2,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Time the contestants alternately; the ratio of the yardstick is 1.

    A call is repeated until it fills ``seconds_per_round``; what takes more than ``patience`` has
    three rounds at most. What is in ``prepare`` is done before each call of that contestant, and
    is not timed; calls are then timed one by one, of all contestants. ``time.thread_time`` as clock
    leaves out what others do on the machine, where contestants have one thread.

    Example:
        >>> rows = measure(
        ...     "a sum", {"twice": lambda: 1 + 1 + 1, "once": lambda: 1 + 1}, bytes_moved=0,
        ...     yardstick="once", rounds=1, seconds_per_round=1e-4,
        ... )
        >>> [row.contestant for row in rows], rows[1].ratio
        (['twice', 'once'], 1.0)
    """
    prepare = prepare or {}

    def seconds(name: str, repeats: int) -> list[float]:
        if not prepare:
            timer = Timer("f()", timer=clock, globals={"f": contestants[name]}, num_threads=threads)
            return [timer.timeit(repeats).median]
        times = []
        for _ in range(repeats):
            if name in prepare:
                prepare[name]()
            gc.disable()  # as the timer does
            times.append(seconds_of(contestants[name], clock))
            gc.enable()
        return times

    threads = torch.get_num_threads()
    repeats, turns = {}, {}
    for name in contestants:
        seconds(name, 1)  # compile, allocate
        (once,) = seconds(name, 1)
        repeats[name] = max(1, min(100_000, int(seconds_per_round / max(once, 1e-7))))
        turns[name] = rounds if once < patience else min(3, rounds)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        for name in contestants:
            if turn < turns[name]:
                times[name] += seconds(name, repeats[name])
    return rows_of(case, times, yardstick, bytes_moved)


def rows_of(
    case: str, times: Mapping[str, list[float]], yardstick: str, bytes_moved: float = 0.0
) -> list[Row]:
    """Make a row of the times of each contestant."""
    base = statistics.median(times[yardstick])
    rows = []
    for name, seconds in times.items():
        low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
        row = untimed(case, name, median)
        row.iqr, row.minimum = high - low, min(seconds)
        row.gigabytes_per_second, row.ratio = bytes_moved / median / 1e9, median / base
        rows.append(row)
    return rows


def seconds_of(function: Step, clock: Callable[[], float] = time.perf_counter) -> float:
    """Time one call."""
    started = clock()
    function()
    return clock() - started


def peak_memory(function: Step, prepare: Step = lambda: None) -> int:
    """Return by how many bytes the process grows during a call, at most (Linux).

    The function is called twice; the first call, after which memory is given back, does not count.
    ``prepare`` is called before each and does not count.
    """
    prepare()
    function()
    prepare()
    ctypes.CDLL(None).malloc_trim(0)  # what the first call left behind would hide the second's use
    Path("/proc/self/clear_refs").write_text("5")  # forget the old peak
    before = status("VmRSS")
    function()
    return max(0, status("VmHWM") - before)


def status(field: str) -> int:
    """Return the bytes that ``/proc/self/status`` says of a field such as ``VmRSS`` (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


@contextmanager
def limited_memory(share: float = 0.75) -> Iterator[None]:
    """Let allocations over a share of the machine's memory fail, and not the machine."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    size = int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * share)
    if before[1] != resource.RLIM_INFINITY:
        size = min(size, before[1])
    resource.setrlimit(resource.RLIMIT_DATA, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
