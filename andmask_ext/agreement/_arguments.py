"""Checks of the arguments of Agreement."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from torch import Tensor, nn

from .._checks import DTYPES, check_dtype
from ..optim import EnvironmentOptimizer
from ..optim._rules import check_rule
from ..rules import Rule


class Called:
    """An object that returns a context when it is called. As a context it says so."""

    def __enter__(self) -> NoReturn:
        raise TypeError("Agreement: expected `with agreement():`, with parentheses")

    def __exit__(self, *_: object) -> None:
        """Nothing: it cannot be entered."""


def check_options(
    model: object,
    loss_reduction: str,
    check_mixing: str,
    batch_dim: int,
    output_batch_dim: int | None,
) -> None:
    """Raise unless the other arguments of Agreement have the right types and known values."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, but got {type(model).__name__}")
    if loss_reduction not in ("mean", "sum"):
        raise ValueError(f"loss_reduction: expected 'mean' or 'sum', but got {loss_reduction!r}")
    if check_mixing not in ("auto", "once", "always", "never"):
        raise ValueError(
            f"check_mixing: expected 'auto', 'once', 'always' or 'never', but got {check_mixing!r}"
        )
    for name, dim in (("batch_dim", batch_dim), ("output_batch_dim", output_batch_dim)):
        if dim is None and name == "output_batch_dim":
            continue
        if not isinstance(dim, int) or dim < 0:
            raise ValueError(f"{name}: expected a dimension from 0 on, but got {dim!r}")


def check_optimizer_or_rule(rule: object) -> None:
    """Raise TypeError unless ``rule`` is a rule on moments."""
    if not isinstance(rule, Rule):
        got = rule.__name__ if isinstance(rule, type) else type(rule).__name__
        raise TypeError(
            "optimizer_or_rule: expected an optimizer of andmask_ext.optim that takes "
            f"environments, or a rule such as andmask_ext.AndMask(tau=0.8), but got {got}"
        )
    check_rule(rule)


def refuse_early_decay(optimizer: EnvironmentOptimizer) -> None:
    """Raise ValueError if weight decay changes the gradient of each environment."""
    for group in optimizer.param_groups:
        if group.get("weight_decay") and group.get("weight_decay_mode") == "before_mask":
            raise ValueError(
                "optimizer_or_rule: expected an optimizer whose weight decay comes after the mask "
                "or is decoupled, but got weight_decay_mode='before_mask', which changes the "
                "gradient of each environment; use optimizer.environment()"
            )


def check_params(params: Iterable[Tensor], *, given: bool) -> list[Tensor]:
    """Return the parameters to aggregate, each once.

    Args:
        params: candidates.
        given: whether the caller named them. If not, parameters that cannot be aggregated are
            skipped.
    """
    chosen: dict[int, Tensor] = {}
    for index, param in enumerate(params):
        if not isinstance(param, Tensor):
            raise TypeError(f"params[{index}]: expected a Tensor, but got {type(param).__name__}")
        if not given and _cannot_vote(param):
            continue
        check_dtype(f"params[{index}]", param)
        if given and not (param.is_leaf and param.requires_grad):
            raise ValueError(f"params[{index}]: expected a leaf that requires gradients")
        chosen[id(param)] = param
    if not chosen:
        raise ValueError("params: expected at least one parameter, but got none")
    return list(chosen.values())


def names_of(model: nn.Module, *, given: bool) -> dict[int, str]:
    """Return the names of the parameters, by id, but for those that :func:`check_params` skips."""
    named = model.named_parameters()
    return {id(param): name for name, param in named if given or not _cannot_vote(param)}


def _cannot_vote(param: Tensor) -> bool:
    """Return whether a parameter, such as a quantized one, has no gradients to aggregate."""
    return not param.requires_grad and param.dtype not in DTYPES
