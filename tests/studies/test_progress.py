"""What people see while a run lasts."""

from itertools import pairwise

import pytest

pytest.importorskip("tqdm")

from studies import progress
from studies.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when it is told to."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_lines_become_rarer_and_say_how_long_it_will_take(clock, capsys):
    with Progress("[1/1] run", "epoch", lines=True) as tell:
        for epoch in range(1, 101):
            clock[0] += 1.0
            tell(epoch, 100, "loss 1")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[1/1] run  epoch 5/100  loss 1  95 s left"
    told = [int(line.split("epoch ")[1].split("/")[0]) for line in lines]
    gaps = [b - a for a, b in pairwise(told)]
    assert gaps == sorted(gaps)
    assert len(lines) < 15


def test_a_run_that_goes_on_says_so(clock, capsys):
    with Progress("run", "step", lines=True) as tell:
        tell(8, 10, "")
        clock[0] += 6.0
        tell(9, 10, "x")
    assert capsys.readouterr().out.splitlines() == [
        "run  goes on after step 7",
        "run  step 9/10  x  3 s left",
    ]
