"""What all optimizers here share: environments in, one step out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._checks import check_bool, check_dtype, check_tau, check_weight
from .._devices import by_device
from .._pending import Group, PendingStep, State
from ..rules import AndMask, Mean, Rule
from ._amp import overflowed
from ._environment import Environment
from ._state import load_wide_state

WEIGHT_DECAYS = ("before_mask", "after_mask", "decoupled")


def require_one(tau: object, rescale: object, rule: object) -> None:
    """Raise unless there is a threshold or a rule, and not both.

    Raises:
        ValueError: both are given, or neither; or ``rescale`` beside a rule, which has its own.
    """
    if tau is None and rule is None:
        raise ValueError(
            "tau: expected a threshold in [0, 1] (0 averages, 1 asks for unanimity), or rule=..., "
            "but got neither"
        )
    if rule is not None and (tau is not None or rescale is True):
        name, value = ("rescale", rescale) if tau is None else ("tau", tau)
        raise ValueError(
            f"{name}: expected tau (with rescale) or rule, but got {name}={value} beside "
            f"rule={rule}; say it in the rule: rule=AndMask(tau, rescale)"
        )


def check_rule(rule: object) -> None:
    """Raise TypeError unless ``rule`` is a rule that needs no more than moments."""
    if not isinstance(rule, Rule):
        raise TypeError(
            "rule: expected a rule such as andmask_ext.AndMask(tau=0.8), "
            f"but got {rule.__name__ if isinstance(rule, type) else type(rule).__name__}"
        )
    if rule.moments is None:
        raise TypeError(
            f"rule: expected a rule on moments, but {rule} needs the gradients of all "
            "environments at once; use andmask_ext.backward with it"
        )


class EnvironmentOptimizer(Optimizer):
    """Base: gradients come in environments, a rule aggregates them, ``step`` applies the update.

    Subclasses say what a step is in ``_step_group``.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler hands scale and overflow to step()

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        defaults: dict[str, Any],
        expected_environments: int | None,
    ) -> None:
        expected = expected_environments
        if expected is not None and (not isinstance(expected, int) or expected < 1):
            raise ValueError(
                f"expected_environments: expected a positive int or None, but got {expected!r}"
            )
        self._expected = expected
        self._pending = PendingStep(self, clears_grads=True)
        super().__init__(params, defaults)

    # ---- the rule of a group ----

    def _rule(self, group: dict[str, Any]) -> Rule:
        tau, rule = group["tau"], group["rule"]
        require_one(tau, group["rescale"], rule)  # groups may be changed between steps
        return AndMask(tau, group["rescale"]) if rule is None else rule

    def _rules(self) -> list[tuple[list[Tensor], Rule]]:
        return [(group["params"], self._rule(group)) for group in self.param_groups]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as :meth:`torch.optim.Optimizer.add_param_group`.

        A group with a ``"rule"`` of its own does not take ``tau`` and ``rescale`` of the optimizer,
        and one with its own ``"tau"`` not its rule.

        Raises:
            TypeError: a parameter or an option of the group has another type.
            ValueError: an option of the group lies outside its range, or it has ``"tau"`` and
                ``"rule"``.
        """
        self._require_no_environments()
        if isinstance(param_group, dict):
            self._override_rule(param_group)
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @staticmethod
    def _override_rule(group: dict[str, Any]) -> None:
        """Let what a group says of its rule replace all that the defaults say of it."""
        if group.get("rule") is not None:
            require_one(group.get("tau"), group.get("rescale"), group["rule"])
            group["tau"], group["rescale"] = None, False
        elif group.get("tau") is not None:
            group["rule"] = None

    def _require_no_environments(self) -> None:
        if self._pending.environments:
            raise RuntimeError(
                "add_param_group: expected no environments since the last step, but got "
                f"{self._pending.environments}; call step() or zero_grad() first"
            )

    def _check_group(self, group: dict[str, Any]) -> None:
        for index, param in enumerate(group["params"]):
            check_dtype(f"params[{index}]", param)
        if group["rule"] is not None:
            check_rule(group["rule"])
        elif group["tau"] is not None:
            check_tau(group["tau"])
            check_bool("rescale", group["rescale"])
        self._rule(group)  # raises unless there is one of both

    # ---- environments ----

    def environment(
        self,
        *,
        weight: float = 1.0,
        micro_batches: int | None = 1,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> Environment:
        """Return a context: the backward pass inside gives the gradient of one environment.

        Each parameter's gradient is added to the moments, and freed, as soon as it is complete.
        Environments accumulate until :meth:`step` or :meth:`zero_grad`. ``.grad`` is None between
        them.

        Args:
            weight: a factor for the environment's gradient, as if its loss had been multiplied by
                it; positive.
            micro_batches: how many backward passes the environment consists of; their gradients add
                up before they vote. None: any number; gradients are then consumed only at the end
                of the context.
            grad_scaler: the :class:`torch.amp.GradScaler` whose ``scale`` the loss goes through.
                Gradients are unscaled before they vote or enter any sum. Call
                ``grad_scaler.step(optimizer)`` afterwards.

        Raises:
            RuntimeError: inside another environment; after :meth:`write_grads` without
                :meth:`step`; after an environment that raised; a ``.grad`` from outside an
                environment is present; a parameter gets more gradients than ``micro_batches``, or
                none of them gets any.
            ValueError: ``weight`` is not positive and finite, or ``micro_batches`` not positive.
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
        """Write the aggregated gradients to ``.grad``, to be looked at or clipped before step().

        ``step`` then uses ``.grad``. The order is: environments, ``write_grads``, (with a
        ``GradScaler`` ``grad_scaler.unscale_(optimizer)``, as after any scaled backward pass),
        clipping, step. A parameter that no environment has touched keeps ``.grad = None``.

        Raises:
            RuntimeError: there is no environment, or not as many as ``expected_environments``, or
                one of them raised.
        """
        pending = self._pending
        pending.require_complete("write_grads", self._expected)
        if pending.state is not State.WRITTEN:
            pending.require_untouched("write_grads")
            scale = 1.0 if pending.scaler is None else pending.scaler.get_scale()
            self._write_grads(pending.complete(), scale)
            pending.wrote_grads()

    def _write_grads(self, groups: list[Group], scale: float) -> None:
        for params, moments, rule in groups:
            updates = rule.update(moments)
            present = [update for update in updates if update is not None]
            if present and scale != 1:
                torch._foreach_mul_(present, scale)
            for param, update in zip(params, updates, strict=True):
                param.grad = update

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Aggregate the environments and update the parameters, in one pass over memory.

        Args:
            closure: runs the environments again and returns a loss, which is returned.

        Raises:
            RuntimeError: there is no environment since the last step, or not as many as
                ``expected_environments``, or one of them raised, or a ``GradScaler`` was used
                otherwise than :meth:`environment` says.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pending = self._pending
        try:
            pending.require_complete("step", self._expected)
            overflow = overflowed(self, pending)
        except RuntimeError:
            for name in ("grad_scale", "found_inf"):  # GradScaler would trip over them later
                self.__dict__.pop(name, None)
            raise
        if overflow:
            if pending.drop():
                Optimizer.zero_grad(self, set_to_none=True)
            return loss
        groups = pending.complete()
        pending.observe(groups)
        self._update(groups)
        pending.finish()
        return loss

    def _update(self, groups: list[Group]) -> None:
        """Move the parameters of all groups."""
        written = self._pending.state is State.WRITTEN
        for options, (params, moments, rule) in zip(self.param_groups, groups, strict=True):
            indices = moments._touched
            if written:
                indices = [index for index in indices if params[index].grad is not None]
            for places in by_device([params[index] for index in indices]):
                chosen = [indices[place] for place in places]
                moved = [params[index] for index in chosen]
                if written:
                    grads = [param.grad for param in moved]
                    arguments: tuple[Any, ...] = (grads, [], [], [], 1, Mean.name, [], False)
                else:
                    arguments = rule._native_arguments(moments, chosen)
                self._step_group(options, moved, arguments)
                torch.autograd.graph.increment_version(moved)

    def _step_group(
        self, group: dict[str, Any], params: list[Tensor], arguments: tuple[Any, ...]
    ) -> None:
        """Move parameters by what the rule makes of moments: ``arguments`` of the native ops."""
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all environments since the last step, and set ``.grad`` to None.

        Args:
            set_to_none: accepted for compatibility; ``.grad`` is None between environments anyhow.
        """
        self._pending.require_closed("zero_grad")
        self._pending.drop()
        super().zero_grad(set_to_none=True)

    # ---- saving ----

    def state_dict(self) -> dict[str, Any]:
        """Return the state as :meth:`torch.optim.Optimizer.state_dict`.

        Environments since the last step are part of it, so that a run can be resumed between two
        of them.
        """
        state = super().state_dict()
        if self._pending.environments:
            state["environments"] = self._pending.state_dict()
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as :meth:`torch.optim.Optimizer.load_state_dict`.

        States of the corresponding ``torch.optim`` classes load as well; options that they lack
        keep this optimizer's values. State that is wider than its 16-bit parameter stays so.
        """
        defaults = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.param_groups
        ]
        self._pending.require_closed("load_state_dict")
        self._pending.drop()
        super().load_state_dict(state_dict)
        for group, default in zip(self.param_groups, defaults, strict=True):
            for key, value in default.items():
                group.setdefault(key, value)
        load_wide_state(self, state_dict)
        self._load_pending(state_dict)

    def _load_pending(self, state_dict: dict[str, Any]) -> None:
        self._pending.replace_moments()
        if state_dict.get("environments") is not None:
            self._pending.load_state_dict(state_dict["environments"])

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = {**super().__getstate__(), "_expected": self._expected}
        if self._pending.environments:
            state["environments"] = self._pending.state_dict()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_pending" in self.__dict__:  # torch loads a state dict
            super().__setstate__(state)
            return
        environments = state.pop("environments", None)  # unpickled or copied
        self._pending = PendingStep(self, clears_grads=True)
        super().__setstate__(state)
        self._load_pending({"environments": environments})
