"""The pending step: the environments since the last step, and the state of the step."""

from ._hooks import Hook, show_to_hooks
from ._parts import Context, Exchange, Group, Observer, Owner, State
from ._step import PendingStep

__all__ = [
    "Context",
    "Exchange",
    "Group",
    "Hook",
    "Observer",
    "Owner",
    "PendingStep",
    "State",
    "show_to_hooks",
]
