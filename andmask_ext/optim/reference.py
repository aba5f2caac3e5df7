"""Specification of the optimizers in plain PyTorch and float64.

Each class updates one parameter. ``step`` takes the stacked gradients ``[d, *shape]`` of d
environments and returns the new parameter. Only :class:`TemporalAndMaskAdam` takes one gradient
``[*shape]``. Tests compare the native optimizers with these classes, step by step. No other module
of the package imports this one.

Reference:
    Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.3 and
    appendix B.6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reference import clip_scale, masked_mean

__all__ = ["AndMaskAdam", "AndMaskAdamW", "AndMaskSGD", "TemporalAndMaskAdam"]


class _EnvironmentOptimizer:
    """One parameter, its weight decay, and the rule that aggregates its gradients."""

    def __init__(
        self,
        param: Tensor,
        lr: float,
        weight_decay: float,
        weight_decay_mode: str,
        maximize: bool,
        tau: float | None,
        rescale: bool,
        rule: Callable[[Tensor], Tensor] | None,
        max_norm: float | None,
        voting: dict[str, Any],
    ) -> None:
        self.max_norm = max_norm
        self.param = param.detach().double().clone()
        self.lr = lr
        self.weight_decay = weight_decay
        self.weight_decay_mode = weight_decay_mode
        self.maximize = maximize
        self.rule = rule or (lambda grads: masked_mean(grads, tau, rescale, **voting))

    def aggregate(self, grads: Tensor) -> Tensor:
        """Return the aggregated gradient, weight decay included. Apply decoupled decay."""
        grads = grads.detach().double()
        if self.maximize:
            grads = -grads
        if self.weight_decay_mode == "before_mask":  # the penalty is in every environment's loss
            return self.clip(self.rule(grads + self.weight_decay * self.param))
        grad = self.clip(self.rule(grads))
        if self.weight_decay_mode == "after_mask":  # the penalty does not vote
            return grad + self.weight_decay * self.param
        self.param -= self.lr * self.weight_decay * self.param  # "decoupled"
        return grad

    def clip(self, grad: Tensor) -> Tensor:
        """Return the gradient, of a norm of at most ``max_norm``."""
        return grad if self.max_norm is None else grad * clip_scale(grad.norm(), self.max_norm)


class AndMaskSGD(_EnvironmentOptimizer):
    """:class:`andmask_ext.optim.AndMaskSGD` for one parameter."""

    def __init__(
        self,
        param: Tensor,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        tau: float | None = None,
        rescale: bool = False,
        rule: Callable[[Tensor], Tensor] | None = None,
        weight_decay_mode: str = "after_mask",
        max_norm: float | None = None,
        **voting: Any,
    ) -> None:
        super().__init__(
            param, lr, weight_decay, weight_decay_mode, maximize, tau, rescale, rule, max_norm,
            voting,
        )  # fmt: skip
        self.momentum, self.dampening, self.nesterov = momentum, dampening, nesterov
        self.buffer: Tensor | None = None

    def step(self, grads: Tensor) -> Tensor:
        """Take one step; ``grads`` are stacked."""
        grad = self.aggregate(grads)
        if self.buffer is None:
            self.buffer = grad.clone()
        else:
            self.buffer = self.momentum * self.buffer + (1 - self.dampening) * grad
        if self.momentum == 0:
            self.param -= self.lr * grad
        elif self.nesterov:
            self.param -= self.lr * (grad + self.momentum * self.buffer)
        else:
            self.param -= self.lr * self.buffer
        return self.param


class AndMaskAdam(_EnvironmentOptimizer):
    """:class:`andmask_ext.optim.AndMaskAdam` for one parameter."""

    def __init__(
        self,
        param: Tensor,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        tau: float | None = None,
        rescale: bool = False,
        rule: Callable[[Tensor], Tensor] | None = None,
        weight_decay_mode: str = "after_mask",
        max_norm: float | None = None,
        **voting: Any,
    ) -> None:
        super().__init__(
            param, lr, weight_decay, weight_decay_mode, maximize, tau, rescale, rule, max_norm,
            voting,
        )  # fmt: skip
        self.betas, self.eps, self.amsgrad = betas, eps, amsgrad
        self.steps = 0
        self.exp_avg = torch.zeros_like(self.param)
        self.exp_avg_sq = torch.zeros_like(self.param)
        self.max_exp_avg_sq = torch.zeros_like(self.param)

    def step(self, grads: Tensor) -> Tensor:
        """Take one step; ``grads`` are stacked."""
        grad = self.aggregate(grads)
        beta1, beta2 = self.betas
        self.steps += 1
        self.exp_avg = beta1 * self.exp_avg + (1 - beta1) * grad
        self.exp_avg_sq = beta2 * self.exp_avg_sq + (1 - beta2) * grad.square()
        self.max_exp_avg_sq = torch.maximum(self.max_exp_avg_sq, self.exp_avg_sq)
        second = self.max_exp_avg_sq if self.amsgrad else self.exp_avg_sq
        mean = self.exp_avg / (1 - beta1**self.steps)
        size = (second / (1 - beta2**self.steps)).sqrt()
        self.param -= self.lr * mean / (size + self.eps)
        return self.param


class AndMaskAdamW(AndMaskAdam):
    """:class:`andmask_ext.optim.AndMaskAdamW` for one parameter."""

    def __init__(
        self,
        param: Tensor,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        tau: float | None = None,
        rescale: bool = False,
        rule: Callable[[Tensor], Tensor] | None = None,
        weight_decay_mode: str = "decoupled",
        max_norm: float | None = None,
        **voting: Any,
    ) -> None:
        super().__init__(
            param,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            tau=tau,
            rescale=rescale,
            rule=rule,
            weight_decay_mode=weight_decay_mode,
            max_norm=max_norm,
            **voting,
        )


class TemporalAndMaskAdam:
    """:class:`andmask_ext.optim.TemporalAndMaskAdam` for one parameter."""

    def __init__(
        self,
        param: Tensor,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        tau: float = 0.5,
        significance: float | None = None,
        weight_decay_mode: str = "after_mask",
        bias_correction: bool = False,
        maximize: bool = False,
    ) -> None:
        self.param = param.detach().double().clone()
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.tau, self.significance, self.maximize = tau, significance, maximize
        self.weight_decay_mode = weight_decay_mode
        self.bias_correction = bias_correction
        self.steps = 0
        self.exp_avg = torch.zeros_like(self.param)
        self.exp_avg_sq = torch.zeros_like(self.param)
        self.sign_avg = torch.zeros_like(self.param)

    def step(self, grad: Tensor) -> Tensor:
        """Take one step; ``grad`` is the gradient of one environment."""
        beta1, beta2, beta3 = self.betas
        self.steps += 1
        grad = grad.detach().double()
        vote = (grad > 0).double() - (grad < 0).double()
        self.sign_avg = beta3 * self.sign_avg + (1 - beta3) * vote
        if self.maximize:
            grad = -grad
        if self.weight_decay_mode == "decoupled":
            self.param -= self.lr * self.weight_decay * self.param
        else:
            grad = grad + self.weight_decay * self.param
        self.exp_avg = beta1 * self.exp_avg + (1 - beta1) * grad
        self.exp_avg_sq = beta2 * self.exp_avg_sq + (1 - beta2) * grad.square()

        mean, square, agreement = self.exp_avg, self.exp_avg_sq, self.sign_avg
        if self.significance is not None:
            factors = [(1 - beta3) * beta3**age for age in range(self.steps)]
            variance = sum(factor**2 for factor in factors)
            least = math.sqrt(2 * variance * math.log(2 / self.significance))
        else:
            least = (self.tau - 1e-6) * (1 - beta3**self.steps if self.bias_correction else 1)
        if self.bias_correction:
            mean = mean / (1 - beta1**self.steps)
            square = square / (1 - beta2**self.steps)
        mask = (agreement.abs() >= least).double()
        self.param -= self.lr * mean * mask / (square.sqrt() + self.eps)
        return self.param
