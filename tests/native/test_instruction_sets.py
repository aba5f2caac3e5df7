"""Every instruction set and thread count gives the same bits, and torch's switch is honoured."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from . import harness

DIGEST = Path(__file__).with_name("digest.py")
LEVELS = ["baseline", "x86-64-v3", "x86-64-v4"]


def digests(capability: str, *threads: int) -> tuple[str, list[str]]:
    """Return the instruction set in use, and what the ops compute with so many threads."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    if not capability:
        del environment["ATEN_CPU_CAPABILITY"]
    command = [sys.executable, DIGEST, *map(str, threads)]
    isa, *values = subprocess.check_output(command, env=environment, text=True).split()
    assert len(values) == len(threads)
    return isa, values


def test_bits_depend_on_neither_threads_nor_instruction_set_and_the_switch_is_honoured() -> None:
    """One test, so that no process of pytest computes the baseline again."""
    isa, (expected, *others) = digests("default", 1, 2, 3, 8)
    assert isa == "baseline"
    assert others == [expected] * 3
    available = LEVELS[: len(harness.load().isas())]
    assert digests("avx2", 2) == (available[:2][-1], [expected])
    assert digests("avx512", 2) == (available[-1], [expected])
    assert digests("") == (available[-1], [])  # the same set, hence the same bits
