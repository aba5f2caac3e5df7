"""The pending step: the environments since the last step, and the state of the step."""

from __future__ import annotations

import enum
import operator
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ._memory import KINDS
from .moments import Moments
from .rules import Rule


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


class Hook:
    """Passes a complete gradient to the open context, if there is one.

    It holds no strong reference to the step. A copied or pickled hook does nothing.
    """

    def __init__(self, pending: PendingStep | None) -> None:
        self._pending = None if pending is None else weakref.ref(pending)

    def __call__(self, param: Tensor) -> None:
        pending = None if self._pending is None else self._pending()
        if pending is not None and pending.context is not None:
            pending.context.receive(param)

    def __reduce__(self) -> tuple[type[Hook], tuple[None]]:
        return Hook, (None,)


class PendingStep:
    """The moments of a step and the state of the step. Only this class writes its fields.

    A context calls :meth:`open`, adds to the moments, and then calls :meth:`add_environments` and
    :meth:`close`. If something raised, it calls :meth:`abandon` instead. The owner then calls
    :meth:`complete`, aggregates the groups, and calls :meth:`finish`.

    Args:
        owner: provides the parameters and rules. Only a weak reference is kept.
        clears_grads: whether gradients arrive in ``.grad``, one environment after the other, as for
            an optimizer. Then hooks are attached to the parameters, and ``.grad`` must be empty.

    Attributes:
        state: see :class:`State`.
        environments: the number of environments since the last step.
        context: the open context, or None.
        moments: one object for each group.
        slots: the number of the group of each parameter and its index there, by the id of the
            parameter.
        exchange: called once per step, before the observers see the moments. None: there is only
            this process.
    """

    def __init__(self, owner: Owner, *, clears_grads: bool) -> None:
        self._owner = weakref.ref(owner)
        self._clears_grads = clears_grads
        self.state = State.IDLE
        self.environments = 0
        self.context: Context | None = None
        self.moments: list[Moments] = []
        self.exchange: Exchange | None = None
        self._exchanged = False
        self._observers: list[Observer] = []
        self.slots: dict[int, tuple[int, int]] = {}
        self._hooks: dict[int, Any] = {}
        self._scaler: torch.amp.GradScaler | None = None
        self._holds_grads = False  # whether this object wrote .grad
        self._shown: list[tuple[Tensor, int]] = []  # .grad for GradScaler, and its version
        self.is_unscaled = False  # the scale has been divided out of .grad

    # ---- observers ----

    def add_observer(self, observer: Observer) -> None:
        """Add an observer of every step, from the next step on."""
        self._observers.append(observer)

    def remove_observer(self, observer: Observer) -> None:
        """Remove an observer, if it was added."""
        if observer in self._observers:
            self._observers.remove(observer)

    # ---- for contexts ----

    def open(self, context: Context) -> None:
        """Let a context add environments.

        Raises:
            RuntimeError: another context is open, the step is broken or its gradients are written,
                the scaler has changed, or a parameter has a ``.grad`` from outside.
        """
        self._require_open_to_more()
        if self.environments:
            if self._clears_grads and self._scaler is not context.grad_scaler:
                raise RuntimeError("environment: expected the same grad_scaler in all environments")
            self.require_untouched("environment")
        self._prepare()
        if self._clears_grads:
            self._clear_grads()
        self._scaler = context.grad_scaler if self._clears_grads else None
        self.context, self.state = context, State.OPEN

    def add_environments(self, count: int) -> None:
        """Count environments whose gradients have been added to the moments."""
        for moments in self.moments:
            moments._end_environments(count)
        self.environments += count

    def close(self) -> None:
        """End the context: all of its environments are complete."""
        self.context, self.state = None, State.PENDING
        if self._scaler is None:
            return
        # GradScaler looks for overflow in .grad. The sum of all environments shows any overflow.
        # A finite sum may overflow in float16, so 0 * sum is written: it is 0 or NaN.
        self._shown = []
        for params, moments, _ in self.groups():
            for param, total in zip(params, moments.sum, strict=True):
                if total is not None:
                    same = total.dtype == param.dtype
                    param.grad = total if same else (total * 0).to(param.dtype)
                    self._shown.append((param.grad, param.grad._version))
        self._holds_grads = True

    def abandon(self, changed: bool) -> None:
        """End the context after an error.

        Args:
            changed: whether it may have added anything to the moments.
        """
        self.context = None
        if changed:
            self.state = State.BROKEN
        else:
            self.state = State.PENDING if self.environments else State.IDLE

    # ---- for the owner ----

    def require_complete(self, caller: str, expected: int | None = None) -> None:
        """Raise unless there are environments, all of them complete.

        Args:
            caller: the beginning of the message.
            expected: the expected number of environments; None: any number.
        """
        self.require_closed(caller)
        self._require_whole(caller)
        if self.environments == 0:
            raise RuntimeError(
                f"{caller}: expected at least one environment since the last step, but got 0; "
                "put each backward pass inside `with optimizer.environment():`"
            )
        if expected is not None and self.environments != expected and not self._exchanged:
            raise RuntimeError(
                f"{caller}: expected {expected} environments since the last step, but got "
                f"{self.environments} (left over from a skipped step? call zero_grad() to drop "
                "them)"
            )

    def require_closed(self, caller: str) -> None:
        """Raise if a context is open."""
        if self.state is State.OPEN:
            raise RuntimeError(f"{caller}: expected to be called outside of an environment")

    def require_untouched(self, caller: str) -> None:
        """Raise if ``.grad``, which GradScaler reads, has changed since the last environment."""
        states = getattr(self._scaler, "_per_optimizer_states", {})
        stage = states.get(id(self._owner()), {}).get("stage")
        unscaled = getattr(stage, "name", None) == "UNSCALED"
        if unscaled or any(grad._version != version for grad, version in self._shown):
            raise RuntimeError(
                f"{caller}: .grad has been changed since the last environment; expected "
                "optimizer.write_grads() before grad_scaler.unscale_(optimizer) and clipping; "
                "call zero_grad() and grad_scaler.update() to start the step again"
            )

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The scaler of the losses of this step, or None."""
        return self._scaler

    def groups(self) -> list[Group]:
        """Return parameters, moments and rule of each group."""
        owner = self._owner()
        assert owner is not None
        return [
            Group(params, moments, rule)
            for (params, rule), moments in zip(owner._rules(), self.moments, strict=True)
        ]

    def complete(self) -> list[Group]:
        """Run the exchange, if there is one, and return the groups."""
        groups = self.groups()
        if self.exchange is not None and not self._exchanged:
            state, self.state = self.state, State.BROKEN  # if it raises
            self.environments = self.exchange(groups)
            for moments in self.moments:
                moments.count = self.environments
            self._exchanged, self.state = True, state
        return groups

    def observe(self, groups: Sequence[Group]) -> None:
        """Show the moments to all observers."""
        for observer in self._observers:
            observer.end(groups)

    def hold_grads(self) -> None:
        """Record that ``.grad`` of the parameters belongs to this step, not to the user."""
        self._holds_grads = True

    def wrote_grads(self) -> None:
        """Record that the owner has written the aggregated gradients to ``.grad``."""
        self.hold_grads()
        self.state = State.WRITTEN

    def unscaled_grads(self) -> None:
        """Record that the scale has been divided out of the gradients in ``.grad``."""
        self.is_unscaled = True

    def finish(self, *, keep_moments: bool = False) -> None:
        """Drop the environments, but keep memory and hooks.

        Args:
            keep_moments: leave the moments as they are until the next context opens.
        """
        if not keep_moments:
            for moments in self.moments:
                moments.reset()
        self.state, self.environments, self._exchanged = State.IDLE, 0, False
        self._scaler, self._shown, self.is_unscaled = None, [], False

    def drop(self) -> bool:
        """Drop the environments. Return whether this object wrote ``.grad``."""
        self.finish()
        held, self._holds_grads = self._holds_grads, False
        return held

    def replace_moments(self) -> None:
        """Drop the environments and the moments, which the next context creates again."""
        self.drop()
        self.moments = []

    # ---- saving ----

    def state_dict(self) -> dict[str, Any]:
        """Return the environments since the last step."""
        if self.state is not State.PENDING or self._scaler is not None:
            raise RuntimeError(
                "state_dict: expected to be called before the first environment or after step(), "
                "but got a step that is open, written, broken or scaled half-way"
            )
        return {
            "count": self.environments,
            "moments": [moments.state_dict() for moments in self.moments],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load environments that :meth:`state_dict` saved between two environments."""
        self._prepare()
        for moments, saved in zip(self.moments, state["moments"], strict=True):
            moments.load_state_dict(saved)
        self.environments, self.state = state["count"], State.PENDING

    # ---- parts ----

    def _require_whole(self, caller: str) -> None:
        if self.state is State.BROKEN:
            raise RuntimeError(
                f"{caller}: an earlier environment raised before it was complete; call zero_grad() "
                "and start the step again"
            )

    def _require_open_to_more(self) -> None:
        if self.state is State.OPEN:
            raise RuntimeError("environment: expected no environment inside another")
        self._require_whole("environment")
        if self._exchanged and self.state is State.PENDING:
            raise RuntimeError(
                "environment: the environments of this step have been exchanged with those of "
                "other processes; call step(), or zero_grad() to drop them"
            )
        if self.state is State.WRITTEN:
            raise RuntimeError(
                f"environment: {self.environments} environments are left over from a step that was "
                "skipped after write_grads(); call zero_grad() to drop them, or step()"
            )

    def _clear_grads(self) -> None:
        for moments in self.moments:
            for index, param in enumerate(moments._params):
                if param.grad is not None:
                    if not self._holds_grads:
                        raise RuntimeError(
                            f"environment: parameter {index} of shape {tuple(param.shape)} has a "
                            ".grad from outside of an environment; call zero_grad() first"
                        )
                    param.grad = None
        self._holds_grads = False

    def _prepare(self) -> None:
        """Create moments and hooks for the current groups."""
        if self.environments == 0:
            owner = self._owner()
            assert owner is not None
            groups = owner._rules()
            observed = {kind for observer in self._observers for kind in observer.kinds}
            wanted = [observed.union(rule.moments or ()) for _, rule in groups]
            kinds = [tuple(kind for kind in KINDS if kind in some) for some in wanted]
            same_kinds = [moments.kinds for moments in self.moments] == kinds
            if not (same_kinds and all(map(_are_of, self.moments, groups))):
                self.moments = [
                    Moments(params, kept) for (params, _), kept in zip(groups, kinds, strict=True)
                ]
                for handle in self._hooks.values():
                    handle.remove()
                self._hooks.clear()  # an id may belong to another parameter by now
                self.slots = {
                    id(param): (number, index)
                    for number, (params, _) in enumerate(groups)
                    for index, param in enumerate(params)
                }
            wishes = [observer.begin() for observer in self._observers]  # all of them are told
            for moments in self.moments:
                moments.reset()
                moments._observed = any(wishes)
        if self._clears_grads and len(self._hooks) < len(self.slots):
            hook = Hook(self)
            for moments in self.moments:
                for param in moments._params:
                    if param.requires_grad and id(param) not in self._hooks:
                        self._hooks[id(param)] = param.register_post_accumulate_grad_hook(hook)


def _are_of(moments: Moments, group: tuple[list[Tensor], Rule]) -> bool:
    """Return whether moments were made for the parameters of a group, in their order."""
    params = group[0]
    return len(moments._params) == len(params) and all(map(operator.is_, moments._params, params))
