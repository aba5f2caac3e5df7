"""Losses that are no mean over the examples, or no sum, as far as the graph next to the root tells.

Nothing is said of a loss of which it is not certain: of one that is divided or multiplied, or that
has terms of several kinds.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.autograd.graph import Node

from .._loss_nodes import NLL, REDUCED, SAME, SCALINGS, TERMS, ends
from ._groups import Groups
from ._nodes import saved
from ._uneven import amounts_of_labels, ignored_index

_SUMS = ("SumBackward0", "SumBackward1")
_MEANS = ("MeanBackward0", "MeanBackward1")


def losses_that_are_no_mean(
    roots: Sequence[Node],
    groups: Groups,
    batch_dim: int,
    reduction: str,
    corrected: bool = False,
) -> str | None:
    """Return what is wrong with a loss for ``loss_reduction``, and the remedy, or None.

    It looks at the nodes between the root and the first reduction, before the backward pass. On
    CUDA it waits for the device where labels are counted, so call it once for each graph.

    Args:
        roots: the nodes of the losses.
        groups: the partition of the batch.
        batch_dim: the batch dimension.
        reduction: ``"mean"`` or ``"sum"``, as the loss is expected.
        corrected: whether it is known what each environment counts in the loss.
    """
    if groups.environments == 1:
        return None
    if reduction == "mean" and not corrected:
        for node in ends(roots, (*SAME, *TERMS, *SCALINGS)):
            cause = _uneven(node, groups, batch_dim) if node.name() in NLL else None
            if cause:
                return cause
    terms = ends(roots, (*SAME, *TERMS))
    kinds = {_kind(node, groups.examples, batch_dim) for node in terms}
    if kinds == {"sum"} and reduction == "mean":
        return (
            "Agreement: loss_reduction='mean' expects the mean over the examples of the batch, but "
            "the loss is their sum, so gradients are too large by the number of examples; pass "
            "loss_reduction='sum' to Agreement"
        )
    if kinds == {"mean"} and reduction == "sum":
        return (
            "Agreement: loss_reduction='sum' expects the sum over the examples of the batch, but "
            "the loss is their mean, so gradients are too small by the number of examples; pass "
            "loss_reduction='mean' to Agreement"
        )
    return None


def is_scaled(root: Node) -> bool:
    """Return whether a loss is a number times another scalar, or divided by a number."""
    if root.name() not in ("DivBackward0", "MulBackward0") or len(root.next_functions) != 2:
        return False
    (one, _), (two, _) = root.next_functions
    if (one is None) == (two is None):
        return False
    other = saved(root, "other" if two is None else "self")
    return isinstance(other, Tensor) and other.dim() == 0 and float(other) != 1.0


def _uneven(node: Node, groups: Groups, batch_dim: int) -> str | None:
    """Return what makes the environments count unevenly in a mean of cross entropies."""
    labels = None
    if saved(node, "reduction") == 1:
        labels = _by_example(saved(node, "target"), groups.examples, batch_dim)
    if labels is None or amounts_of_labels(node, labels, groups) is None:
        return None
    start = (
        "Agreement: expected a loss that is a mean over the examples, or one cross entropy of the "
        "outputs of the model, in their order and without other terms, but cross_entropy or "
        "nll_loss "
    )
    if saved(node, "weight") is not None:
        return (
            f"{start}with weight divides by the class weights of the batch, so an environment "
            "counts by its labels; take losses = cross_entropy(..., weight=..., reduction='none') "
            "and losses.mean()"
        )
    return (
        f"{start}ignores labels (ignore_index={ignored_index(node)}) and divides by the rest, so "
        "an environment counts by its labels; take losses = cross_entropy(..., reduction='none'), "
        "their mean over the labels of each example, and the mean of these"
    )


def _by_example(target: Tensor, examples: int, batch_dim: int) -> Tensor | None:
    """Return labels as ``[examples, labels of each]``, or None if it is not certain which is whose.

    Labels that were flattened are in the order of a model whose batch is in ``batch_dim``.
    """
    if target.dim() == 0 or target.numel() % examples:
        return None
    if target.shape[0] == examples or (target.dim() == 1 and batch_dim == 0):
        return target.reshape(examples, -1)
    return target.reshape(-1, examples).T if target.dim() == 1 and batch_dim == 1 else None


def _kind(node: Node, examples: int, batch_dim: int) -> str | None:
    """Return "sum" or "mean" if a term of the loss is certain to be that of the examples."""
    if node.name() in REDUCED:
        target = saved(node, "target")
        whole = target.dim() > batch_dim and target.shape[batch_dim] == examples
        if not whole and _by_example(target, examples, batch_dim) is None:
            return None
        return {1: "mean", 2: "sum"}.get(saved(node, "reduction"))
    if node.name() in (*_SUMS, *_MEANS):
        return _kind_of_reduction(node, examples, batch_dim)
    return None


def _kind_of_reduction(node: Node, examples: int, batch_dim: int) -> str | None:
    """Return what a reduction does to the batch, if its input holds the batch where expected."""
    sizes: tuple[int, ...] = tuple(saved(node, "self_sym_sizes"))
    # Of one value per example no dimension but the first is left.
    axis = batch_dim if len(sizes) > batch_dim else 0
    if not sizes or sizes[axis] != examples or sizes.count(examples) > 1:
        return None
    source = node.next_functions[0][0]
    while source is not None and source.name() in SAME:
        source = source.next_functions[0][0]
    # A factor may make it a mean, or weigh the examples.
    if source is None or source.name() in (*SCALINGS, *_SUMS[:1], *_MEANS[:1]):
        return None
    if source.name() in (_SUMS[1], _MEANS[1]):
        before = tuple(saved(source, "self_sym_sizes"))
        if len(before) <= axis or before[axis] != examples or axis in _dims(source, len(before)):
            return None
    return "sum" if node.name() in _SUMS else "mean"


def _dims(node: Node, count: int) -> set[int]:
    """Return the dimensions over which a node reduces."""
    dims = tuple(saved(node, "dim") or range(count))
    return {(dim - 2**64 if dim >= 2**63 else dim) % count for dim in dims}
