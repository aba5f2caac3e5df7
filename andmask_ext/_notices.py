"""Warnings about what cannot be refused: each is given once for each object."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

# torch stands between a caller and this package: in loss.backward(), and around every step().
_INSIDE = tuple(f"{Path(file).parent}/" for file in (__file__, torch.__file__))
_MANY = 3  # steps: it is known that a step has several environments
_alone: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
_given: weakref.WeakKeyDictionary[object, set[str]] = weakref.WeakKeyDictionary()


def warn_once(owner: object, message: str) -> None:
    """Warn at the caller's line outside of this package and torch, once for each ``owner``.

    Args:
        owner: the object that the warning is about, such as an optimizer.
        message: names the argument, what is wrong, and the remedy.
    """
    given = _given.setdefault(owner, set())
    if message in given:
        return
    given.add(message)
    frame, depth = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, stacklevel=depth)


def warn_of_one_environment(owner: object, environments: int, rules: Iterable[Any]) -> None:
    """Warn once if each of the first three steps had one environment: nothing is masked then.

    Args:
        owner: the optimizer.
        environments: the number of environments of this step.
        rules: those of its groups. One that takes the mean is meant so.
    """
    if not any(rule.moments and getattr(rule, "tau", 1) for rule in rules):
        return
    steps = _alone.get(owner, 0)
    _alone[owner] = steps + 1 if environments == 1 else _MANY
    if steps + 1 == 3 and environments == 1:
        warn_once(
            owner,
            "step: expected several environments in a step, but each of the first three steps had "
            "one, which agrees with itself, so nothing is masked; call step() after the backward "
            "passes of all environments, let batches accumulate, or give each example an "
            "environment of its own with andmask_ext.Agreement",
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
