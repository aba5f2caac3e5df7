"""The AND-mask over time: one environment per step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._checks import check_bool, check_dense_grad, check_dtype
from .._devices import by_device
from .._vote_test import check_level, given_levels
from ._checks import (
    check_betas,
    check_lr,
    check_params,
    check_range,
    check_torch_options,
    warn_of_typos,
)
from ._state import average_of, load_state, steps_of
from .adam import AVERAGES

__all__ = ["TemporalAndMaskAdam"]


class TemporalAndMaskAdam(Optimizer):
    r"""Adam that moves a coordinate only while the signs of its recent gradients agree.

    Use it in an ordinary loop with one backward pass per step, each on another environment or
    batch. With gradient g: :math:`m \leftarrow \beta_1 m + (1-\beta_1) g`,
    :math:`v \leftarrow \beta_2 v + (1-\beta_2) g^2`,
    :math:`a \leftarrow \beta_3 a + (1-\beta_3)\,\mathrm{sign}(g)`,
    :math:`b = 1[|a| \ge \tau]`, :math:`\theta \leftarrow \theta - \alpha\,(m \odot b) /
    (\sqrt v + \epsilon)`. As in the paper, there is no bias correction by default. The average a
    starts at zero, so with a large :math:`\beta_3` nothing moves in the first steps. The comparison
    with tau has a tolerance of 1e-6. A zero gradient votes for neither sign.

    With ``significance``, the threshold of step T is :math:`\sqrt{2 v_T \ln(2 / \alpha)}`, with
    :math:`v_T = \frac{1-\beta_3}{1+\beta_3} (1 - \beta_3^{2T})`, the variance of a if signs are
    fair and independent from step to step. By Hoeffding's inequality noise passes it with a chance
    of at most :math:`\alpha`. In the first steps it is out of reach, and nothing moves. There is no
    ``fdr``: a is no count, so its chances are only bounded, which is too coarse to rank by.

    The paper's best setting on CoinRun is lr 0.0078, beta1 0.21, beta3 0.79, tau 0.36 and weight
    decay 0.057.

    Args:
        params: parameters or dicts of groups.
        lr: learning rate, a number or a tensor of one element.
        betas: (beta1, beta2, beta3): decay rates of m, v and a, in [0, 1).
        eps: added to the denominator.
        weight_decay: factor of the L2 penalty or of the decoupled decay.
        tau: agreement threshold in [0, 1]. It has no default: 1 freezes the model.
        significance: instead of ``tau``: the largest chance, in (0, 1), with which an average of
            fair signs keeps a coordinate. See above.
        weight_decay_mode: ``"after_mask"`` adds the L2 penalty to m and v, not to the vote.
            ``"decoupled"`` multiplies all parameters by ``1 - lr * weight_decay``, as AdamW does.
        bias_correction: divide m, v and a by ``1 - beta^step`` each. With ``tau=0`` this is Adam.
        maximize: maximize the loss instead of minimizing it.
        foreach, fused: accepted as in torch. They change nothing: a step is one fused pass.
        capturable, differentiable: only False, as in torch.

    Raises:
        TypeError: an option has the wrong type, or a gradient is sparse.
        ValueError: an option lies outside its range, or not exactly one of ``tau`` and
            ``significance`` is given.

    Example:
        >>> import torch, andmask_ext as am
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> betas = (0.5, 0.5, 0.5)
        >>> optimizer = am.optim.TemporalAndMaskAdam([weight], lr=0.1, betas=betas, tau=0.7)
        >>> for x in torch.tensor([[1.0, -2.0], [3.0, 4.0]]):
        ...     optimizer.zero_grad()
        ...     (weight * x).sum().backward()
        ...     optimizer.step()
        >>> weight.data
        tensor([0.9197, 1.0000])

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, appendix B.6.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: Sequence[float] = (0.9, 0.999, 0.9),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        tau: float | None = None,
        significance: float | None = None,
        weight_decay_mode: str = "after_mask",
        bias_correction: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        check_torch_options(type(self).__name__, foreach, fused, capturable, differentiable)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "tau": tau,
            "significance": significance,
            "weight_decay_mode": weight_decay_mode,
            "bias_correction": bias_correction,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            TypeError: a parameter or an option of the group has the wrong type.
            ValueError: an option of the group lies outside its range.
        """
        warn_of_typos(self, param_group)
        if given_levels(param_group):  # its own takes the place of the optimizer's
            param_group = {"tau": None, "significance": None, **param_group}
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @staticmethod
    def _check_group(group: dict[str, Any]) -> None:
        check_lr(group)
        check_betas(group, 3)
        check_range(group, "eps", 0.0)
        check_range(group, "weight_decay", 0.0)
        if (group["tau"] is None) == (group["significance"] is None):
            raise ValueError(
                "tau: expected tau or significance, but got "
                f"{'both' if group['significance'] else 'neither'}"
            )
        for name, level in given_levels(group).items():
            check_level(name, level)
        for name in ("bias_correction", "maximize"):
            check_bool(name, group[name])
        if group["weight_decay_mode"] not in ("after_mask", "decoupled"):
            raise ValueError(
                "weight_decay_mode: expected after_mask or decoupled, "
                f"but got {group['weight_decay_mode']!r}"
            )
        check_params(group["params"])

    def __getattr__(self, name: str) -> Any:
        if name in ("environment", "write_grads"):
            raise AttributeError(
                f"{name}: TemporalAndMaskAdam takes no environments: signs vote over steps; use an "
                "ordinary loop, loss.backward() and step(), or an optimizer such as AndMaskAdam"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters by their ``.grad``.

        Args:
            closure: computes the gradients again and returns a loss.

        Returns:
            The loss of ``closure``; None without one.

        Raises:
            TypeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            for index, param in enumerate(group["params"]):
                if param.grad is not None:
                    check_dtype(f"params[{index}]", param)
                    check_dense_grad(f"params[{index}].grad", param.grad)
            for places in by_device(params):
                self._step_some(group, [params[place] for place in places])
        return loss

    def _step_some(self, group: dict[str, Any], params: list[Tensor]) -> None:
        states = [self._state(param) for param in params]
        torch.ops.andmask._temporal_adam_step_.default(
            params,
            *[[state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "sign_avg")],
            [state["step"] for state in states],
            [param.grad for param in params],
            tau=group["tau"],
            significance=group["significance"],
            lr=float(group["lr"]),
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            beta3=float(group["betas"][2]),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            decoupled_weight_decay=group["weight_decay_mode"] == "decoupled",
            maximize=group["maximize"],
            bias_correction=group["bias_correction"],
        )
        torch.autograd.graph.increment_version(params)

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        steps_of(state, param)
        for key in (*AVERAGES, "sign_avg"):  # a state of torch.optim.Adam has no signs yet
            average_of(state, key, param)
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as :meth:`torch.optim.Optimizer.load_state_dict`.

        State of 16-bit parameters stays in float32. A state of :class:`torch.optim.Adam` loads,
        too: the average of signs then starts at zero, and options keep this optimizer's values.

        Raises:
            ValueError: the state is that of another class, or of parameters of other shapes.
        """
        options = [{**group} for group in self.param_groups]

        def finish(_: dict[str, Any]) -> None:
            for group, before in zip(self.param_groups, options, strict=True):
                for key, value in before.items():
                    group.setdefault(key, value)
                group["betas"] = (*group["betas"], *before["betas"][len(group["betas"]) :])

        load_state(self, super().load_state_dict, state_dict, ("step", *AVERAGES), finish)
