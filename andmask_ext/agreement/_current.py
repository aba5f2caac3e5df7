"""The environments of the context that is open, for layers that take statistics in each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ._groups import Environments, Groups, make_groups

_active: ContextVar[Environments | str] = ContextVar("environments", default="none")


@contextmanager
def activate(environments: Environments) -> Iterator[None]:
    """Make layers with statistics per environment see the argument ``environments``."""
    token = _active.set(environments)
    try:
        yield
    finally:
        _active.reset(token)


def current_groups(examples: int) -> Groups | None:
    """Return the partition of a batch in the context that is active; None: there is none."""
    environments = _active.get()
    return None if isinstance(environments, str) else make_groups(environments, examples)


class PerEnvironment:
    """Mixed into layers whose statistics are taken in each environment (see current_groups)."""
