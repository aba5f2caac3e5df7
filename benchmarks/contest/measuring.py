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
    """One contestant in one case; times in seconds, memory in MiB.

    Args:
        case: what is measured.
        contestant: who.
        threads: of torch.
        isa: instruction set of the kernels.
        median: of the rounds; 0 if there is none.
        iqr: interquartile range.
        minimum: of the rounds.
        gigabytes_per_second: bytes of the case over the median.
        ratio: median to that of the case's yardstick.
        megabytes: peak memory, where it was measured.
        memory_ratio: to that of the yardstick.
        process: peak memory of the whole process.
        process_ratio: to that of the yardstick.
        note: why there are no figures, or what they need for a reading.
    """

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
    """Make the row of a contestant without rounds.

    Args:
        case: what is measured.
        contestant: who.
        seconds: of its only call, if there was one.

    Returns:
        A row without ratios.
    """
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
    """Time the contestants alternately.

    Args:
        case: what they do.
        contestants: functions by name.
        bytes_moved: what each reads and writes at least; 0 where that says nothing.
        yardstick: the contestant whose median is 1.
        rounds: of each.
        seconds_per_round: a call is repeated until it fills them.
        patience: contestants that take more seconds have at most three rounds.

    Returns:
        A row for each contestant.

    Example:
        >>> rows = measure(
        ...     "a sum", {"twice": lambda: 1 + 1 + 1, "once": lambda: 1 + 1}, bytes_moved=0,
        ...     yardstick="once", rounds=1, seconds_per_round=1e-4,
        ... )
        >>> [row.contestant for row in rows], rows[1].ratio
        (['twice', 'once'], 1.0)
    """
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
    """Time one call.

    Args:
        function: what to call.

    Returns:
        Seconds that passed.
    """
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def peak_memory(function: Callable[[], object]) -> int:
    """Measure by how much the process grows during a call (Linux).

    Args:
        function: called twice; the first call, after which memory is given back, does not count.

    Returns:
        Bytes, at most, over those before the second call.
    """
    function()
    ctypes.CDLL(None).malloc_trim(0)  # what the first call left behind would hide the second's use
    Path("/proc/self/clear_refs").write_text("5")  # forget the old peak
    before = status("VmRSS")
    function()
    return max(0, status("VmHWM") - before)


def status(field: str) -> int:
    """Read what the kernel says about this process (Linux).

    Args:
        field: of ``/proc/self/status``, such as ``VmRSS``, what it uses now.

    Returns:
        Bytes.

    Raises:
        KeyError: there is no such field.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


@contextmanager
def limited_memory(share: float = 0.75) -> Iterator[None]:
    """Let allocations fail, not the machine, if a contestant wants too much memory.

    Args:
        share: of the machine's memory.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    size = int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * share)
    if before[1] != resource.RLIM_INFINITY:
        size = min(size, before[1])
    resource.setrlimit(resource.RLIMIT_DATA, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
