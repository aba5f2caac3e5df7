"""The class PendingStep."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from .._memory import KINDS
from .._notices import warn_of_drop, warn_of_processes
from ..moments import Moments
from ._hooks import Hooks
from ._opened import opened
from ._parts import Context, Exchange, Group, Observer, Owner, State
from ._tracked import Tracked
from ._unwritten import UnwrittenGrad, UnwrittenGrads


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
        tracked: the parameters.
        exchange: called once per step, before the observers see the moments. None: there is only
            this process.
        has_opened, has_reached: whether any context was opened, or reached a parameter, before.
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
        self.tracked = Tracked()
        self.has_opened = False
        self.has_reached = False
        self._hooks = Hooks(self)
        self._unwritten: UnwrittenGrads | None = None
        self._excused = False  # an error has been raised, whose remedy is zero_grad()
        self._told_of_drop = False
        self._scaler: torch.amp.GradScaler | None = None
        self._holds_grads = False  # whether this object wrote .grad
        self._shown: list[tuple[Tensor, int]] = []  # .grad for GradScaler, and its version
        self.is_unscaled = False  # the scale has been divided out of .grad
        self.owes_hooks = False  # of parameters, which have not seen the gradients

    @property
    def owner(self) -> Owner:
        """The optimizer or Agreement that provides the parameters and rules."""
        return cast(Owner, self._owner())

    @property
    def slots(self) -> dict[int, tuple[int, int]]:
        """The number of the group of each parameter and its index there, by its id."""
        return self.tracked.slots

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
            RuntimeError: another context is open, also one of another step over one of the
                parameters; the step is broken or its gradients are written or changed; the scaler
                or the parameters have changed; or a parameter has a ``.grad`` from outside.
        """
        self._require_open_to_more()
        try:
            self._open(context)
        except RuntimeError:
            opened.remove(self)
            self.excuse()
            raise

    def _open(self, context: Context) -> None:
        if self.environments:
            if self._clears_grads and self._scaler is not context.grad_scaler:
                raise RuntimeError("environment: expected the same grad_scaler in all environments")
            self.groups()
            self.require_untouched("environment")
        self._prepare()
        opened.add(self)
        if self._clears_grads:
            self._clear_grads()
        self._scaler = context.grad_scaler if self._clears_grads else None
        self.context, self.state, self.has_opened = context, State.OPEN, True

    def add_environments(self, count: int) -> None:
        """Count environments whose gradients have been added to the moments."""
        for moments in self.moments:
            moments._end_environments(count)
        self.environments += count

    def close(self) -> None:
        """End the context: all of its environments are complete."""
        opened.remove(self)
        self.context, self.state = None, State.PENDING
        if self._scaler is None:
            self._put_stand_ins()
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
        opened.remove(self)
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
            self.excuse()
            raise RuntimeError(
                f"{caller}: expected {expected} environments since the last step, but got "
                f"{self.environments} (left over from a skipped step? call zero_grad() to drop "
                "them)"
            )

    def require_closed(self, caller: str, *, may_wait: bool = False) -> None:
        """Raise if a context is open; with ``may_wait`` only if it has received a gradient."""
        if self.context is not None and (self.context.started or not may_wait):
            also = ", or before its backward pass" if may_wait else ""
            raise RuntimeError(f"{caller}: expected to be called outside of an environment{also}")

    def require_untouched(self, caller: str) -> None:
        """Raise if ``.grad`` has changed since the last environment."""
        if self._is_touched():
            self.excuse()
            expected = (
                "clipping and other changes after all environments of a step; call zero_grad() "
                if self._scaler is None
                else "optimizer.write_grads() before grad_scaler.unscale_(optimizer) and clipping; "
                "call zero_grad() and grad_scaler.update() "
            )
            raise RuntimeError(
                f"{caller}: .grad has been changed since the last environment; expected {expected}"
                "to start the step again"
            )

    def _is_touched(self) -> bool:
        if self._unwritten is not None and self._unwritten.changed():
            return True
        states = getattr(self._scaler, "_per_optimizer_states", {})
        stage = states.get(id(self._owner()), {}).get("stage")
        unscaled = getattr(stage, "name", None) == "UNSCALED"
        return unscaled or any(grad._version != version for grad, version in self._shown)

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The scaler of the losses of this step, or None."""
        return self._scaler

    def groups(self) -> list[Group]:
        """Return parameters, moments and rule of each group."""
        rules = self.owner._rules()
        if self.environments:
            self.tracked.require_unchanged(rules)
        return [
            Group(params, moments, rule)
            for (params, rule), moments in zip(rules, self.moments, strict=True)
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
        if self.exchange is None:
            warn_of_processes(self._owner())
        return groups

    def settle(self, caller: str) -> None:
        """Take over changes of ``.grad`` since the last environment; raise if it is foreign."""
        if self.state is not State.PENDING or self._unwritten is None:
            return
        for param in self.tracked.params:
            if param.grad is not None and not self._unwritten.holds(param):
                self._refuse_grad(caller, param)
        if self._unwritten.settle():
            self.wrote_grads()

    def reaches(self) -> bool:
        """Return whether any environment of this step has reached a parameter."""
        return any(moments._touched for moments in self.moments)

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
        self.has_reached |= self.reaches()
        if not keep_moments:
            for moments in self.moments:
                moments.reset()
        if self._unwritten is not None:
            self._unwritten.clear()
        self.state, self.environments, self._exchanged = State.IDLE, 0, False
        self._scaler, self._shown, self.is_unscaled, self.owes_hooks = None, [], False, False
        self._unwritten, self._excused = None, False

    def drop(self) -> bool:
        """Drop the environments. Return whether this object wrote ``.grad``.

        A context that is open goes on, with the first environment of a new step.
        """
        scaler = self._scaler
        self.finish()
        if self.context is not None:
            self.state, self._scaler = State.OPEN, scaler
        held, self._holds_grads = self._holds_grads, False
        return held

    def excuse(self) -> None:
        """Record that an error has been raised, so environments are dropped for a reason."""
        self._excused = True

    def warn_of_drop(self) -> None:
        """Warn once if complete environments are about to be dropped without a reason."""
        # After write_grads() or clipping, dropping is how a loop skips a step.
        whole = self.state in (State.PENDING, State.OPEN) and self.environments > 0
        if whole and not (self._excused or self._told_of_drop or self._is_touched()):
            self._told_of_drop = True
            warn_of_drop(self._owner(), self.environments)

    def replace_moments(self) -> None:
        """Drop the environments and the moments, which the next context creates again."""
        self.drop()
        self.moments = []

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
        self._put_stand_ins()

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
        for param in self.tracked.params:
            if param.grad is not None:
                if not (self._holds_grads or isinstance(param.grad, UnwrittenGrad)):
                    self._refuse_grad("environment", param)
                param.grad = None
        self._holds_grads = False

    def _refuse_grad(self, caller: str, param: Tensor) -> NoReturn:
        raise RuntimeError(
            f"{caller}: {self.tracked.name(param)} has a .grad from outside of an environment; put "
            "each backward pass inside `with optimizer.environment():`, and call zero_grad() first"
        )

    def _put_stand_ins(self) -> None:
        if self._clears_grads:
            if self._unwritten is None:
                self._unwritten = UnwrittenGrads(self._owner)
            for moments in self.moments:
                self._unwritten.put(moments._params[index] for index in moments._touched)

    def _prepare(self) -> None:
        """Create moments and hooks for the current groups."""
        if self.environments == 0:
            groups = self.owner._rules()
            observed = {kind for observer in self._observers for kind in observer.kinds}
            wanted = [observed.union(rule.moments or ()) for _, rule in groups]
            kinds = [tuple(kind for kind in KINDS if kind in some) for some in wanted]
            same_kinds = [moments.kinds for moments in self.moments] == kinds
            if not (same_kinds and self.tracked.are(groups)):
                self.moments = [
                    Moments(params, kept, _frozen=True)
                    for (params, _), kept in zip(groups, kinds, strict=True)
                ]
                self._hooks.detach()  # an id may belong to another parameter by now
                self.tracked = Tracked(groups)
            self.tracked.begin()
            wishes = [observer.begin() for observer in self._observers]  # all of them are told
            for moments in self.moments:
                moments.reset()
                moments._observed = any(wishes)
        if self._clears_grads:
            self._hooks.attach(self.tracked.params)
