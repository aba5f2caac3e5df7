"""Scalar products of gradients of environments, computed without the gradients if cheaper."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._dtypes import wide_dtype
from .._norms import squared_norms
from ._contributions import Outer, add_up
from ._groups import Groups

# Scratch memory for one parameter. If the gradients of all environments do not fit, they are
# recomputed block by block. That takes more time but no more memory.
SCRATCH_BYTES = 256 << 20

_COLUMNS = 1 << 16

Part = Callable[[int, int], Tensor]  # gradients of environments [begin, end) of one parameter


class Gramian:
    """Scalar products of the gradients of one backward pass.

    Args:
        pairs: True: products of all pairs of environments, ``[d, d]``. False: squared norms,
            ``[d]``.
        groups: the environments.
        weights: a factor for the gradient of each environment, or one for all.
    """

    def __init__(self, pairs: bool, groups: Groups, weights: Sequence[float]) -> None:
        self.pairs = pairs
        self.environments = groups.environments
        self.found: dict[int, Tensor] = {}  # by the parameter's number, float64
        self._groups = groups
        self._weights = weights
        self._factors: dict[torch.device, Tensor] = {}

    def of_factors(self, param: int, outer: Outer) -> bool:
        """Compute the products from the factors of outer products, if that is cheaper.

        ``G_e`` is the sum of ``d a^T`` over the rows of e. The scalar product of ``G_e`` and
        ``G_f`` is the sum of ``(a . a')(d . d')`` over pairs of rows.

        Returns:
            Whether the products were computed.
        """
        environments = self._groups.environments
        examples, each = outer.activations.shape[:2]
        rows = examples * each
        partners = rows if self.pairs else rows // environments  # of each row
        if outer.groups.environments != environments or rows * partners * 4 > SCRATCH_BYTES:
            return False
        if not self.pairs and (outer.groups.size is None or partners > 1):
            return False
        columns = outer.activations.shape[2], outer.grads.shape[2]
        gradients = columns[0] * columns[1]
        pairs = environments**2 * gradients if self.pairs else 0
        if rows * partners * sum(columns) > rows * gradients + pairs:
            return False
        factors = [_rows(factor) for factor in (outer.activations, outer.grads)]
        if self.pairs:
            with exact(factors[0]):
                products = _gram(factors[0]) * _gram(factors[1])
            if outer.groups.size != 1 or each != 1:
                ids = outer.groups.ids.repeat_interleave(each).to(products.device)
                half = products.new_zeros(environments, rows).index_add_(0, ids, products)
                products = half.new_zeros(environments, environments).index_add_(1, ids, half)
        else:
            products = squared_norms(factors[0]) * squared_norms(factors[1])
        self._keep(param, products)
        return True

    def of_gradients(self, param: int, parts: Sequence[Part], like: Tensor) -> None:
        """Compute the products from gradients, in blocks of environments that fit the memory."""
        count = self._groups.environments
        step = max(1, SCRATCH_BYTES // max(1, 2 * like.numel() * max(4, like.element_size())))
        blocks = [(begin, min(begin + step, count)) for begin in range(0, count, step)]
        products: Tensor | None = None
        for number, (begin, end) in enumerate(blocks):
            grads = _flat(add_up(parts, begin, end))
            if products is None:
                shape = (count, count) if self.pairs else (count,)
                products = grads.new_zeros(shape, dtype=torch.float64)
            if not self.pairs:
                products[begin:end] = squared_norms(grads)
                continue
            for first, last in blocks[number:]:
                block = grads if first == begin else _flat(add_up(parts, first, last))
                corner = _scalar_products(grads, block)
                products[begin:end, first:last] = corner
                products[first:last, begin:end] = corner.t()
        assert products is not None
        self._keep(param, products)

    def _keep(self, param: int, products: Tensor) -> None:
        products = products.double()
        if len(self._weights) == 1:
            self.found[param] = products * self._weights[0] ** 2
            return
        weights = self._factors.get(products.device)
        if weights is None:  # one copy to the device for all parameters
            weights = torch.tensor(self._weights, dtype=torch.float64, device=products.device)
            self._factors[products.device] = weights
        factors = weights[:, None] * weights if self.pairs else weights.square()
        self.found[param] = products * factors


def exact(like: Tensor) -> torch.autocast:
    """Return a context without autocast, which would round matrix products to 16 bits."""
    return torch.autocast(like.device.type, enabled=False)


def _flat(grads: Tensor) -> Tensor:
    return grads.to(wide_dtype(grads)).reshape(len(grads), -1)


def _rows(factor: Tensor) -> Tensor:
    """Return ``[examples * rows of each, columns]``."""
    return factor.to(wide_dtype(factor)).flatten(0, 1)


def _gram(rows: Tensor) -> Tensor:
    return _scalar_products(rows, rows)


def _scalar_products(first: Tensor, second: Tensor) -> Tensor:
    """Return the scalar products of all pairs of rows, float64 ``[n, m]``.

    Blocks of columns are multiplied in the precision of the rows and added up in float64.
    """
    total = first.new_zeros(len(first), len(second), dtype=torch.float64)
    for a, b in zip(first.split(_COLUMNS, 1), second.split(_COLUMNS, 1), strict=True):
        total += a @ b.t()
    return total
