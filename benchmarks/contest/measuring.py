"""Time and memory of functions that do the same in different ways.

Contestants of one case are timed alternately in one process, so that a busy machine hits all of
them alike. Read ratios, not milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.benchmark import Measurement, Timer

import andmask_ext as am

ROUNDS = 9


@dataclass
class Row:
    """One contestant in one case; times in seconds, memory in MiB."""

    case: str
    contestant: str
    threads: int
    isa: str
    median: float
    iqr: float
    minimum: float
    gigabytes_per_second: float
    ratio: float
    megabytes: float | None = None
    memory_ratio: float | None = None
    process: float | None = None
    process_ratio: float | None = None
    note: str = ""

    @property
    def key(self) -> tuple[str, str, int]:
        """What two runs of a benchmark have in common."""
        return self.case, self.contestant, self.threads


def untimed(case: str, contestant: str, seconds: float = 0.0) -> Row:
    """Make the row of a contestant without rounds."""
    isa = str(am.build_info()["isa"])
    return Row(case, contestant, torch.get_num_threads(), isa, seconds, 0.0, seconds, 0.0, 0.0)


def measure(
    case: str,
    contestants: Mapping[str, Callable[[], object]],
    *,
    bytes_moved: int,
    yardstick: str,
    rounds: int = ROUNDS,
    seconds_per_round: float = 0.05,
    patience: float = 0.2,
) -> list[Row]:
    """Time the contestants alternately."""
    timers = {
        name: Timer("f()", globals={"f": call}, num_threads=torch.get_num_threads(), label=case)
        for name, call in contestants.items()
    }
    repeats, turns = {}, {}
    for name, timer in timers.items():
        timer.timeit(1)  # compile, allocate
        once = timer.timeit(1).median
        repeats[name] = max(1, min(100_000, int(seconds_per_round / max(once, 1e-7))))
        turns[name] = rounds if once < patience else min(3, rounds)
    measured: dict[str, list[Measurement]] = {name: [] for name in timers}
    for turn in range(rounds):
        for name, timer in timers.items():
            if turn < turns[name]:
                measured[name].append(timer.timeit(repeats[name]))
    merged = {name: Measurement.merge(some)[0] for name, some in measured.items()}
    base = merged[yardstick].median
    rows = []
    for name, result in merged.items():
        row = untimed(case, name, result.median)
        row.iqr, row.minimum = result.iqr, min(result.times)
        row.gigabytes_per_second = bytes_moved / result.median / 1e9
        row.ratio = result.median / base
        rows.append(row)
    return rows


def seconds_of(function: Callable[[], object]) -> float:
    """Time one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def peak_memory(function: Callable[[], object]) -> int:
    """Measure by how much the process grows during a call (Linux)."""
    function()
    ctypes.CDLL(None).malloc_trim(0)  # what the first call left behind would hide the second's use
    Path("/proc/self/clear_refs").write_text("5")  # forget the old peak
    before = status("VmRSS")
    function()
    return max(0, status("VmHWM") - before)


def status(field: str) -> int:
    """Read what the kernel says about this process (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


@contextmanager
def limited_memory(share: float = 0.75) -> Iterator[None]:
    """Let allocations fail, not the machine, if a contestant wants too much memory."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    size = int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * share)
    if before[1] != resource.RLIM_INFINITY:
        size = min(size, before[1])
    resource.setrlimit(resource.RLIMIT_DATA, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
