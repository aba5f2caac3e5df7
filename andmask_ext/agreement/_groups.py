"""The partition of a batch into environments."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .._dtypes import dtype_name

Environments = int | Tensor | None


@dataclass(frozen=True, eq=False)
class Groups:
    """A partition of the examples of a batch into environments.

    Attributes:
        examples: the number of examples.
        environments: the number of environments.
        size: the number of examples of each environment, if all have the same number and each
            consists of consecutive examples; else None.
        ids: the environment of each example, int64 ``[examples]``, on the CPU.
    """

    examples: int
    environments: int
    size: int | None
    ids: Tensor

    @cached_property
    def order(self) -> Tensor | None:
        """Examples sorted by environment, int64 ``[examples]``; None: already sorted."""
        if self.size is not None or bool((self.ids.diff() >= 0).all()):
            return None
        return torch.argsort(self.ids, stable=True)

    @cached_property
    def sizes(self) -> Tensor:
        """The number of examples of each environment, int64 ``[environments]``."""
        return torch.bincount(self.ids, minlength=self.environments)

    @cached_property
    def offsets(self) -> Tensor | None:
        """Begin and end of each environment in ``order``, int64; None: each has one example."""
        if self.size == 1:
            return None
        return torch.cat([torch.zeros(1, dtype=torch.int64), self.sizes.cumsum(0)])

    def part(self, environment: int) -> slice | Tensor:
        """Return an index of the examples of an environment: a slice if consecutive, else ids."""
        if self.size is None:
            return self.members(environment)
        return slice(environment * self.size, (environment + 1) * self.size)

    def members(self, environment: int) -> Tensor:
        """Return the examples of an environment, int64."""
        if self.size is not None:
            first = environment * self.size
            return torch.arange(first, first + self.size)
        assert self.offsets is not None
        first, last = int(self.offsets[environment]), int(self.offsets[environment + 1])
        return torch.arange(first, last) if self.order is None else self.order[first:last]


def make_groups(environments: Environments, examples: int) -> Groups:
    """Return the partition of a batch that the argument ``environments`` describes.

    Args:
        environments: None: each example is one; int d: d equal groups of consecutive examples;
            int64 tensor ``[examples]``: the environment of each, from 0 without gaps.
        examples: the size of the batch.

    Raises:
        ValueError: examples cannot be split like that, or an environment has none.
    """
    if examples < 1:
        raise ValueError(
            f"environments: expected a batch of at least 1 example, but got {examples}"
        )
    if environments is None or isinstance(environments, int):
        count = examples if environments is None else environments
        if examples % count:
            raise ValueError(
                f"environments: expected a number that divides the batch of {examples} examples, "
                f"but got {count}; for unequal groups pass the environment of each example"
            )
        size = examples // count
        return Groups(examples, count, size, torch.arange(count).repeat_interleave(size))
    if environments.shape[0] != examples:
        raise ValueError(
            f"environments: expected one id for each of the {examples} examples of the batch, "
            f"but got {environments.shape[0]}"
        )
    ids = environments.detach().cpu()
    if int(ids.max()) >= examples:
        raise ValueError(
            "environments: expected ids from 0 on without gaps, fewer than the examples, but got "
            f"{int(ids.max())} for {examples} examples; torch.unique(ids, return_inverse=True)[1] "
            "numbers them"
        )
    sizes = torch.bincount(ids)
    empty = (sizes == 0).nonzero()
    if len(empty):
        raise ValueError(
            f"environments: expected ids from 0 to {len(sizes) - 1} without gaps, but environment "
            f"{int(empty[0])} has no examples"
        )
    each = int(sizes[0])
    regular = bool((sizes == each).all()) and bool((ids.diff() >= 0).all())
    return Groups(examples, len(sizes), each if regular else None, ids)


def check_environments(environments: object) -> None:
    """Raise unless the argument has one of the types and ranges that :func:`make_groups` takes."""
    if environments is None:
        return
    if isinstance(environments, int) and not isinstance(environments, bool):
        if environments < 1:
            raise ValueError(f"environments: expected a positive number, but got {environments}")
        return
    if not isinstance(environments, Tensor):
        raise TypeError(
            "environments: expected None, an int or an int64 tensor of ids, "
            f"but got {type(environments).__name__}"
        )
    if environments.dtype != torch.int64 or environments.dim() != 1:
        raise TypeError(
            "environments: expected an int64 tensor [examples], "
            f"but got {dtype_name(environments.dtype)} "
            f"of shape {tuple(environments.shape)}"
        )
    if len(environments) == 0 or int(environments.min()) < 0:
        got = "none" if len(environments) == 0 else f"{int(environments.min())}"
        raise ValueError(
            f"environments: expected ids from 0 on for at least 1 example, but got {got}"
        )
