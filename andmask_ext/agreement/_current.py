"""The environments of the open context, for layers that take statistics per environment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ._groups import Checked, Groups, make_groups

_active: ContextVar[Checked | str] = ContextVar("environments", default="none")


@contextmanager
def activate(environments: Checked) -> Iterator[None]:
    """Show the argument ``environments`` to layers that take statistics per environment."""
    token = _active.set(environments)
    try:
        yield
    finally:
        _active.reset(token)


def current_groups(examples: int) -> Groups | None:
    """Return the partition of a batch in the open context; None: no context is open."""
    environments = _active.get()
    return None if isinstance(environments, str) else make_groups(environments, examples)


class PerEnvironment:
    """Mixin of layers that take their statistics per environment (see current_groups)."""
