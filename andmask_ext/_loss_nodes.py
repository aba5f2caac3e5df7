"""Names of the autograd nodes that stand between a loss and what it is the loss of."""

from __future__ import annotations

from collections.abc import Sequence

from torch.autograd.graph import Node

NLL = ("NllLossBackward0", "NllLoss2DBackward0")
# Losses with the argument reduction: 0 is none, 1 the mean, 2 the sum.
REDUCED = (
    *NLL, "BinaryCrossEntropyBackward0", "BinaryCrossEntropyWithLogitsBackward0",
    "HuberLossBackward0", "MseLossBackward0", "MultiMarginLossBackward0",
    "MultilabelMarginLossBackward0", "SmoothL1LossBackward0", "SoftMarginLossBackward0",
)  # fmt: skip
SCALINGS = ("DivBackward0", "MulBackward0", "DivBackward1", "MulBackward1")
TERMS = ("AddBackward0", "SubBackward0")
SAME = (
    "AliasBackward0", "CloneBackward0", "NegBackward0", "ReshapeAliasBackward0",
    "SqueezeBackward0", "SqueezeBackward1", "ToCopyBackward0", "UnsqueezeBackward0",
    "ViewBackward0",
)  # fmt: skip
MOST = 64  # nodes that are looked at; a loss has a few


def ends(roots: Sequence[Node], through: Sequence[str]) -> list[Node]:
    """Return where the terms of a loss end: the first nodes that are none of ``through``.

    A node of ``through`` is an end, too, if its output has another number of elements than the
    first root.
    """
    stack, seen = list(roots), set(roots)
    found = []
    elements = _elements(stack[0]) if stack else 1
    while stack and len(seen) < MOST:
        node = stack.pop()
        if node.name() not in through or _elements(node) != elements:
            found.append(node)
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return found + stack


def _elements(node: Node) -> int:
    count = 1
    for size in node._input_metadata[0].shape:
        count *= int(size)
    return count
