"""The parameters of a step, as they were at its first environment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._dtypes import dtype_name
from ..rules import Rule

Groups = Sequence[tuple[list[Tensor], Rule]]


class Tracked:
    """The parameters of the groups of a step.

    Attributes:
        params: all of them, in the order of the groups.
        slots: the number of the group of each parameter and its index there, by the id of the
            parameter.
    """

    def __init__(self, groups: Groups = ()) -> None:
        self._groups = [list(params) for params, _ in groups]
        self.params = [param for group in self._groups for param in group]
        self.slots = {
            id(param): (number, index)
            for number, group in enumerate(self._groups)
            for index, param in enumerate(group)
        }
        self._kinds: list[tuple[torch.dtype, torch.device]] = []
        self.begin()

    def begin(self) -> None:
        """Begin a step: note the dtype and the device of each parameter."""
        self._kinds = [(param.dtype, param.device) for param in self.params]

    def are(self, groups: Groups) -> bool:
        """Return whether these are the parameters of the groups, in their order."""
        theirs = [list(map(id, params)) for params, _ in groups]
        return theirs == [list(map(id, params)) for params in self._groups]

    def may_get_grads(self) -> dict[int, Tensor]:
        """Return the parameters that may get gradients, by id."""
        return {id(param): param for param in self.params if param.requires_grad}

    def name(self, param: Tensor) -> str:
        """Return the name of a parameter in messages."""
        group, index = self.slots[id(param)]
        where = f" of group {group}" if len(self._groups) > 1 else ""
        return f"parameter {index}{where} of shape {tuple(param.shape)}"

    def require_unchanged(self, groups: Groups) -> None:
        """Raise unless the groups have the parameters that they had at the first environment."""
        if not self.are(groups):
            raise RuntimeError(
                "param_groups: expected the parameters of the first environment of this step, but "
                "some have been replaced, added or removed; call zero_grad() and start the step "
                "again"
            )
        for param, (dtype, device) in zip(self.params, self._kinds, strict=True):
            if param.dtype != dtype or param.device != device:
                raise RuntimeError(
                    f"param_groups: expected {self.name(param)} to stay {dtype_name(dtype)} on "
                    f"{device} until the step, but got {dtype_name(param.dtype)} on "
                    f"{param.device} after the first environment; call zero_grad() and start the "
                    "step again"
                )
