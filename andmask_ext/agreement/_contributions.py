"""Contributions of one use of a parameter to the gradients of the environments.

A contribution is created when the gradient of a node's output arrives. It holds the factors of the
parameter's gradient, and computes gradients of environments only on request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._dtypes import wide_dtype
from ._groups import Groups, group_rows, make_groups
from ._layout import Layout


class Contribution:
    """Base class. ``shape`` is the shape of the operand that the gradient belongs to.

    ``grads`` is a factor of the gradients in their dtype. Only `OneByOne` has none.
    """

    path: str
    grads: Tensor
    shape: tuple[int, ...]

    def stacked(self, begin: int, end: int) -> Tensor:
        """Return the gradients of environments [begin, end), ``[end - begin, *shape]``."""
        raise NotImplementedError


@dataclass
class Outer(Contribution):
    """Sums of outer products: ``W_e`` = sum over the rows of e of ``grads[r] activations[r]^T``.

    Attributes:
        activations: ``[examples, rows of each, I]``.
        grads: ``[examples, rows of each, O]``.
        shape: the shape of the operand, which has O x I elements in that order.
    """

    activations: Tensor
    grads: Tensor
    groups: Groups
    shape: tuple[int, ...]

    @property
    def path(self) -> str:  # type: ignore[override]
        single = self.groups.size == 1 and self.activations.shape[1] == 1
        return f"outer products, {'one row' if single else 'several rows'} per environment"

    def transposed(self) -> Outer:
        """Return the contribution to the transposed operand."""
        return Outer(self.grads, self.activations, self.groups, self.shape[::-1])

    def stacked(self, begin: int, end: int) -> Tensor:
        wide = wide_dtype(self.activations)
        if self.groups.size is None:
            products = [
                self.grads[members].flatten(0, 1).to(wide).t()
                @ self.activations[members].flatten(0, 1).to(wide)
                for members in (self.groups.members(e) for e in range(begin, end))
            ]
            return torch.stack(products).reshape(end - begin, *self.shape)
        size = self.groups.size
        activations, grads = (
            factor[begin * size : end * size].reshape(end - begin, -1, factor.shape[2]).to(wide)
            for factor in (self.activations, self.grads)
        )
        return torch.bmm(grads.transpose(1, 2), activations).reshape(end - begin, *self.shape)


@dataclass
class Matrices(Contribution):
    """Sums of outer products, for each matrix of an operand ``[matrices, I, O]``.

    Attributes:
        products: the sums of each matrix; None: no row uses it, so its gradients are zero.
        grads: the gradient of the output of the node.
    """

    products: Sequence[Outer | None]
    grads: Tensor
    shape: tuple[int, ...]

    path = "outer products of several matrices"

    def stacked(self, begin: int, end: int) -> Tensor:
        wide = wide_dtype(self.grads)
        result = self.grads.new_zeros(end - begin, *self.shape, dtype=wide)
        for number, product in enumerate(self.products):
            if product is not None:
                result[:, number] = product.stacked(begin, end)
        return result

    def transposed(self) -> Matrices:
        """Return the contribution to the matrices transposed."""
        products = [None if one is None else one.transposed() for one in self.products]
        return Matrices(products, self.grads, (self.shape[0], *self.shape[:0:-1]))

    @property
    def is_full(self) -> bool:
        """Whether each matrix has rows of each environment."""
        return all(one is not None and one.groups.filled is None for one in self.products)


@dataclass
class Convolution(Contribution):
    """Gradients of the weight of a convolution with zero padding, unfolded by the native op.

    Attributes:
        images: ``[images, C, *spatial]``.
        grads: ``[images, O, *positions]``.
        groups: the environments as groups of images.
        shape: ``[O, C / channel_groups, *kernel]``.
    """

    images: Tensor
    grads: Tensor
    groups: Groups
    shape: tuple[int, ...]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    channel_groups: int

    path = "convolution"

    def stacked(self, begin: int, end: int) -> Tensor:
        wide = wide_dtype(self.images)
        weight = self.images.new_empty(self.shape, dtype=wide)
        zeros = [0] * len(self.stride)
        gradients = []
        for environment in range(begin, end):
            members = self.groups.part(environment)
            gradients.append(
                torch.ops.aten.convolution_backward(
                    self.grads[members].to(wide), self.images[members].to(wide), weight, None,
                    self.stride, self.padding, self.dilation, False, zeros, self.channel_groups,
                    [False, True, False],
                )[1]
            )  # fmt: skip
        return torch.stack(gradients)


@dataclass
class Stacked(Contribution):
    """Gradients of all environments, ``[environments, *shape]``, for small operands."""

    grads: Tensor
    shape: tuple[int, ...]
    path: str = "sums of products"

    def stacked(self, begin: int, end: int) -> Tensor:
        return self.grads[begin:end]


@dataclass
class Shared(Contribution):
    """The gradient of a term of the loss that is made of parameters only, as a penalty is.

    Each environment has the term in full. All its gradients are the same but for a factor.

    Attributes:
        grads: ``[*shape]``, the gradient in the loss of the batch.
        shares: the share of each environment in the loss of the batch, ``[environments]``.
    """

    grads: Tensor
    shape: tuple[int, ...]
    shares: Tensor

    path = "a term of the loss, shared by all environments"

    def stacked(self, begin: int, end: int) -> Tensor:
        shares = self.shares[begin:end].to(self.grads).view(-1, *[1] * self.grads.dim())
        return shares * self.grads


@dataclass
class Lookup(Contribution):
    """Gradients of a table in which each row looks up one line.

    Attributes:
        grads: ``[rows, columns]``, the gradients of the rows.
        lines: ``[rows]``, int64, the line of the table that each row looks up.
        environments: ``[rows]``, int64, the environment of each row.
        shape: the shape of the table.
    """

    grads: Tensor
    lines: Tensor
    environments: Tensor
    shape: tuple[int, ...]

    path = "lines of a table"

    def stacked(self, begin: int, end: int) -> Tensor:
        wide = wide_dtype(self.grads)
        chosen = (self.environments >= begin) & (self.environments < end)
        table = self.grads.new_zeros((end - begin) * self.shape[0], self.shape[1], dtype=wide)
        line = (self.environments[chosen] - begin) * self.shape[0] + self.lines[chosen]
        return table.index_add_(0, line, self.grads[chosen].to(wide)).view(end - begin, *self.shape)

    def segments(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return one gradient per line and environment that uses it, the lines, environments."""
        every = self.environments * self.shape[0] + self.lines
        keys, segment = torch.unique(every, return_inverse=True)
        sums = self.grads.new_zeros(len(keys), self.shape[1], dtype=wide_dtype(self.grads))
        sums.index_add_(0, segment, self.grads.to(sums.dtype))
        return sums, keys % self.shape[0], keys // self.shape[0]


@dataclass
class OneByOne(Contribution):
    """Gradients of any function: its backward formula is called once per environment."""

    gradients: Callable[[int, int], list[Tensor]]
    shape: tuple[int, ...]
    path: str

    def stacked(self, begin: int, end: int) -> Tensor:
        return torch.stack(self.gradients(begin, end))


def groups_of_axis(groups: Groups, layout: Layout) -> Groups:
    """Return the partition of the entries along an axis. An example may have several."""
    if layout.before == layout.after == 1:
        return groups
    if groups.size is not None and layout.before == 1:
        return make_groups(groups.environments, groups.examples * layout.after)
    return group_rows(ids_of_axis(groups, layout), groups.environments)


def ids_of_axis(groups: Groups, layout: Layout) -> Tensor:
    """Return the environment of each entry along an axis, int64."""
    return layout.spread(groups.ids)


def add_up(parts: Sequence[Callable[[int, int], Tensor]], begin: int, end: int) -> Tensor:
    """Return the sum of several parts for environments [begin, end)."""
    total = parts[0](begin, end)
    for part in parts[1:]:
        total = total + part(begin, end)
    return total
