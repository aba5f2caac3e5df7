"""Warnings about what cannot be refused: each is given once for each object."""

from __future__ import annotations

import contextlib
import sys
import warnings
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

# Others stand between a caller and this package: torch in loss.backward() and around every step(),
# contextlib in `with` statements.
_INSIDE = (*(f"{Path(file).parent}/" for file in (__file__, torch.__file__)), contextlib.__file__)
_ENOUGH = 3  # steps, to tell a mistake from the end of an epoch
_idle: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
_given: weakref.WeakKeyDictionary[object, set[str]] = weakref.WeakKeyDictionary()


def warn_once(owner: object, message: str, about: str | None = None) -> None:
    """Warn at the caller's line outside of this package and torch, once for each ``owner``.

    Args:
        owner: the object that the warning is about, such as an optimizer.
        message: names the argument, what is wrong, and the remedy.
        about: what is said once, if the same can be said with other numbers. None: the message.
    """
    given, about = _given.setdefault(owner, set()), about or message
    if about in given:
        return
    given.add(about)
    frame, depth = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, stacklevel=depth)


def warn_if_nothing_is_masked(owner: object, environments: int, rules: Iterable[Any]) -> None:
    """Warn once if each of the first three steps could mask nothing, whatever its gradients.

    One environment agrees with itself. The votes of an odd number are at least 1, so a threshold of
    1 / d or less keeps every coordinate without zeros.

    Args:
        owner: the optimizer or Agreement.
        environments: the number of environments of this step.
        rules: those of its groups. One that takes the mean is meant so.
    """
    rules = list(rules)
    for rule in rules:
        rule._warn_of(environments, owner)
    masks = [rule for rule in rules if rule.moments and getattr(rule, "tau", None) != 0]
    if not masks:
        return
    low = environments % 2 == 1 and all(
        rule.name == "and_mask" and rule.tau is not None and rule.tau * environments <= 1
        for rule in masks
    )
    # For fdr, one environment is too few, so it masks everything.
    alone = environments == 1 and all(getattr(rule, "fdr", None) is None for rule in masks)
    steps = _idle.get(owner, 0)
    idle = alone or low
    _idle[owner] = steps + 1 if idle else _ENOUGH
    if steps + 1 != _ENOUGH or not idle:
        return
    if environments == 1:
        warn_once(
            owner,
            "step: expected several environments in a step, but each of the first three steps had "
            "one, which agrees with itself, so nothing is masked; call step() after the backward "
            "passes of all environments, let batches accumulate, or give each example an "
            "environment of its own with andmask_ext.Agreement",
        )
    else:
        warn_once(
            owner,
            f"tau: expected a threshold above 1 / d, but got {masks[0].tau} with d = "
            f"{environments} environments in a step: of an odd number at least one more agrees "
            "than not, so nothing is masked; take a larger tau, such as 0.8 for a few large "
            "environments",
        )


def warn_of_processes(owner: object) -> None:
    """Warn once if there are other processes, whose environments do not vote with these."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    processes = distributed.get_world_size()
    if processes > 1:
        warn_once(
            owner,
            f"torch.distributed: expected one process, but got {processes}: the environments of "
            "one process vote by themselves, and nothing keeps the replicas equal (synchronising "
            "votes over processes is not built yet); use one process, or average the parameters "
            "over all processes after each step, or spread each environment over all processes "
            "with DistributedDataParallel and environment(micro_batches=None) of an optimizer of "
            "andmask_ext.optim",
        )


def warn_of_drop(owner: object, environments: int) -> None:
    """Warn that complete environments are dropped, unless an error is being handled."""
    if sys.exc_info()[0] is None:
        warn_once(
            owner,
            f"zero_grad: expected no environments since the last step, but {environments} complete "
            "ones, which no step has used, are dropped; call zero_grad() once per step, before "
            "the first environment (environment() clears .grad by itself)",
        )
