"""A wrapper that gives any torch optimizer aggregated gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._devices import by_device
from .._pending import Group, State
from .._vote_test import given_levels
from ..rules import AndMask, Rule
from ._base import EnvironmentOptimizer
from ._checks import check_params
from ._rules import NO_MASK, check_rule, rule_of, rule_of_group, with_rules
from ._state import unshare
from ._updates import of_written

__all__ = ["EnvironmentWrapper"]


class EnvironmentWrapper(EnvironmentOptimizer):
    """Wrap any torch optimizer so that it steps along aggregated gradients.

    The wrapper and the wrapped optimizer share param groups and state, so a learning rate scheduler
    may take either of them. The ``step`` of the wrapped optimizer must not need a closure.

    Args:
        optimizer: an optimizer over dense floating-point parameters.
        rule: a rule on moments. A param group may have its own, under the key ``"rule"``. One with
            a level of its own keeps ``rescale`` and ``zeros`` of an AND-mask.
        tau: agreement threshold in [0, 1], instead of ``rule``: short for
            ``rule=AndMask(tau, rescale)``.
        rescale, fdr, significance, zeros: as in :class:`andmask_ext.AndMask`, for a rule made here.
        max_norm: largest norm of the aggregated gradient, as in :class:`AndMaskSGD`. The gradients
            that are written for the wrapped optimizer are clipped in place.
        expected_environments: if set, ``step()`` raises unless exactly this many environments were
            accumulated.

    Raises:
        TypeError: ``optimizer`` is no optimizer, ``rule`` is no rule, or the rule needs all
            gradients at once.
        ValueError: a level lies outside its range, ``max_norm`` is not above 0, or not exactly one
            of ``tau``, ``fdr``, ``significance`` and ``rule`` is given.

    Example:
        >>> import torch, andmask_ext as am
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> adagrad = torch.optim.Adagrad([weight], lr=0.1)
        >>> optimizer = am.optim.EnvironmentWrapper(adagrad, am.AndMask(tau=1.0))
        >>> for x in torch.tensor([[1.0, -2.0], [3.0, 4.0]]):
        ...     with optimizer.environment():
        ...         (weight * x).sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 1.0000])

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.3.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rule: Rule | None = None,
        *,
        tau: float | None = None,
        rescale: bool = False,
        fdr: float | None = None,
        significance: float | None = None,
        zeros: str = "count",
        max_norm: float | None = None,
        expected_environments: int | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer: expected a torch.optim.Optimizer, but got {type(optimizer).__name__}"
            )
        mask = {"tau": tau, "fdr": fdr, "significance": significance, "zeros": zeros}
        rule = rule_of_group({**mask, "rescale": rescale, "rule": rule})
        self.optimizer = optimizer
        defaults = {**optimizer.defaults, "rule": rule}
        super().__init__(optimizer.param_groups, defaults, expected_environments, max_norm)
        self._share()

    def _share(self) -> None:
        self.param_groups = self.optimizer.param_groups
        self.state = self.optimizer.state
        for group in self.param_groups:
            group["rule"] = rule_of(group.get("rule", self.defaults["rule"]))

    def _rules(self) -> list[tuple[list[Tensor], Rule]]:
        if "param_groups" in self.__dict__:  # a state may have been loaded into the wrapped one
            self._share()
        return [(group["params"], self._rule(group)) for group in self.param_groups]

    def _rule(self, group: dict[str, Any]) -> Rule:
        rule: Rule | None = group["rule"]
        # An option of the same name belongs to the wrapped optimizer.
        mask = {
            name: group[name] for name in NO_MASK.keys() & group.keys() - self.optimizer.defaults
        }
        if given_levels(mask) and rule == self.defaults["rule"]:
            if isinstance(rule, AndMask):  # the options hold for all groups, as in AndMaskAdam
                mask = {"rescale": rule.rescale, "zeros": rule.zeros, **mask}
            rule = None  # the group's own level replaces the rule of all groups
        return rule_of_group({**mask, "rule": rule})

    def _check_group(self, group: dict[str, Any]) -> None:
        check_params(group["params"])
        check_rule(self._rule(group))

    @staticmethod
    def _override_rule(group: dict[str, Any]) -> None:
        """Leave the group alone: ``_rule`` reads it when a step needs it."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters to the wrapped optimizer.

        Args:
            param_group: ``"params"`` and the options of the group.

        Raises:
            RuntimeError: there are environments since the last step.
            TypeError: a parameter has an unsupported dtype, or the rule is not a rule on moments.
        """
        building = not hasattr(self, "param_groups") or (
            self.param_groups is not self.optimizer.param_groups
        )
        if not building:
            self._require_no_environments()
            param_group.setdefault("rule", self.defaults["rule"])
            self.optimizer.add_param_group(param_group)
            try:
                self._check_group(self.param_groups[-1])
            except (TypeError, ValueError):
                self.param_groups.pop()
                raise
            return
        super().add_param_group(param_group)

    def _update(self, groups: list[Group]) -> None:
        if self._pending.state is not State.WRITTEN:
            self._write_grads(groups, 1.0)
            self._pending.hold_grads()  # written again, should the optimizer raise
        params = [param for group in groups for param in group.params]
        self._clip_written([param.grad for param in params if param.grad is not None])
        self.optimizer.step()
        self._clipped = []

    # Gradients and their versions; once only, should the optimizer raise and the step be repeated.
    _clipped: Sequence[tuple[Tensor, int]] = ()

    def _clip_written(self, grads: list[Tensor]) -> None:
        before = [(id(grad), version) for grad, version in self._clipped]
        if before and before == [(id(grad), grad._version) for grad in grads]:
            return
        lists = [[grads[place] for place in places] for places in by_device(grads)]
        scale = self._clip([of_written(some) for some in lists])
        if scale is not None:
            for some in lists:
                torch._foreach_mul_(some, scale.to(some[0].device))
            self._clipped = [(grad, grad._version) for grad in grads]

    def _make_state(self) -> None:
        self.optimizer.step()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Aggregate the environments, and let the wrapped optimizer step along the result.

        Hooks for the steps of all optimizers run once, in the step of the wrapped optimizer, where
        ``.grad`` is there. Hooks of this object run before the first and after the last thing.

        Args:
            closure: runs the environments again and returns a loss.

        Returns:
            The loss of ``closure``; None without one.

        Raises:
            RuntimeError: as :meth:`EnvironmentOptimizer.step`.
        """
        args: tuple[Any, ...] = (closure,)
        kwargs: dict[str, Any] = {}
        for before in self._optimizer_step_pre_hooks.values():
            args, kwargs = before(self, args, kwargs) or (args, kwargs)
        with torch.no_grad():
            loss = self._step(*args, **kwargs)
        for after in self._optimizer_step_post_hooks.values():
            after(self, args, kwargs)
        return loss

    step.hooked = True  # type: ignore[attr-defined]  # torch then adds no hooks of all optimizers

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as :meth:`torch.optim.Optimizer.load_state_dict`.

        The hooks of this object run around those of the wrapped optimizer.
        """
        self._pending.require_closed("load_state_dict")
        rules = [group["rule"] for group in self.param_groups]
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        state_dict["param_groups"] = with_rules(state_dict["param_groups"])
        self.optimizer.load_state_dict(state_dict)
        for group, rule in zip(self.optimizer.param_groups, rules, strict=True):
            group.setdefault("rule", rule)
        self._share()
        unshare(self, state_dict)
        self._pending.drop()
        self._load_pending(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizer": self.optimizer}
