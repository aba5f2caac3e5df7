"""Any torch optimizer on aggregated gradients."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from ..rules import AndMask, Rule
from ._base import EnvironmentOptimizer
from ._environment import Environment

__all__ = ["EnvironmentWrapper"]


class EnvironmentWrapper(EnvironmentOptimizer):
    """Wrap any torch optimizer so that a rule over environments makes its gradients.

    The wrapped optimizer's param groups and state are shared: learning rate schedulers may be given
    either of the two. Its ``step`` must not need a closure.

    Args:
        optimizer: an optimizer over dense floating-point parameters.
        rule: a rule on moments; a param group may have its own, under the key ``"rule"``.
        environments: if given, ``step`` raises where another number came since the last step.

    Raises:
        TypeError: ``optimizer`` is no optimizer, ``rule`` is no rule, or one that needs whole
            columns.

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
        environments: int | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer: expected a torch.optim.Optimizer, but got {type(optimizer).__name__}"
            )
        self.optimizer = optimizer
        rule = AndMask() if rule is None else rule
        super().__init__(optimizer.param_groups, {**optimizer.defaults, "rule": rule}, environments)
        self._share()

    def _share(self) -> None:
        self.param_groups = self.optimizer.param_groups
        self.state = self.optimizer.state
        for group in self.param_groups:
            group.setdefault("rule", self.defaults["rule"])

    def _enter(self, environment: Environment) -> None:
        self._share()  # a state may have been loaded into the wrapped optimizer itself
        super()._enter(environment)

    def _rule(self, group: dict[str, Any]) -> Rule:
        rule: Rule = group["rule"]
        return rule

    def _check_group(self, group: dict[str, Any]) -> None:
        if group["rule"] is None:
            raise TypeError("rule: expected a rule such as andmask_ext.AndMask(), but got NoneType")
        super()._check_group(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters to the wrapped optimizer.

        Raises:
            TypeError: the rule of the group is none on moments.
        """
        building = not hasattr(self, "param_groups") or (
            self.param_groups is not self.optimizer.param_groups
        )
        if not building:
            param_group.setdefault("rule", self.defaults["rule"])
            self._check_group(param_group)
            self._require_no_environments()
            self.optimizer.add_param_group(param_group)
            return
        super().add_param_group(param_group)

    def _update(self) -> None:
        if not self._resolved:
            self._write_grads(1.0)
        self.optimizer.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as :meth:`torch.optim.Optimizer.load_state_dict`."""
        self._forget()
        rules = [group["rule"] for group in self.param_groups]
        pending = state_dict.get("environments")
        self.optimizer.load_state_dict(state_dict)
        self._share()
        for group, rule in zip(self.param_groups, rules, strict=True):
            group.setdefault("rule", rule)
        self._moments = []
        if pending is not None:
            self._load_pending(pending)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizer": self.optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()
