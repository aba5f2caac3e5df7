"""What a pending step works with: its states, and who adds to it, owns it and reads it."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..moments import Moments
from ..rules import Rule


class State(enum.Enum):
    """The state of the pending step."""

    IDLE = "no environment has been added"
    OPEN = "a context is taking gradients"
    PENDING = "environments are complete; more may come"
    WRITTEN = "the aggregated gradients are in .grad, and the step will use them"
    BROKEN = "a context raised after it had added to the moments, which are now invalid"


class Group(NamedTuple):
    """Parameters that one rule aggregates, and their moments."""

    params: list[Tensor]
    moments: Moments
    rule: Rule


class Context(Protocol):
    """A context that receives gradients while it is open."""

    grad_scaler: torch.amp.GradScaler | None

    @property
    def started(self) -> bool:
        """Whether a gradient has arrived."""

    def receive(self, param: Tensor) -> None:
        """Process ``param.grad``, which a backward pass has just completed."""


class Owner(Protocol):
    """The owner of a step: an optimizer, or an Agreement with a rule."""

    def _rules(self) -> list[tuple[list[Tensor], Rule]]:
        """Return the current parameters and rule of each group."""


class Observer:
    """Reads the moments of a step just before they are aggregated.

    Attributes:
        kinds: the kinds of moments that it reads, beside those that the rules need.
    """

    kinds: tuple[str, ...] = ()

    def begin(self) -> bool:
        """Return whether the step that begins must track squared norms."""
        return False

    def end(self, groups: Sequence[Group]) -> None:
        """Read the moments of each group."""


class Exchange(Protocol):
    """Replaces the moments of this process by those of all processes."""

    def __call__(self, groups: Sequence[Group]) -> int:
        """Change the moments in place. Return the number of environments in all processes."""
