"""The partition of a batch into environments."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .._dtypes import dtype_name

# As a context takes them, and once checked: ids are int64 from 0 on without gaps, on the CPU.
Environments = Any  # None, an int, or integers in a tensor, list or array
Checked = int | Tensor | None


@dataclass(frozen=True, eq=False)
class Groups:
    """A partition of the examples of a batch into environments.

    Attributes:
        examples: the number of examples.
        environments: the number of environments.
        size: the number of examples of each environment, if all have the same number and each
            consists of consecutive examples; else None.
        ids: the environment of each example, int64 ``[examples]``, on the CPU. An environment may
            have no examples, as in the rows that one expert of a mixture gets.
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

    @cached_property
    def filled(self) -> list[int] | None:
        """The environments that have examples; None: all have."""
        if self.size is not None or bool((self.sizes > 0).all()):
            return None
        filled: list[int] = self.sizes.nonzero()[:, 0].tolist()
        return filled

    @cached_property
    def filled_offsets(self) -> Tensor | None:
        """As :attr:`offsets`, of the environments that have examples."""
        if self.offsets is None or self.filled is None:
            return self.offsets
        return torch.cat([self.offsets[self.filled], self.offsets[-1:]])

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


def make_groups(environments: Checked, examples: int) -> Groups:
    """Return the partition of a batch that the argument ``environments`` describes.

    Args:
        environments: None: each example is one; int d: d equal groups of consecutive examples;
            ids that :func:`check_environments` returned: the environment of each example.
        examples: the size of the batch.

    Raises:
        ValueError: examples cannot be split like that.
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
                f"but got {count}; for unequal groups pass the environment of each example, and "
                "leave out a smaller last batch of an epoch (drop_last=True)"
            )
        size = examples // count
        return Groups(examples, count, size, torch.arange(count).repeat_interleave(size))
    if environments.shape[0] != examples:
        raise ValueError(
            f"environments: expected one id for each of the {examples} examples of the batch, "
            f"but got {environments.shape[0]}"
        )
    return group_rows(environments, int(environments.max()) + 1)


def group_rows(ids: Tensor, environments: int) -> Groups:
    """Return the partition of rows, given the environment of each, int64 ``[rows]``."""
    sizes = torch.bincount(ids, minlength=environments)
    each = int(sizes[0])
    regular = each > 0 and bool((sizes == each).all()) and bool((ids.diff() >= 0).all())
    return Groups(len(ids), environments, each if regular else None, ids)


def group_blocks(ids: Tensor, environments: int, counts: Sequence[int]) -> list[Groups | None]:
    """Return the partition of each block of consecutive rows; None: it has no rows.

    This takes a few calls for all blocks, where :func:`group_rows` takes a dozen for each.

    Args:
        ids: the environment of each row.
        environments: their number.
        counts: the number of rows of each block. The first begins at 0.
    """
    rows, lengths = ids[: sum(counts)], torch.tensor(counts)
    block = torch.repeat_interleave(lengths)
    keys = block * environments + rows
    order = torch.argsort(keys, stable=True) - (lengths.cumsum(0) - lengths)[block]
    sizes = torch.bincount(keys, minlength=len(counts) * environments)
    sizes = sizes.view(len(counts), environments)
    offsets = torch.cat([sizes.new_zeros(len(counts), 1), sizes.cumsum(1)], 1)
    parts = zip(
        rows.split(counts), order.split(counts), sizes, offsets, sizes.tolist(), strict=True
    )
    found: list[Groups | None] = []
    for its_rows, its_order, its_sizes, its_offsets, numbers in parts:
        groups = Groups(len(its_rows), environments, None, its_rows)
        filled = [environment for environment, number in enumerate(numbers) if number]
        groups.__dict__.update(  # the cached properties
            order=its_order, sizes=its_sizes, offsets=its_offsets,
            filled=filled if len(filled) < environments else None,
        )  # fmt: skip
        found.append(groups if filled else None)
    return found


def check_environments(environments: Environments) -> Checked:
    """Return the argument as :func:`make_groups` takes it. Ids are numbered from 0 without gaps.

    Raises:
        TypeError: it is no number, and no integer id for each example.
        ValueError: a number is not positive, or there are no ids.
    """
    if environments is None:
        return None
    if hasattr(environments, "__index__") and getattr(environments, "ndim", 0) == 0:
        if isinstance(environments, bool):
            raise TypeError(
                "environments: expected None, an int, or the integer id of each example, "
                "but got bool"
            )
        count: int = operator.index(environments)
        if count < 1:
            raise ValueError(f"environments: expected a positive number, but got {count}")
        return count
    ids: Tensor = _as_tensor(environments)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.dim() != 1:
        raise TypeError(
            "environments: expected integer ids [examples], "
            f"but got {dtype_name(ids.dtype)} of shape {tuple(ids.shape)}"
        )
    if len(ids) == 0:
        raise ValueError("environments: expected ids for at least 1 example, but got none")
    ids = ids.detach().cpu().long()
    if int(ids.min()) == 0 and int(ids.max()) < len(ids) and bool((torch.bincount(ids) > 0).all()):
        return ids
    numbered: Tensor = torch.unique(ids, return_inverse=True)[1]
    return numbered


def _as_tensor(environments: Any) -> Tensor:
    """Return ids in a list, an array or a tensor as a tensor."""
    if isinstance(environments, Tensor):
        return environments
    try:
        if isinstance(environments, (str, bytes, dict, set)):
            raise TypeError
        return torch.as_tensor(environments)
    except (TypeError, ValueError, RuntimeError) as error:
        got = type(environments).__name__
        if isinstance(environments, (list, tuple)) and environments:
            got += f" of {type(environments[0]).__name__}"
        raise TypeError(
            "environments: expected None, an int, or the integer id of each example, "
            f"but got {got}; number the environments from 0 on"
        ) from error
