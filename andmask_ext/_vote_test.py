"""Which votes keep a coordinate: the arguments that rules, optimizers and ops share."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from ._checks import check_number, check_tau
from ._notices import warn_once

LEVELS = ("tau", "significance", "fdr")  # in the order of the criteria of the native library
ZEROS = ("count", "abstain")
_MOST_PAIRS = 1024  # kMostPairs of the native library


class VoteTest(NamedTuple):
    """A criterion and its level.

    Args:
        criterion: its index in ``LEVELS``.
        level: tau, the significance level or the false discovery rate.
        abstain: whether a zero is no vote, instead of one that does not agree.
    """

    criterion: int
    level: float
    abstain: bool

    @property
    def name(self) -> str:
        """The name of the level."""
        return LEVELS[self.criterion]

    @property
    def is_plain(self) -> bool:
        """Whether tau alone decides."""
        return self.criterion == 0 and not self.abstain


def check_zeros(zeros: object) -> None:
    """Raise ValueError unless ``zeros`` says what a zero is."""
    if zeros not in ZEROS:
        raise ValueError(f"zeros: expected 'count' or 'abstain', but got {zeros!r}")


def check_level(name: str, level: object) -> None:
    """Raise unless the level of a criterion is a Python number in its range.

    Args:
        name: one of ``LEVELS``.
        level: tau in [0, 1], or another level in (0, 1).
    """
    if name == "tau":
        check_tau(level)
    else:
        check_number(name, level, "a Python number in (0, 1)", lambda value: 0 < value < 1)


def given_levels(options: dict[str, Any]) -> dict[str, Any]:
    """Return those of ``options`` that are levels and are not None."""
    return {name: options[name] for name in LEVELS if options.get(name) is not None}


def vote_test(tau: object, fdr: object, significance: object, zeros: object) -> VoteTest:
    """Return the test that the arguments ask for.

    Raises:
        TypeError: a level is not a Python number.
        ValueError: not exactly one level is given, it lies outside its range, or ``zeros`` is
            neither ``"count"`` nor ``"abstain"``.
    """
    given = given_levels({"tau": tau, "fdr": fdr, "significance": significance})
    if len(given) != 1:
        got = ", ".join(f"{name}={level}" for name, level in given.items()) or "none of them"
        raise ValueError(
            "tau: expected exactly one of tau (share of net votes), significance (chance that "
            f"noise is kept) and fdr (share of noise among what is kept), but got {got}"
        )
    ((name, level),) = given.items()
    check_level(name, level)
    check_zeros(zeros)
    return VoteTest(LEVELS.index(name), float(level), zeros == "abstain")


def check_environments(test: VoteTest, environments: int) -> None:
    """Raise ValueError if there are too many environments for a test."""
    if torch.compiler.is_compiling():  # the number may be a symbol; the op checks it
        return
    if test.name == "fdr" and test.abstain and environments > _MOST_PAIRS:
        raise ValueError(
            f"fdr: expected at most {_MOST_PAIRS} environments for fdr with zeros='abstain', but "
            f"got {environments}; let zeros count, or take significance"
        )


def warn_of_level(test: VoteTest, environments: int, owner: object = None) -> None:
    """Warn if votes of so many environments can never reach the level.

    If all of d environments agree by chance, that has the probability 2^(1 - d).

    Args:
        test: the test.
        environments: their number.
        owner: an optimizer or Agreement, which is warned once. None: once in a process.
    """
    if test.criterion == 0 or torch.compiler.is_compiling():
        return
    unanimity = 2.0 ** (1 - environments)
    if unanimity <= test.level or (environments == 1 and test.name == "significance"):
        return  # one environment agrees with itself, which other warnings are about
    enough = math.ceil(1 - math.log2(test.level))
    what = (
        "so unanimity is asked for"
        if test.name == "significance"
        else "so everything is masked, whatever the gradients; take more environments, or "
        "significance or tau"
    )
    warn_once(
        owner or vote_test,
        f"{test.name}: expected at least {enough} environments for {test.name}={test.level:g}, but "
        f"got {environments}, which of noise all agree with a chance of {unanimity:g}, {what}",
        about=f"{test.name}={test.level}",
    )
