"""Scalar products of the gradients of environments, without the gradients where that is cheaper."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._dtypes import wide_dtype
from .._norms import squared_norms
from ._contributions import Outer, add_up
from ._groups import Groups

# Of one parameter, the gradients of so many environments are held at once as fit into this. More
# have to be made again for every other part, and then it is the time that grows.
SCRATCH_BYTES = 256 << 20

_COLUMNS = 1 << 16

Part = Callable[[int, int], Tensor]  # gradients of environments [begin, end) of one parameter


class Gramian:
    """Of one backward pass.

    Args:
        pairs: of all pairs of environments, ``[d, d]``; else of each with itself, ``[d]``.
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

    def of_factors(self, param: int, use: Outer) -> bool:
        """Take the products from the factors of outer products, if that is cheaper.

        With ``G_e`` the sum of ``d a^T`` over the rows of e, the scalar product of two of them is
        the sum of ``(a . a')(d . d')`` over pairs of rows.
        """
        environments = self._groups.environments
        examples, each = use.activations.shape[:2]
        rows = examples * each
        partners = rows if self.pairs else rows // environments  # of each row
        if use.groups.environments != environments or rows * partners * 4 > SCRATCH_BYTES:
            return False
        if not self.pairs and (use.groups.size is None or partners > 1):
            return False
        columns = use.activations.shape[2], use.grads.shape[2]
        gradients = columns[0] * columns[1]
        products = environments**2 * gradients if self.pairs else 0
        if rows * partners * sum(columns) > rows * gradients + products:
            return False
        factors = [_rows(factor) for factor in (use.activations, use.grads)]
        if self.pairs:
            with exact(factors[0]):
                found = _product(factors[0]) * _product(factors[1])
            if use.groups.size != 1 or each != 1:
                ids = use.groups.ids.repeat_interleave(each).to(found.device)
                half = found.new_zeros(environments, rows).index_add_(0, ids, found)
                found = half.new_zeros(environments, environments).index_add_(1, ids, half)
        else:
            found = squared_norms(factors[0]) * squared_norms(factors[1])
        self._keep(param, found)
        return True

    def of_gradients(self, param: int, parts: Sequence[Part], like: Tensor) -> None:
        """Take the products from gradients of as many environments as may be held."""
        count = self._groups.environments
        step = max(1, SCRATCH_BYTES // max(1, 2 * like.numel() * max(4, like.element_size())))
        blocks = [(begin, min(begin + step, count)) for begin in range(0, count, step)]
        found: Tensor | None = None
        for number, (begin, end) in enumerate(blocks):
            grads = _flat(add_up(parts, begin, end))
            if found is None:
                shape = (count, count) if self.pairs else (count,)
                found = grads.new_zeros(shape, dtype=torch.float64)
            if not self.pairs:
                found[begin:end] = squared_norms(grads)
                continue
            for first, last in blocks[number:]:
                others = grads if first == begin else _flat(add_up(parts, first, last))
                corner = _scalar_products(grads, others)
                found[begin:end, first:last] = corner
                found[first:last, begin:end] = corner.t()
        assert found is not None
        self._keep(param, found)

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


def _product(rows: Tensor) -> Tensor:
    return _scalar_products(rows, rows)


def _scalar_products(rows: Tensor, others: Tensor) -> Tensor:
    """Return them in float64, of parts that are added up in the precision of the rows."""
    total = rows.new_zeros(len(rows), len(others), dtype=torch.float64)
    for part, other in zip(rows.split(_COLUMNS, 1), others.split(_COLUMNS, 1), strict=True):
        total += part @ other.t()
    return total
