"""Contestants of one case: tried, compared with the authors' loop, timed, weighed."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module

from ..measuring import ROUNDS, Row, Step, limited_memory, measure, seconds_of, untimed
from .exactness import Deviation, Loop
from .memory import SLOW, peak_of
from .models import setting
from .peers import EXACT, LIBRARIES, OURS, PLAIN, Contestant

GROUPS = 8
EVERY, GROUPED = "every example", f"{GROUPS} groups"
VERY_SLOW = 30.0  # seconds of a step that is not made a second time, not even for its memory
Tell = Callable[[str, str], object]


@dataclass(frozen=True)
class Case:
    """What is done: the gradient, or a whole step, of one model and one kind of environments."""

    model: str
    kind: str
    examples: int
    seed: int = 0

    @property
    def environments(self) -> int:
        """How many there are."""
        return self.examples if self.kind == EVERY else GROUPS

    def name(self, parameters: int) -> str:
        """Name the case for people."""
        return f"{self.model}, {parameters / 1e6:.2f} M, batch {self.examples}, {self.kind}"


def unavailable(name: str, environments: int) -> str:
    """Say why a contestant is not even tried."""
    if name in LIBRARIES:
        module = LIBRARIES[name][0]
        try:
            import_module(module)
        except Exception as error:  # a library may raise anything
            absent = isinstance(error, ImportError) and error.name == module
            return "not installed" if absent else reason(error)
    if name == "DomainBed" and environments > GROUPS:
        return f"not run: {environments} passes through the graph of the whole batch"
    return ""


def reason(error: Exception) -> str:
    """Write an error in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:110]}{'...' if len(text) > 110 else ''}"


def contest(
    case: Case,
    contestants: Mapping[str, Contestant],
    yardstick: str,
    *,
    memory: bool,
    rounds: int = ROUNDS,
    seconds_per_round: float = 0.1,
    slow: float = SLOW,
    tell: Tell = lambda stage, name: None,
) -> tuple[list[Row], dict[str, Deviation]]:
    """Let contestants do the same.

    All that fail, or are not there, have a row that says why.
    """
    with limited_memory(), _quiet():
        tried = _try(case, contestants, yardstick, slow, tell)
        rows = {row.contestant: row for row in tried.timed}
        tell("timing", "all")
        for row in measure(
            tried.case,
            tried.steps,
            bytes_moved=0,
            yardstick=yardstick,
            rounds=rounds,
            seconds_per_round=seconds_per_round,
            patience=1.0,  # beyond it no call is a close one
        ):
            rows[row.contestant] = row
        tried.steps.clear()
        gc.collect()
        ordered = [rows.get(name) or untimed(tried.case, name) for name in contestants]
        for row in ordered:
            row.ratio = row.median / rows[yardstick].median
            row.note = ", ".join(filter(None, tried.notes[row.contestant]))
        if memory:
            for row in ordered:
                if row.median and row.median < VERY_SLOW:
                    tell("memory of", row.contestant)
                    _weigh(row, case)
            _compare_memory(ordered, rows[yardstick])
    return ordered, tried.deviations


@contextmanager
def _quiet() -> Iterator[None]:
    """Show only what this package warns of; other libraries warn in every step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module="andmask_ext")
        warnings.filterwarnings("ignore", "Full backward hook is firing")  # Opacus and BackPACK
        yield


@dataclass
class _Tried:
    case: str
    steps: dict[str, Step]
    timed: list[Row]
    notes: dict[str, list[str]]
    deviations: dict[str, Deviation]


def _try(
    case: Case, contestants: Mapping[str, Contestant], yardstick: str, slow: float, tell: Tell
) -> _Tried:
    """Make a step of each, or two; keep those that are fast enough for rounds."""
    network, batch = setting(case.model, case.examples, case.seed)
    gradients = yardstick == PLAIN
    name = case.name(sum(param.numel() for param in network.parameters()))
    tried = _Tried(name if gradients else f"{name}, whole step", {}, [], {}, {})
    compared = gradients and EXACT in contestants
    loop = Loop(network, batch, case.environments) if compared else None
    for contestant, make in contestants.items():
        tell("trying", contestant)
        notes = tried.notes[contestant] = [unavailable(contestant, case.environments)]
        if notes[0]:
            continue
        own = network if gradients else setting(case.model, case.examples, case.seed)[0]
        try:
            step = make(own, batch, case.environments)
            seconds = seconds_of(step)
            if slow <= seconds < VERY_SLOW:  # the first step warms up, and allocates
                seconds = seconds_of(step)
        except Exception as error:  # a library may raise anything
            notes.append(reason(error))
            continue
        if seconds < slow or contestant in (yardstick, OURS):
            tried.steps[contestant] = step
        else:
            tried.timed.append(untimed(tried.case, contestant, seconds))
            notes.append("timed once")
        if loop is not None and contestant != PLAIN:
            found = [param.grad for param in network.parameters()]
            deviation = tried.deviations[contestant] = loop.compare(found)
            notes.append(str(deviation))
    return tried


def _weigh(row: Row, case: Case) -> None:
    try:
        row.megabytes, row.process = peak_of(
            row.contestant, case.model, case.examples, case.environments
        )
    except RuntimeError as error:
        row.note = ", ".join(filter(None, [row.note, f"memory not measured: {error}"]))


def _compare_memory(rows: list[Row], base: Row) -> None:
    for row in rows:
        if row.megabytes and row.process and base.megabytes and base.process:
            row.memory_ratio = row.megabytes / base.megabytes
            row.process_ratio = row.process / base.process
