"""What all optimizers here share: environments in, moments, one step out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._checks import check_bool, check_dtype, check_tau, check_weight
from .._devices import by_device
from .._observers import Observer, begin_all
from ..moments import Moments
from ..rules import AndMask, Mean, Rule
from ._environment import Environment, Hook
from ._state import load_wide_state

WEIGHT_DECAYS = ("before_mask", "after_mask", "decoupled")


class EnvironmentOptimizer(Optimizer):
    """Base: gradients come in environments, a rule aggregates them, ``step`` applies the update.

    Subclasses say what a step is in :meth:`_step_group`.
    """

    _moments: list[Moments]
    _step_supports_amp_scaling = True  # torch.amp.GradScaler hands scale and overflow to step()

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        defaults: dict[str, Any],
        environments: int | None,
    ) -> None:
        if environments is not None and (not isinstance(environments, int) or environments < 1):
            raise ValueError(
                f"environments: expected a positive int or None, but got {environments!r}"
            )
        self._expected = environments
        self._begin()
        super().__init__(params, defaults)

    # ---- the rule of a group ----

    def _rule(self, group: dict[str, Any]) -> Rule:
        rule = group["rule"]
        return AndMask(group["tau"], group["rescale"]) if rule is None else rule

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            TypeError: a parameter or an option of the group has another type.
            ValueError: an option of the group lies outside its range.
        """
        self._require_no_environments()
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _require_no_environments(self) -> None:
        if self._environments:
            raise RuntimeError(
                "add_param_group: expected no environments since the last step, "
                f"but got {self._environments}; call step() or zero_grad() first"
            )

    def _check_group(self, group: dict[str, Any]) -> None:
        for index, param in enumerate(group["params"]):
            check_dtype(f"params[{index}]", param)
        rule = group["rule"]
        if rule is None:
            check_tau(group["tau"])
            check_bool("rescale", group["rescale"])
        elif not isinstance(rule, Rule):
            raise TypeError(
                "rule: expected a rule such as andmask_ext.AndMask(), "
                f"but got {rule.__name__ if isinstance(rule, type) else type(rule).__name__}"
            )
        elif rule.moments is None:
            raise TypeError(
                f"rule: expected a rule on moments, but {rule} needs the gradients of all "
                "environments at once; use andmask_ext.backward with it"
            )

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
            RuntimeError: inside another environment; after :meth:`resolve` without :meth:`step`;
                after an environment that raised; a ``.grad`` from outside an environment is
                present; a parameter gets more gradients than ``micro_batches``, or none of them
                gets any.
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
        return Environment(self, weight, micro_batches, grad_scaler)

    def _begin(self) -> None:
        """Start from nothing."""
        self._moments = []  # one per group, while the groups stay as they are
        self._slots: dict[int, tuple[int, int]] = {}  # id of a parameter -> group, index in it
        self._hooks: dict[int, Any] = {}
        self._current: Environment | None = None
        self._observers: list[Observer] = []
        self._forget()

    def _forget(self) -> None:
        """Forget the environments; keep memory and hooks."""
        for moments in self._moments:
            moments.reset()
        self._environments = 0
        self._resolved = False
        self._broken = False
        self._scaler: torch.amp.GradScaler | None = None
        self._own_grads = False  # .grad of the parameters was put there by us
        self._shown: list[tuple[Tensor, int]] = []  # to GradScaler, in .grad; and their versions

    def _prepare(self) -> None:
        """Moments and hooks for the groups as they are now."""
        if self._environments == 0:
            kinds = [self._rule(group).moments for group in self.param_groups]
            if [tuple(m.kinds) for m in self._moments] != [
                tuple(k for k in ("votes", "squares", "logs") if k in (kind or ()))
                for kind in kinds
            ]:
                self._moments = [
                    Moments(group["params"], kind or ())
                    for group, kind in zip(self.param_groups, kinds, strict=True)
                ]
                self._slots = {
                    id(param): (g, i)
                    for g, group in enumerate(self.param_groups)
                    for i, param in enumerate(group["params"])
                }
            observed = begin_all(self._observers)
            for moments in self._moments:
                moments.observed = observed
        if len(self._hooks) < len(self._slots):
            hook = Hook(self)
            for group in self.param_groups:
                for param in group["params"]:
                    if param.requires_grad and id(param) not in self._hooks:
                        self._hooks[id(param)] = param.register_post_accumulate_grad_hook(hook)

    def _enter(self, environment: Environment) -> None:
        if self._current is not None:
            raise RuntimeError("environment: expected no environment inside another")
        if self._broken:
            raise RuntimeError(
                "environment: an environment raised an exception before it was complete; "
                "call zero_grad() to start the step again"
            )
        if self._resolved:
            raise RuntimeError(
                f"environment: {self._environments} environments are left over from a step that "
                "was skipped after resolve(); call zero_grad() to drop them, or step()"
            )
        if self._environments and self._scaler is not environment.grad_scaler:
            raise RuntimeError("environment: expected the same grad_scaler in all environments")
        if self._environments:
            self._require_untouched("environment")
        for group in self.param_groups:
            for index, param in enumerate(group["params"]):
                if param.grad is not None:
                    if not self._own_grads:
                        raise RuntimeError(
                            f"environment: parameter {index} of shape {tuple(param.shape)} has a "
                            ".grad from outside of an environment; call zero_grad() first"
                        )
                    param.grad = None
        self._own_grads = False
        self._prepare()
        self._scaler = environment.grad_scaler
        self._current = environment

    def _leave(self, environments: int = 1) -> None:
        """Close environments that are complete."""
        for moments in self._moments:
            moments.end_environments(environments)
        self._environments += environments
        if self._scaler is not None:
            # GradScaler looks for overflow in .grad; it sees the sums, where every one shows. A sum
            # may be beyond float16 where the mean is not: of it, only whether it is finite.
            self._shown = []
            for group, moments in zip(self.param_groups, self._moments, strict=True):
                for param, total in zip(group["params"], moments.sum, strict=True):
                    if total is not None:
                        same = total.dtype == param.dtype
                        param.grad = total if same else (total * 0).to(param.dtype)
                        self._shown.append((param.grad, param.grad._version))
            self._own_grads = True

    # ---- from moments to parameters ----

    def _require_environments(self, caller: str) -> None:
        if self._current is not None:
            raise RuntimeError(f"{caller}: expected to be called outside of an environment")
        if self._broken:
            raise RuntimeError(
                f"{caller}: an environment raised an exception before it was complete; "
                "call zero_grad() to start the step again"
            )
        if self._environments == 0:
            raise RuntimeError(
                f"{caller}: expected at least one environment since the last step, but got 0; "
                "put each backward pass inside `with optimizer.environment():`"
            )
        if self._expected is not None and self._environments != self._expected:
            raise RuntimeError(
                f"{caller}: expected {self._expected} environments since the last step, but got "
                f"{self._environments} (left over from a skipped step? call zero_grad() to drop "
                "them)"
            )

    def _require_untouched(self, caller: str) -> None:
        """Raise unless the sums that GradScaler sees in .grad are what the environments made."""
        states = getattr(self._scaler, "_per_optimizer_states", {})
        unscaled = getattr(states.get(id(self), {}).get("stage"), "name", None) == "UNSCALED"
        if unscaled or any(grad._version != version for grad, version in self._shown):
            raise RuntimeError(
                f"{caller}: .grad has been changed since the last environment; expected "
                "optimizer.resolve() before grad_scaler.unscale_(optimizer) and clipping; "
                "call zero_grad() and grad_scaler.update() to start the step again"
            )

    @torch.no_grad()
    def resolve(self) -> None:
        """Write the aggregated gradients to ``.grad``, to be looked at or clipped before step().

        ``step`` then uses ``.grad``. The order is: environments, ``resolve``, (with a
        ``GradScaler`` ``grad_scaler.unscale_(optimizer)``, as after any scaled backward pass),
        clipping, step. A parameter that no environment has touched keeps ``.grad = None``.

        Raises:
            RuntimeError: there is no environment, or not as many as ``environments``, or one of
                them raised.
        """
        self._require_environments("resolve")
        if not self._resolved:
            self._require_untouched("resolve")
            self._write_grads(1.0 if self._scaler is None else self._scaler.get_scale())
            self._resolved = True

    def _write_grads(self, scale: float) -> None:
        for group, moments in zip(self.param_groups, self._moments, strict=True):
            updates = self._rule(group).resolve(moments)
            present = [update for update in updates if update is not None]
            if present and scale != 1:
                torch._foreach_mul_(present, scale)
            for param, update in zip(group["params"], updates, strict=True):
                param.grad = update
        self._own_grads = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Aggregate the environments and update the parameters, in one pass over memory.

        Args:
            closure: runs the environments again and returns a loss, which is returned.

        Raises:
            RuntimeError: there is no environment since the last step, or not as many as
                ``environments``, or one of them raised, or a ``GradScaler`` was used otherwise
                than :meth:`environment` says.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._require_environments("step")
            overflow = self._overflow()
        except RuntimeError:
            for name in ("grad_scale", "found_inf"):  # GradScaler would trip over them later
                self.__dict__.pop(name, None)
            raise
        if overflow:
            self._forget_and_clear()
            return loss
        for observer in self._observers:
            observer.end([
                (group["params"], moments, self._rule(group))
                for group, moments in zip(self.param_groups, self._moments, strict=True)
            ])  # fmt: skip
        self._update()
        own = self._own_grads
        self._forget()
        self._own_grads = own
        return loss

    def _update(self) -> None:
        """Move the parameters of all groups."""
        for group, moments in zip(self.param_groups, self._moments, strict=True):
            indices = moments.touched
            if self._resolved:
                indices = [i for i in indices if group["params"][i].grad is not None]
            if not indices:
                continue
            for places in by_device([group["params"][i] for i in indices]):
                self._step_some(group, moments, [indices[place] for place in places])

    def _step_some(self, group: dict[str, Any], moments: Moments, indices: list[int]) -> None:
        params = [group["params"][i] for i in indices]
        if self._resolved:
            grads = [param.grad for param in params]
            arguments: tuple[Any, ...] = (grads, [], [], [], 1, Mean.name, [], False)
        else:
            arguments = moments.arguments(self._rule(group), indices)
        self._step_group(group, params, arguments)
        torch.autograd.graph.increment_version(params)

    def _step_group(
        self, group: dict[str, Any], params: list[Tensor], arguments: tuple[Any, ...]
    ) -> None:
        """Move parameters by what the rule makes of moments: ``arguments`` of the native ops."""
        raise NotImplementedError

    def _overflow(self) -> bool:
        """Settle with GradScaler; whether any environment overflowed."""
        found_inf = getattr(self, "found_inf", None)
        scale = getattr(self, "grad_scale", None)
        if found_inf is None:
            if self._scaler is not None:
                raise RuntimeError(
                    "step: the losses were scaled, and only the GradScaler notices an overflow; "
                    "call grad_scaler.step(optimizer)"
                )
            return False
        if self._scaler is None:
            raise RuntimeError(
                "step: expected `with optimizer.environment(grad_scaler=scaler):` around the "
                "backward passes of losses that a GradScaler has scaled"
            )
        if float(found_inf) != 0:
            return True
        if self._resolved:
            if scale is not None:  # grad_scaler.unscale_ was not called
                grads = [p.grad for group in self.param_groups for p in group["params"]]
                torch._foreach_mul_([g for g in grads if g is not None], 1 / float(scale))
        elif scale is None:
            raise RuntimeError(
                "step: expected optimizer.resolve() before grad_scaler.unscale_(optimizer): "
                "there are no gradients to unscale yet"
            )
        return False

    def _forget_and_clear(self) -> None:
        own = self._own_grads
        self._forget()
        if own:
            Optimizer.zero_grad(self, set_to_none=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all environments since the last step, and set ``.grad`` to None.

        Args:
            set_to_none: accepted for compatibility; ``.grad`` is None between environments anyhow.
        """
        if self._current is not None:
            raise RuntimeError("zero_grad: expected to be called outside of an environment")
        self._forget()
        super().zero_grad(set_to_none=True)

    # ---- saving ----

    def state_dict(self) -> dict[str, Any]:
        """Return the state as :meth:`torch.optim.Optimizer.state_dict`.

        Environments since the last step are part of it, so that a run can be resumed between two
        of them.
        """
        state = super().state_dict()
        if self._environments:
            state["environments"] = self._pending()
        return state

    def _pending(self) -> dict[str, Any]:
        if self._resolved or self._broken or self._scaler is not None:
            raise RuntimeError(
                "state_dict: expected to be called before the first environment or after step(), "
                "but got a step that is resolved, broken or scaled half-way"
            )
        return {
            "count": self._environments,
            "moments": [moments.state_dict() for moments in self._moments],
        }

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
        self._forget()
        super().load_state_dict(state_dict)
        for group, default in zip(self.param_groups, defaults, strict=True):
            for key, value in default.items():
                group.setdefault(key, value)
        load_wide_state(self, state_dict)
        self._moments = []
        pending = state_dict.get("environments")
        if pending is not None:
            self._load_pending(pending)

    def _load_pending(self, pending: dict[str, Any]) -> None:
        self._prepare()
        for moments, saved in zip(self._moments, pending["moments"], strict=True):
            moments.load_state_dict(saved)
        self._environments = pending["count"]

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = {**super().__getstate__(), "_expected": self._expected}
        if self._environments:
            state["_pending_environments"] = self._pending()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        pending = state.pop("_pending_environments", None)
        if "_hooks" not in self.__dict__:  # unpickled or copied, not loading a state dict
            self._begin()
        super().__setstate__(state)
        if pending is not None:
            self._load_pending(pending)
