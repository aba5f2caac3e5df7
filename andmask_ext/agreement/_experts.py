"""Products of rows with the matrix of their expert, as mixtures of experts compute them."""

from __future__ import annotations

from itertools import pairwise

from ._contributions import Matrices, Outer, ids_of_axis
from ._groups import group_rows
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
    groups = node_grad.groups
    ids = ids_of_axis(groups, node_grad.layout)
    products: list[Outer | None] = []
    for own in (slice(*block) for block in pairwise([0, *ends.tolist()])):
        if own.start == own.stop:
            products.append(None)
            continue
        partition = group_rows(ids[own], groups.environments)
        deltas, inputs = delta[own].unsqueeze(1), rows[own].unsqueeze(1)
        products.append(Outer(deltas, inputs, partition, shape[1:]))
    return Matrices(products, delta, shape)
