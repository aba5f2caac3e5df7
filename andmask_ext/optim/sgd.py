"""Stochastic gradient descent along aggregated gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .._checks import check_bool
from ..rules import Rule
from ._base import EnvironmentOptimizer
from ._checks import (
    check_lr,
    check_range,
    check_torch_options,
    check_weight_decay,
    decay_after_mask,
)
from ._state import average_of
from ._updates import Arguments

__all__ = ["AndMaskSGD"]


class AndMaskSGD(EnvironmentOptimizer):
    r"""SGD along the gradient that a rule aggregates over environments.

    The update is that of :class:`torch.optim.SGD`, with the aggregated gradient instead of the
    mean gradient. Each param group may have its own options. State (``momentum_buffer``) is float32
    for 16-bit parameters.

    Args:
        params: parameters or dicts of groups.
        lr: learning rate, a number or a tensor of one element.
        momentum: factor of the momentum buffer.
        dampening: the momentum buffer adds ``1 - dampening`` times the gradient.
        weight_decay: factor of the L2 penalty or of the decoupled decay.
        nesterov: Nesterov momentum; needs a momentum and no dampening.
        maximize: maximize the loss instead of minimizing it.
        tau: agreement threshold of the AND-mask in [0, 1]. 0 averages, 1 asks for unanimity. It
            has no default: on noisy gradients a threshold near 1 freezes the model.
        rescale: divide each parameter's update by the share of its coordinates that are kept.
        fdr, significance, zeros: a threshold that sets itself, instead of ``tau``, and what a zero
            is: see :class:`andmask_ext.AndMask`.
        rule: a rule on moments, instead of an AND-mask. A param group may have its own ``"tau"``,
            ``"fdr"``, ``"significance"`` or ``"rule"``. For example,
            ``rule=andmask_ext.rules.Mean()`` excludes a group of biases from the vote.
        weight_decay_mode: ``"after_mask"`` adds ``weight_decay * param`` to the aggregated
            gradient, so coordinates without agreement shrink too, as the paper's authors advise.
            ``"before_mask"`` adds it to the gradient of each environment, so it takes part in the
            vote. ``"decoupled"`` multiplies the parameter by ``1 - lr * weight_decay``.
        max_norm: largest norm of the aggregated gradient of all parameters of all groups, above 0.
            It is clipped between the rule and the update, as by
            :func:`torch.nn.utils.clip_grad_norm_`, but is not written. None: it is not.
            ``float("inf")`` only measures the norm, which ``grad_norm`` holds after each step. It
            can be changed between steps, ``optimizer.max_norm = ...``. No state holds it.
        expected_environments: if set, ``step()`` raises unless exactly this many environments were
            accumulated.
        foreach, fused: accepted as in torch. They change nothing: a step is one fused pass.
        capturable, differentiable: only False, as in torch.

    Raises:
        TypeError: an option has the wrong type, or the rule needs all gradients at once.
        ValueError: an option lies outside its range, or not exactly one of ``tau``, ``fdr``,
            ``significance`` and ``rule`` is given.

    Example:
        >>> import torch, andmask_ext as am
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = am.optim.AndMaskSGD([weight], lr=0.1, tau=1.0)
        >>> for x in torch.tensor([[1.0, -2.0], [3.0, 4.0]]):
        ...     with optimizer.environment():
        ...         (weight * x).sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.8000, 1.0000])

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.3.
    """

    _needed_state = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        tau: float | None = None,
        rescale: bool = False,
        fdr: float | None = None,
        significance: float | None = None,
        zeros: str = "count",
        rule: Rule | None = None,
        weight_decay_mode: str = "after_mask",
        max_norm: float | None = None,
        expected_environments: int | None = None,
    ) -> None:
        check_torch_options(type(self).__name__, foreach, fused, capturable, differentiable)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "tau": tau,
            "rescale": rescale,
            "fdr": fdr,
            "significance": significance,
            "zeros": zeros,
            "rule": rule,
            "weight_decay_mode": weight_decay_mode,
        }
        super().__init__(params, defaults, expected_environments, max_norm)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_lr(group)
        check_range(group, "momentum", 0.0)
        check_range(group, "dampening", float("-inf"))
        check_weight_decay(group)
        for name in ("nesterov", "maximize"):
            check_bool(name, group[name])
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                "nesterov: expected a momentum and no dampening, but got "
                f"momentum={group['momentum']}, dampening={group['dampening']}"
            )

    def _step_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        arguments: Arguments,
        grad_scale: Tensor | None,
    ) -> None:
        momentum = float(group["momentum"])
        started = [self.state[p].get("momentum_buffer") is not None for p in params]
        for first in (True, False):
            chosen = [i for i, has in enumerate(started) if has is not first]
            if momentum == 0:
                chosen = list(range(len(params))) if first else []
            if not chosen:
                continue
            states = [self._state_of(params[i], group) for i in chosen]
            buffers = [state["momentum_buffer"] for state in states] if momentum else []
            lists = [[moment[i] for i in chosen] if moment else [] for moment in arguments[:4]]
            torch.ops.andmask._sgd_step_.default(
                [params[i] for i in chosen],
                buffers,
                *lists,
                *arguments[4:],
                lr=float(group["lr"]),
                momentum=momentum,
                dampening=float(group["dampening"]),
                weight_decay=float(decay_after_mask(group)),
                decoupled_weight_decay=group["weight_decay_mode"] == "decoupled",
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                first_step=first,
                grad_scale=grad_scale,
            )

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if group["momentum"]:
            average_of(state, "momentum_buffer", param)
        return state
