"""What an Agreement knows of its model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ._accumulator import Treatment
from ._groups import Environments, Groups, make_groups
from ._plan import Plan


@dataclass(frozen=True)
class Setup:
    """What an Agreement knows of its model, and has learnt of it in earlier contexts.

    Attributes:
        model: the model.
        members: the ids of its modules.
        params: the parameters whose gradients are aggregated.
        names: names of parameters, by id.
        batch_dim: which dimension of the model's inputs and outputs is the batch.
        reduction: ``"mean"`` or ``"sum"``: of the loss.
        check_mixing: as Agreement takes it.
        plans: what to do with graphs that have been seen.
        treatments: how each parameter was treated in the last context, by its number.
        partitions: the last partition of a batch into equal groups, by what described it.
    """

    model: nn.Module
    members: set[int]
    params: list[Tensor]
    names: dict[int, str]
    batch_dim: int
    reduction: str
    check_mixing: str
    plans: dict[Any, Plan] = field(default_factory=dict)
    treatments: dict[int, Treatment] = field(default_factory=dict)
    partitions: dict[Any, Groups] = field(default_factory=dict)

    def name(self, param: Tensor) -> str:
        """Return the name of a parameter, or what else tells it from others."""
        return self.names.get(id(param), f"a parameter of shape {tuple(param.shape)}")

    def groups(self, environments: Environments, examples: int) -> Groups:
        """Return the partition of a batch; that into equal groups is kept for the next one."""
        if isinstance(environments, Tensor):
            return make_groups(environments, examples)
        key = (environments, examples)
        if key not in self.partitions:
            groups = make_groups(environments, examples)
            self.partitions.clear()
            self.partitions[key] = groups
        return self.partitions[key]
