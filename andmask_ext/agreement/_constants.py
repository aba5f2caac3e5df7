"""Tensors that hold no data of the batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._forward import tensors_in


def storage(tensor: Tensor) -> int:
    """Return the address of the memory that a tensor is a view of."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # no storage, as inside torch.vmap
        return -1


_FACTORIES = frozenset((
    "arange", "eye", "full", "linspace", "logspace", "ones", "tril_indices", "triu_indices",
    "zeros",
))  # fmt: skip
_RANDOM = (
    "bernoulli", "cauchy", "dropout", "exponential", "feature_dropout", "geometric", "log_normal",
    "multinomial", "normal", "poisson", "rand", "rrelu", "uniform",
)  # fmt: skip


class Constants:
    """Parameters, buffers, and tensors that were computed from constants only.

    Functions are recorded one by one while the model runs. Any other tensor may be data.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.data: set[int] = set()  # storages of the inputs of the model
        self._known: set[int] | None = None
        self._kept: list[Tensor] = []  # kept alive so that the address is not reused

    def note(self, name: str, result: Any, args: Any, kwargs: Any) -> None:
        """Record a call of the function ``name``."""
        if name == "__setitem__":
            result = args[0]
        tensors = [result] if isinstance(result, Tensor) else result
        made = [t for t in tensors if isinstance(t, Tensor) and not t.requires_grad]
        if not made:
            return
        taken = list(tensors_in((args, kwargs)))
        known = all(tensor in self for tensor in taken) if taken else name in _FACTORIES
        if known and not name.startswith(_RANDOM) and storage(made[0]) != -1:
            self._kept += made
            self._memory.update(storage(tensor) for tensor in made)
        elif taken:  # perhaps in place: the tensor is no longer constant
            self._memory.difference_update(storage(tensor) for tensor in made)

    def forget(self) -> None:
        """Forget all tensors but parameters and buffers."""
        self._kept = []
        self._known = None

    def __contains__(self, tensor: Tensor) -> bool:
        if isinstance(tensor, nn.Parameter):
            return True
        return storage(tensor) in self._memory and storage(tensor) not in self.data

    @property
    def _memory(self) -> set[int]:
        if self._known is None:
            members = [*self._model.parameters(), *self._model.buffers()]
            self._known = {storage(member) for member in members}
        return self._known
