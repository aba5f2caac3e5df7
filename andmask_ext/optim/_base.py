"""Base class of the optimizers: it collects environments and takes one step with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._checks import check_weight
from .._notices import warn_if_nothing_is_masked, warn_once
from .._pending import Group, PendingStep, State, show_to_hooks
from .._vote_test import LEVELS, given_levels
from ..rules import Rule
from ._amp import overflowed
from ._checks import check_params, warn_of_typos
from ._clip import ClipsNorm
from ._environment import ContextMethod, Environment
from ._rules import NO_MASK, check_rule, require_one, rule_of_group, with_plain_rules
from ._state import load_state, makes_only_state
from ._updates import Arguments, updates_of


class EnvironmentOptimizer(ClipsNorm, Optimizer):
    """Base class of optimizers that aggregate the gradients of environments by a rule.

    Each ``environment()`` context adds one gradient per parameter. ``step`` aggregates them and
    updates the parameters. Subclasses implement the update in ``_step_group``.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler hands scale and overflow to step()

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        defaults: dict[str, Any],
        expected_environments: int | None,
        max_norm: float | None = None,
    ) -> None:
        expected = expected_environments
        if expected is not None and (not isinstance(expected, int) or expected < 1):
            raise ValueError(
                f"expected_environments: expected a positive int or None, but got {expected!r}"
            )
        self._expected = expected
        self._pending = PendingStep(self, clears_grads=True)
        self.grad_norm, self.max_norm = None, max_norm
        super().__init__(params, defaults)

    # ---- the rule of a group ----

    def _rule(self, group: dict[str, Any]) -> Rule:
        return rule_of_group(group)  # groups may be changed between steps

    def _rules(self) -> list[tuple[list[Tensor], Rule]]:
        return [(group["params"], self._rule(group)) for group in self.param_groups]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as :meth:`torch.optim.Optimizer.add_param_group`.

        A group that has its own ``"rule"`` ignores the optimizer's AND-mask. A group that has its
        own ``"tau"``, ``"fdr"`` or ``"significance"`` ignores the optimizer's others and ``rule``.

        Args:
            param_group: ``"params"`` and the options of the group. Other options take their
                defaults from the optimizer.

        Raises:
            RuntimeError: there are environments since the last step.
            TypeError: a parameter or an option of the group has the wrong type.
            ValueError: an option of the group lies outside its range, or it has several of
                ``"tau"``, ``"fdr"``, ``"significance"`` and ``"rule"``.
        """
        self._require_no_environments()
        if isinstance(param_group, dict):
            warn_of_typos(self, param_group)
            self._override_rule(param_group)
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @staticmethod
    def _override_rule(group: dict[str, Any]) -> None:
        """Replace the default rule by the group's own, if it has one."""
        levels = given_levels(group)
        if group.get("rule") is not None:
            require_one(group)
            group.update(NO_MASK)
        elif levels:
            require_one(group)
            group.update({**dict.fromkeys(LEVELS), **levels, "rule": None})

    def _require_no_environments(self) -> None:
        if self._pending.environments:
            raise RuntimeError(
                "add_param_group: expected no environments since the last step, but got "
                f"{self._pending.environments}; call step() or zero_grad() first"
            )

    def _check_group(self, group: dict[str, Any]) -> None:
        check_params(group["params"])
        check_rule(self._rule(group))  # raises unless exactly one is set

    # ---- environments ----

    @ContextMethod
    def environment(
        self,
        *,
        weight: float = 1.0,
        micro_batches: int | None = 1,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> Environment:
        """Return a context. The backward pass inside it gives the gradient of one environment.

        Each gradient is added to the moments and freed as soon as it is complete. Environments
        accumulate until :meth:`step` or :meth:`zero_grad`. An environment that reaches no parameter
        counts, and votes for neither side. Between contexts ``.grad`` holds a stand-in without
        memory. Reading it writes the aggregated gradients, as :meth:`write_grads` does.

        Args:
            weight: positive factor of the environment's gradient. It acts like a factor of the
                loss.
            micro_batches: number of backward passes in the environment. Their gradients are summed
                before they vote. None allows any number: gradients are then held until the context
                ends.
            grad_scaler: the :class:`torch.amp.GradScaler` that scaled the loss. Gradients are
                unscaled before they vote or enter any sum. Call ``grad_scaler.step(optimizer)``
                afterwards.

        Raises:
            RuntimeError: it is opened inside another environment, after :meth:`write_grads` without
                :meth:`step`, or after an environment that raised; the context of another optimizer
                over the same parameters is open; a parameter has a ``.grad`` from outside, or its
                ``.grad`` has been changed since the last environment; a parameter was replaced or
                cast since; a parameter gets more than ``micro_batches`` gradients; or an optimizer
                over the same parameters steps inside.
            ValueError: ``weight`` is not positive and finite, or ``micro_batches`` is not positive.
            TypeError: a gradient is sparse.
        """
        check_weight(weight)
        if micro_batches is not None and (not isinstance(micro_batches, int) or micro_batches < 1):
            raise ValueError(
                f"micro_batches: expected a positive int or None, but got {micro_batches!r}"
            )
        if grad_scaler is not None and not grad_scaler.is_enabled():
            grad_scaler = None
        return Environment(self._pending, self, weight, micro_batches, grad_scaler)

    # ---- from moments to parameters ----

    @torch.no_grad()
    def write_grads(self) -> None:
        """Write the aggregated gradients to ``.grad``, and let the next ``step`` use ``.grad``.

        Without a ``GradScaler`` this happens by itself when a ``.grad`` is read or clipped after
        the last environment. With one, the order is: environments, ``write_grads``,
        ``grad_scaler.unscale_(optimizer)``, clipping, ``grad_scaler.step(optimizer)``. A parameter
        that no environment reached keeps ``.grad = None``.

        Raises:
            RuntimeError: their number is not ``expected_environments``, one of them raised, or
                there is none, under the conditions of :meth:`step`.
        """
        pending = self._pending
        if self._has_nothing_to_do("write_grads"):
            return
        pending.require_complete("write_grads", self._expected)
        pending.settle("write_grads")
        if pending.state is not State.WRITTEN:
            pending.require_untouched("write_grads")
            scale = 1.0 if pending.scaler is None else pending.scaler.get_scale()
            self._write_grads(pending.complete(), scale)
            pending.wrote_grads()

    def _write_unread(self) -> None:
        """Write the gradients of the environments so far, as somebody reads ``.grad``."""
        self._pending.require_complete(".grad", self._expected)
        self._write_grads(self._pending.complete(), 1.0)
        self._pending.hold_grads()

    def _has_nothing_to_do(self, caller: str, closure: object = None) -> bool:
        """Return whether a step has no environments, as its batch did not reach the optimizer.

        Raises:
            RuntimeError: there are gradients, or there never was an environment: one was forgotten.
        """
        pending = self._pending
        if pending.state is not State.IDLE or pending.environments:
            return False
        has_grads = any(p.grad is not None for group in self.param_groups for p in group["params"])
        took_part = pending.has_opened or bool(self.state)
        if took_part and not has_grads and self._expected is None:
            return True
        where = "each backward pass" if closure is None else "each backward pass of the closure"
        raise RuntimeError(
            f"{caller}: expected at least one environment since the last step, but got 0"
            f"{' and a .grad from outside of an environment' if has_grads else ''}; put {where} "
            "inside `with optimizer.environment():`"
        )

    def _write_grads(self, groups: list[Group], scale: float) -> None:
        for params, moments, rule in groups:
            updates = rule.update(moments)
            present = [update for update in updates if update is not None]
            if present and scale != 1:
                torch._foreach_mul_(present, scale)
            for param, update in zip(params, updates, strict=True):
                param.grad = update
        if self._pending.owes_hooks:
            self._pending.owes_hooks = False
            tracked = [param for params, _, _ in groups for param in params]
            grads = [(p, p.grad) for p in tracked if p.grad is not None]
            show_to_hooks(grads, self._pending.tracked.name)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Aggregate the environments and update the parameters, in one pass over memory.

        As in torch, nothing happens where no gradient has arrived: in a step without environments,
        or whose environments have not reached a parameter. A step without environments raises if
        the optimizer has never had one, or if there is a ``.grad``: then one was forgotten.

        Args:
            closure: runs the environments again and returns a loss.

        Returns:
            The loss of ``closure``; None without one.

        Raises:
            RuntimeError: an environment was forgotten, their number is not
                ``expected_environments``, one of them raised, or a ``GradScaler`` was not used as
                :meth:`environment` describes; a parameter was replaced or cast, or got a ``.grad``
                from outside since the first environment.
        """
        return self._step(closure)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pending = self._pending
        try:
            if closure is None and makes_only_state(self, pending):
                self._make_state()
                return loss
            if self._has_nothing_to_do("step", closure):
                return loss
            pending.require_complete("step", self._expected)
            pending.settle("step")
            pending.groups()  # raises if the rule of a group is wrong, before anything moves
            overflow = overflowed(self, pending)
        except Exception:
            pending.excuse()
            for name in ("grad_scale", "found_inf"):  # left here, they break a later step
                self.__dict__.pop(name, None)
            raise
        if overflow:
            if pending.drop():
                Optimizer.zero_grad(self, set_to_none=True)
            return loss
        groups = pending.complete()
        warn_if_nothing_is_masked(self, pending.environments, [group.rule for group in groups])
        if not (pending.has_reached or pending.reaches()):
            warn_once(
                self,
                "step: expected an environment that reaches a parameter of this optimizer, but so "
                "far none did, and nothing has been updated; if that is not meant, build the "
                "optimizer over the parameters of the model that is trained, and put each backward "
                "pass inside `with optimizer.environment():`",
            )
        pending.observe(groups)
        if pending.owes_hooks and pending.state is not State.WRITTEN:
            self._write_grads(groups, 1.0)
            pending.wrote_grads()
        self._update(groups)
        pending.finish()
        return loss

    def _update(self, groups: list[Group]) -> None:
        """Update the parameters of all groups."""
        written = self._pending.state is State.WRITTEN
        updates = list(updates_of(self.param_groups, groups, written))
        scale = self._clip([update.arguments for update in updates])
        for group, params, arguments in updates:
            here = None if scale is None else scale.to(params[0].device)
            self._step_group(group, params, arguments, here)
            torch.autograd.graph.increment_version(params)

    def _step_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        arguments: Arguments,
        grad_scale: Tensor | None,
    ) -> None:
        """Update parameters along the gradient of ``arguments``, times ``grad_scale``."""
        raise NotImplementedError

    # What the state of a parameter holds, unless it is empty.
    _needed_state: tuple[str, ...] = ()

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return the state of a parameter, which is created or follows its dtype and device."""
        raise NotImplementedError

    def _make_state(self) -> None:
        """Create the state of all parameters with a ``.grad``, as a step along zero does."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._state_of(param, group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all environments since the last step, and set ``.grad`` to None.

        Call it once per step. It warns once if it drops complete environments without a reason.
        Inside a context it may come before the backward pass; the context goes on.

        Args:
            set_to_none: accepted for compatibility and ignored.
        """
        self._pending.require_closed("zero_grad", may_wait=True)
        self._pending.warn_of_drop()
        self._pending.drop()
        super().zero_grad(set_to_none=True)

    # ---- saving ----

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as :meth:`torch.optim.Optimizer.state_dict`.

        It includes the environments since the last step, so training can resume between two
        environments.
        """
        state = super().state_dict()
        state["param_groups"] = with_plain_rules(state["param_groups"])
        if self._pending.environments:
            state["environments"] = self._pending.state_dict()
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as :meth:`torch.optim.Optimizer.load_state_dict`.

        States of the corresponding ``torch.optim`` classes load as well. Options that they lack
        keep this optimizer's values. State of 16-bit parameters stays in float32.

        Raises:
            RuntimeError: it is called inside an environment.
            ValueError: the state is that of another class, or of parameters of other shapes.
        """
        self._pending.require_closed("load_state_dict")
        defaults = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.param_groups
        ]

        def finish(loaded: dict[str, Any]) -> None:
            for group, default in zip(self.param_groups, defaults, strict=True):
                if given_levels(group) or group.get("rule") is not None:
                    default |= {**NO_MASK, "rule": None}  # the state says all
                for key, value in default.items():
                    group.setdefault(key, value)
            self._pending.drop()
            self._load_pending(loaded)

        load_state(self, super().load_state_dict, state_dict, self._needed_state, finish)

    def _load_pending(self, state_dict: dict[str, Any]) -> None:
        self._pending.replace_moments()
        if state_dict.get("environments") is not None:
            self._pending.load_state_dict(state_dict["environments"])

    def __getstate__(self) -> dict[str, Any]:
        kept = {"_expected": self._expected, "_max_norm": self._max_norm}
        state: dict[str, Any] = {**super().__getstate__(), **kept}
        if self._pending.environments:
            state["environments"] = self._pending.state_dict()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_pending" in self.__dict__:  # torch loads a state dict
            super().__setstate__(state)
            return
        environments = state.pop("environments", None)  # unpickled or copied
        self._pending = PendingStep(self, clears_grads=True)
        super().__setstate__({"_max_norm": None, "grad_norm": None, **state})
        self._load_pending({"environments": environments})
