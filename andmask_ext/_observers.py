"""Looking at moments while a model trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .moments import Moments

if TYPE_CHECKING:
    from .rules import Rule


class Observer:
    """Looks at the moments of all environments of a step, just before they become an update."""

    def begin(self) -> bool:
        """Return whether squared norms are to be tracked in the step that begins."""
        return False

    def end(self, groups: Sequence[tuple[list[Tensor], Moments, Rule]]) -> None:
        """Take parameters, moments and rule of each group."""


def begin_all(observers: Sequence[Observer]) -> bool:
    """Tell all observers that a step begins; return whether squared norms are to be tracked."""
    return any([observer.begin() for observer in observers])
