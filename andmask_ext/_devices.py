"""Lists of tensors on several devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def by_device(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return the positions of the tensors on each device. Native ops take one device per call."""
    places: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        places.setdefault(tensor.device, []).append(index)
    return list(places.values())


def call_by_device(op: Callable[..., tuple[Tensor, ...]], *lists: list[Any]) -> tuple[Tensor, ...]:
    """Call an op on lists of tensors, once for each device.

    Args:
        op: returns tensors with one row for each tensor of a list.
        lists: the arguments. All but the first may be empty.

    Returns:
        The results, with rows in the order of the lists, on the device of the first tensor.
    """
    first = lists[0]
    groups = by_device(first)
    results = [op(*([one[place] for place in places] if one else [] for one in lists))
               for places in groups]  # fmt: skip
    if len(groups) == 1:
        return results[0]
    device = first[0].device
    order = torch.tensor([place for places in groups for place in places]).argsort().to(device)
    return tuple(
        torch.cat([part.to(device) for part in parts])[order]
        for parts in zip(*results, strict=True)
    )
