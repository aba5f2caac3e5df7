"""Products of rows with the matrix of their expert, as mixtures of experts compute them."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

from ._contributions import Matrices, Outer, ids_of_axis
from ._groups import Groups, group_blocks
from ._layout import Layout
from ._node_gradient import NodeGradient


def grouped_mm(node_grad: NodeGradient, edge: int, shape: tuple[int, ...]) -> Matrices | None:
    """Return the contribution to ``operand`` of ``torch._grouped_mm(rows, operand, offs=ends)``.

    The rows are sorted by expert. The gradient of an expert in an environment is the sum of the
    outer products of the rows that both have. Rows after the last end have none.

    Args:
        node_grad: the gradient of the products ``[rows, O]``.
        edge: the input that the operand is; 1: the matrices.
        shape: the shape of the operand ``[experts, I, O]``.

    Returns:
        None: the rows are not those of the output, as in the other forms of the function.
    """
    ends, delta = node_grad.saved("offs"), node_grad.delta
    if edge != 1 or len(shape) != 3 or delta.dim() != 2 or node_grad.layout.axis != 0:
        return None
    rows = node_grad.saved("self").to(delta.dtype)
    counts = tuple(end - begin for begin, end in pairwise([0, *ends.tolist()]))
    partitions = _partitions(node_grad.groups, node_grad.layout, counts)
    used = sum(counts)
    factors = (factor[:used, None].split(counts) for factor in (delta, rows))
    products = [
        None if partition is None else Outer(deltas, inputs, partition, shape[1:])
        for partition, deltas, inputs in zip(partitions, *factors, strict=True)
    ]
    return Matrices(products, delta, shape)


@lru_cache(maxsize=1)  # the products of a layer have the same rows
def _partitions(groups: Groups, layout: Layout, counts: tuple[int, ...]) -> list[Groups | None]:
    """Return the partition of the rows of each expert; None: it has none."""
    return group_blocks(ids_of_axis(groups, layout), groups.environments, counts)
