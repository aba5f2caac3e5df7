"""Every instruction set and thread count gives the same bits, and torch's switch is honoured."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import harness

DIGEST = Path(__file__).with_name("digest.py")
LEVELS = ["baseline", "x86-64-v3", "x86-64-v4"]
CAPABILITIES = {"default": 0, "avx2": 1, "avx512": 2, "": 2}


def digest(capability: str, threads: int) -> tuple[str, str]:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    if not capability:
        del environment["ATEN_CPU_CAPABILITY"]
    output = subprocess.check_output(
        [sys.executable, DIGEST, str(threads)], env=environment, text=True
    )
    isa, value = output.split()
    return isa, value


@pytest.fixture(scope="module")
def expected() -> str:
    isa, value = digest("default", 1)
    assert isa == "baseline"
    return value


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda name: name or "unset")
def test_capability_is_honoured_and_bits_are_equal(capability: str, expected: str) -> None:
    best = len(harness.load().isas()) - 1
    isa, value = digest(capability, 2)
    assert isa == LEVELS[min(best, CAPABILITIES[capability])]
    assert value == expected


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_bits_do_not_depend_on_the_thread_count(threads: int, expected: str) -> None:
    assert digest("default", threads)[1] == expected
