"""Cross entropies that divide by labels or class weights: what each environment counts in them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Set

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .._loss_nodes import NLL, SAME, SCALINGS, TERMS
from ._groups import Groups
from ._nodes import saved, shape_of

# Nodes between a cross entropy and the output of a model that leave every row where it is, ...
_KEEP = (
    "AliasBackward0", "CloneBackward0", "LogSoftmaxBackward0", "TanhBackward0", "ToCopyBackward0",
)  # fmt: skip
# ... that change the shape alone, ...
_VIEWS = (
    "ReshapeAliasBackward0", "SqueezeBackward0", "SqueezeBackward1", "UnsafeViewBackward0",
    "UnsqueezeBackward0", "ViewBackward0",
)  # fmt: skip
# ... and where a walk ends that finds no output: some models return their loss only.
_LAYERS = ("AddmmBackward0", "ConvolutionBackward0", "MmBackward0")

_OF_ONE = ("MeanBackward0", "SumBackward0", "StackBackward0")  # nothing, of one number


def amounts_of_loss(
    roots: Sequence[Node],
    groups: Groups,
    outputs: Set[Node],
    output_dim: int,
    scale: float | None = None,
) -> Tensor | None:
    """Return how much each environment counts in a mean that does not divide by the examples.

    ``cross_entropy`` and ``nll_loss`` divide by the labels that are not ignored, or by their class
    weights. None: all examples count alike, the loss has other terms or factors that are no
    numbers, or it is not certain which label belongs to which example.

    Args:
        roots: the nodes of the losses.
        groups: the partition of the examples of the loss.
        outputs: the nodes of the outputs of the model.
        output_dim: their batch dimension.
        scale: that of a gradient scaler, which may be 1; None: there is none.

    Returns:
        float64 ``[environments]`` on the CPU.
    """
    end = _only_end(roots, scale) if groups.environments > 1 else None
    if end is None or end.name() not in NLL or saved(end, "reduction") != 1:
        return None
    for labels, before in _readings(end, groups.examples):
        if _arrives(end, before, groups.examples, outputs, output_dim):
            return amounts_of_labels(end, labels, groups)
    return None


def amounts_of_labels(node: Node, labels: Tensor, groups: Groups) -> Tensor | None:
    """Return how much the labels of each environment count in a mean, if not as its examples.

    Args:
        node: of the cross entropy.
        labels: int64 ``[examples, labels of each]``.
        groups: the partition of the examples.
    """
    weight, ignored = saved(node, "weight"), ignored_index(node)
    if weight is None and labels.is_cuda and labels.shape[1] == 1:
        return None  # it would wait for the device, to see whether whole examples are ignored
    counted = labels != ignored
    if weight is None and bool(counted.all()):
        return None
    amounts = counted.double()
    if weight is not None:
        amounts *= weight.double()[labels.clamp(0, len(weight) - 1)]
    sums = torch.zeros(groups.environments, dtype=torch.float64)
    sums.index_add_(0, groups.ids, amounts.sum(1).cpu())
    means = sums / groups.sizes
    return None if bool(means.max() - means.min() <= 1e-5 * means.max()) else sums


def ignored_index(node: Node) -> int:
    """Return the label that a cross entropy leaves out."""
    return _signed(saved(node, "ignore_index"))


def _only_end(roots: Sequence[Node], scale: float | None) -> Node | None:
    """Return the node that a loss is a multiple of, plus a number; None: it has several terms."""
    if len(roots) != 1:
        return None
    node = roots[0]
    while True:
        name = node.name()
        following = [other for other, _ in node.next_functions if other is not None]
        if len(following) != 1:
            return node
        alone = name in _OF_ONE and math.prod(shape_of(following[0])) == 1
        if name in SCALINGS:
            if not _is_number(node, scale):
                return None
        elif not (alone or name in SAME or name in TERMS):
            return node
        node = following[0]


def _is_number(node: Node, scale: float | None) -> bool:
    """Return whether the factor of a scaling is a number, and none that is made of the batch."""
    name = "_saved_other" if node.next_functions[0][0] is not None else "_saved_self"
    factor = getattr(node, name, None)
    if not isinstance(factor, Tensor):
        return True  # a division keeps no number above it
    # In the eyes of type promotion a number gives way to any tensor of its category.
    floating = factor.is_floating_point()
    probes = (torch.float16, torch.bfloat16) if floating else (torch.int8, torch.uint8)
    if all(torch.result_type(factor, torch.zeros((), dtype=probe)) == probe for probe in probes):
        return True
    return scale is not None and factor.numel() == 1 and float(factor) == scale


def _readings(node: Node, examples: int) -> Iterator[tuple[Tensor, int]]:
    """Yield the labels ``[examples, labels of each]``, in each way in which they can be read.

    With them comes the number of blocks of the scores, in memory, that hold all examples.
    """
    target = saved(node, "target")
    if target.dim() == 1 and target.numel() % examples == 0:
        each = target.numel() // examples
        yield target.view(examples, each), 1
        if each > 1:
            yield target.view(each, examples).T, each
    elif target.dim() > 1:
        scores = shape_of(node.next_functions[0][0])  # type: ignore[arg-type]
        for axis, size in enumerate(target.shape):
            if size == examples:
                labels = target.movedim(axis, 0).reshape(examples, -1)
                yield labels, math.prod(scores[: axis + (axis > 0)])


def _arrives(node: Node, before: int, examples: int, outputs: Set[Node], output_dim: int) -> bool:
    """Return whether rows read like that are those of the batch at an output of the model."""
    following = node.next_functions[0][0]
    while following is not None:
        node, name, shape = following, following.name(), shape_of(following)
        axis = _axis(shape, before, examples)
        if node in outputs:
            return axis == output_dim
        following = next((other for other, _ in node.next_functions if other is not None), None)
        if name in _LAYERS:
            return output_dim == 0 and before == 1
        if name in _VIEWS or name in _KEEP:
            continue
        if name in SCALINGS and following is not None and shape_of(following) == shape:
            continue
        moved = _before(node, name, axis)
        if moved is None or axis is None:
            return False
        sizes = tuple(map(int, shape if following is None else shape_of(following)))
        before = math.prod(sizes[:moved])
    return False


def _axis(shape: Sequence[int], before: int, examples: int) -> int | None:
    """Return the axis that holds the examples, or None if they are in a part of one."""
    count = 1
    for axis, size in enumerate(shape):
        if count == before and size == examples:
            return axis
        count *= size
    return None


def _before(node: Node, name: str, axis: int | None) -> int | None:
    """Return where an axis was before a node that moves or cuts axes; None: that is not known."""
    if axis is None:
        return None
    if name == "TransposeBackward0":
        count = len(shape_of(node))
        pair = [_signed(saved(node, key)) % count for key in ("dim0", "dim1")]
        return pair[1 - pair.index(axis)] if axis in pair else axis
    if name == "PermuteBackward0":
        dims = [_signed(dim) for dim in saved(node, "dims")]
        return dims[axis] % len(dims)
    if name in ("SliceBackward0", "SelectBackward0"):
        sizes = saved(node, "self_sym_sizes")
        dim = _signed(saved(node, "dim")) % len(sizes)
        if name == "SelectBackward0":
            return axis + (dim <= axis)
        return None if dim == axis else axis
    return None


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
