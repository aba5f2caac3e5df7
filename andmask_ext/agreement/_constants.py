"""Which tensors hold nothing of the batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._batch import tensors_in


def storage(tensor: Tensor) -> int:
    """Return the address of the memory that a tensor is a view of."""
    return tensor.untyped_storage().data_ptr()


class Constants:
    """Parameters, buffers, and what functions have made of these or of no tensors.

    Seen function by function while the model runs; whatever else there is may be data.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: set[int] | None = None
        self._kept: list[Tensor] = []  # alive, so that nothing else comes to lie there

    def watch(self, result: Any, args: Any, kwargs: Any) -> None:
        """Take note of a call."""
        tensors = [result] if isinstance(result, Tensor) else result
        if not isinstance(tensors, (tuple, list)):
            return
        made = [one for one in tensors if isinstance(one, Tensor) and not one.requires_grad]
        if not made or not all(one in self for one in tensors_in((args, kwargs))):
            return
        self._kept += made
        self._memory.update(storage(one) for one in made)

    def __contains__(self, tensor: Tensor) -> bool:
        return isinstance(tensor, nn.Parameter) or storage(tensor) in self._memory

    @property
    def _memory(self) -> set[int]:
        if self._known is None:
            members = [*self._model.parameters(), *self._model.buffers()]
            self._known = {storage(member) for member in members}
        return self._known
