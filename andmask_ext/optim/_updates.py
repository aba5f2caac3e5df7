"""The aggregated gradients of a step, as native ops take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .._devices import by_device
from .._pending import Group
from ..rules import Mean

# Moments of some parameters on one device, their count and the rule, in the order of native ops.
Arguments = tuple[Any, ...]


class Update(NamedTuple):
    """Parameters of one group on one device, with the options of the group."""

    group: dict[str, Any]
    params: list[Tensor]
    arguments: Arguments


def of_written(grads: list[Tensor]) -> Arguments:
    """Return the arguments for gradients that are taken as they are."""
    return grads, [], [], [], [], 1, Mean.name, [], False


def updates_of(
    param_groups: Sequence[dict[str, Any]], groups: Sequence[Group], written: bool
) -> Iterator[Update]:
    """Yield what updates the parameters; those that have no gradient are left out.

    Args:
        param_groups: the options of each group.
        groups: parameters, moments and rule of each group.
        written: take ``.grad`` instead of what the rule makes of the moments.
    """
    for options, (params, moments, rule) in zip(param_groups, groups, strict=True):
        indices = moments._touched
        if written:
            indices = [index for index in indices if params[index].grad is not None]
        for places in by_device([params[index] for index in indices]):
            chosen = [indices[place] for place in places]
            some = [params[index] for index in chosen]
            if written:
                grads = [param.grad for param in some if param.grad is not None]
                yield Update(options, some, of_written(grads))
            else:
                yield Update(options, some, rule._native_arguments(moments, chosen))
