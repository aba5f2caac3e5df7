"""The state of an Agreement that outlives a context."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ._accumulator import Treatment
from ._arguments import check_params
from ._groups import Checked, Groups, make_groups
from ._plans import Plans


@dataclass(frozen=True, eq=False)
class Setup:
    """The model, the options of Agreement, and the plans of earlier contexts.

    Attributes:
        model: the model.
        modules: the model and its modules.
        params: the parameters whose gradients are aggregated.
        names: the names of the parameters, by id.
        batch_dim: the batch dimension of the model's inputs and outputs.
        output_batch_dim: that of its outputs, if it is given apart.
        reduction: ``"mean"`` or ``"sum"``, the reduction of the loss.
        check_mixing: the argument of Agreement.
        plans: the plans of earlier graphs.
        treatments: the treatment of each parameter in the last context, by its number.
        partitions: the last partition of a batch into equal groups, by its description.
    """

    model: nn.Module
    modules: tuple[nn.Module, ...]
    params: list[Tensor]
    names: dict[int, str]
    batch_dim: int
    output_batch_dim: int | None
    reduction: str
    check_mixing: str
    plans: Plans = field(default_factory=Plans)
    treatments: dict[int, Treatment] = field(default_factory=dict)
    partitions: dict[Any, Groups] = field(default_factory=dict)

    def name(self, param: Tensor) -> str:
        """Return the name of a parameter, or its shape if it has no name."""
        return self.names.get(id(param), f"a parameter of shape {tuple(param.shape)}")

    def arguments(self, with_params: bool) -> dict[str, Any]:
        """Return the arguments of Agreement that made this object."""
        all_of_model = check_params(self.model.parameters(), given=False)
        same = list(map(id, all_of_model)) == list(map(id, self.params))
        return {
            "model": self.model,
            "params": self.params if with_params and not same else None,
            "batch_dim": self.batch_dim,
            "output_batch_dim": self.output_batch_dim,
            "loss_reduction": self.reduction,
            "check_mixing": self.check_mixing,
        }

    def groups(self, environments: Checked, examples: int) -> Groups:
        """Return the partition of a batch. A partition into equal groups is kept for reuse."""
        if isinstance(environments, Tensor):
            return make_groups(environments, examples)
        key = (environments, examples)
        if key not in self.partitions:
            groups = make_groups(environments, examples)
            self.partitions.clear()
            self.partitions[key] = groups
        return self.partitions[key]
