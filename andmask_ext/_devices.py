"""Lists of tensors that do not all lie on one device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def by_device(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return the positions of the tensors of each device; a native op takes those of one."""
    places: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        places.setdefault(tensor.device, []).append(index)
    return list(places.values())
