"""Adam and AdamW along aggregated gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import check_bool
from ..rules import Rule
from ._base import EnvironmentOptimizer
from ._checks import (
    check_betas,
    check_lr,
    check_range,
    check_torch_options,
    check_weight_decay,
    decay_after_mask,
)
from ._state import average_of, steps_of
from ._updates import Arguments

__all__ = ["AndMaskAdam", "AndMaskAdamW"]

AVERAGES = ("exp_avg", "exp_avg_sq")


class AndMaskAdam(EnvironmentOptimizer):
    r"""Adam along the gradient that a rule aggregates over environments.

    The update is that of :class:`torch.optim.Adam`, with the aggregated gradient instead of the
    mean gradient. One pass over memory aggregates and updates. The mask comes before Adam's
    averages, as in the authors' code, so a masked coordinate still moves by its momentum.

    State (``step``, ``exp_avg``, ``exp_avg_sq``, ``max_exp_avg_sq``) has the names of torch.optim,
    and states of torch.optim load. State of 16-bit parameters is float32.

    Args:
        params: parameters or dicts of groups.
        lr: learning rate, a number or a tensor of one element.
        betas: decay rates of the averages of the gradient and of its square, in [0, 1).
        eps: added to the denominator.
        weight_decay: factor of the L2 penalty or of the decoupled decay.
        amsgrad: use the largest average of squares so far (Reddi et al. 2018).
        maximize: maximize the loss instead of minimizing it.
        tau: agreement threshold of the AND-mask in [0, 1]. 0 averages, 1 asks for unanimity. It
            has no default: on noisy gradients a threshold near 1 freezes the model.
        rescale: divide each parameter's update by the share of its coordinates that are kept.
        fdr, significance, zeros: a threshold that sets itself, instead of ``tau``, and what a zero
            is: see :class:`andmask_ext.AndMask`.
        rule: a rule on moments, instead of an AND-mask. A param group may have its own ``"tau"``,
            ``"fdr"``, ``"significance"`` or ``"rule"``. For example,
            ``rule=andmask_ext.rules.Mean()`` excludes a group of biases from the vote.
        weight_decay_mode: ``"after_mask"``, ``"before_mask"`` or ``"decoupled"``: see
            :class:`AndMaskSGD`.
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
        >>> optimizer = am.optim.AndMaskAdam([weight], lr=0.1, tau=1.0)
        >>> for x in torch.tensor([[1.0, -2.0], [3.0, 4.0]]):
        ...     with optimizer.environment():
        ...         (weight * x).sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 1.0000])

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.3;
        Kingma and Ba, *Adam*, ICLR 2015.
    """

    _needed_state = ("step", *AVERAGES)

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
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
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
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
        check_betas(group, 2)
        check_range(group, "eps", 0.0)
        check_weight_decay(group)
        for name in ("amsgrad", "maximize"):
            check_bool(name, group[name])

    def _step_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        arguments: Arguments,
        grad_scale: Tensor | None,
    ) -> None:
        states = [self._state_of(param, group) for param in params]
        largest = [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else []
        torch.ops.andmask._adam_step_.default(
            params,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            largest,
            [state["step"] for state in states],
            *arguments,
            lr=float(group["lr"]),
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=float(group["eps"]),
            weight_decay=float(decay_after_mask(group)),
            decoupled_weight_decay=group["weight_decay_mode"] == "decoupled",
            maximize=group["maximize"],
            grad_scale=grad_scale,
        )

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        steps_of(state, param)
        for key in (*AVERAGES, *(("max_exp_avg_sq",) if group["amsgrad"] else ())):
            average_of(state, key, param)
        return state


class AndMaskAdamW(AndMaskAdam):
    r"""AdamW along the aggregated gradient: :class:`AndMaskAdam` with decoupled weight decay.

    The update is that of :class:`torch.optim.AdamW`, with the aggregated gradient instead of the
    mean gradient. All coordinates, masked or not, shrink by the factor ``1 - lr * weight_decay``.

    Arguments and errors are those of :class:`AndMaskAdam`. Only the defaults differ:
    ``weight_decay=1e-2`` and ``weight_decay_mode="decoupled"``.

    Example:
        >>> import torch, andmask_ext as am
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = am.optim.AndMaskAdamW([weight], lr=0.1, tau=1.0)
        >>> for x in torch.tensor([[1.0, -2.0], [3.0, 4.0]]):
        ...     with optimizer.environment():
        ...         (weight * x).sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.8990, 0.9990])

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.3;
        Loshchilov and Hutter, *Decoupled weight decay regularization*, ICLR 2019.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
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
        weight_decay_mode: str = "decoupled",
        max_norm: float | None = None,
        expected_environments: int | None = None,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, tau=tau,
            rescale=rescale, fdr=fdr, significance=significance, zeros=zeros, rule=rule,
            weight_decay_mode=weight_decay_mode,
            max_norm=max_norm, expected_environments=expected_environments, foreach=foreach,
            fused=fused,
            capturable=capturable, differentiable=differentiable,
        )  # fmt: skip
