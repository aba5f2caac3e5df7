"""Lists of tensors on several devices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def by_device(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return the positions of the tensors on each device. Native ops take one device per call."""
    places: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        places.setdefault(tensor.device, []).append(index)
    return list(places.values())
