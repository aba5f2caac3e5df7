"""From a node of the autograd graph to uses of its operands: one formula per type of node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .._dtypes import wide_dtype
from ._contributions import (
    Contribution,
    Convolution,
    Lookup,
    OneByOne,
    Outer,
    OuterBatch,
    Stacked,
    groups_of_axis,
    ids_of_axis,
)
from ._graph import Operand
from ._groups import Groups
from ._layout import Layout, environment_sum
from ._nodes import aside, call_node, saved

_NO_PADDING = (2**64 - 1, -1)


@dataclass
class NodeGradient:
    """The gradients of a node's outputs have arrived.

    Attributes:
        node: the node.
        deltas: the gradient of each of its outputs.
        layouts: where the batch lies in each.
        groups: the environments.
    """

    node: Node
    deltas: tuple[Tensor | None, ...]
    layouts: tuple[Layout | None, ...]
    groups: Groups

    @property
    def delta(self) -> Tensor:
        """The gradient of the only output."""
        delta = self.deltas[0]
        assert delta is not None
        return delta

    @property
    def layout(self) -> Layout:
        """Where the batch lies in it."""
        layout = self.layouts[0]
        assert layout is not None
        return layout

    def saved(self, name: str) -> Any:
        return saved(self.node, name)

    def rows(self, matrix: Tensor) -> Tensor:
        return self.layout.rows(matrix, self.groups.examples)

    def summed(self, products: Tensor, shape: tuple[int, ...]) -> Contribution | None:
        grads = environment_sum(products, self.layout, self.groups, shape)
        return None if grads is None else Stacked(grads, shape)


Formula = Callable[[NodeGradient, int, tuple[int, ...]], Contribution | None]


def _product(at: NodeGradient, inputs: Tensor, factor: float) -> Contribution | None:
    """Of ``inputs @ operand``, examples in the rows."""
    if at.layout.axis != 0:
        return None
    delta = at.delta if factor == 1 else at.delta * factor
    rows, deltas = at.rows(inputs.to(delta.dtype)), at.rows(delta)
    return Outer(deltas, rows, at.groups, (inputs.shape[1], delta.shape[1]))


def _addmm(at: NodeGradient, edge: int, shape: tuple[int, ...]) -> Contribution | None:
    if edge == 0:
        beta = at.saved("beta")
        return at.summed(at.delta if beta == 1 else at.delta * beta, shape)
    return _product(at, at.saved("mat1"), at.saved("alpha")) if edge == 2 else None


def _mm(at: NodeGradient, edge: int, shape: tuple[int, ...]) -> Contribution | None:
    return _product(at, at.saved("self"), 1) if edge == 1 else None


def _bmm(at: NodeGradient, edge: int, shape: tuple[int, ...]) -> Contribution | None:
    layout = at.layout
    if at.delta.shape[0] != 1:
        if edge != 1 or layout.axis != 1:
            return None
        inputs, grads = (
            torch.stack([layout.rows(one, at.groups.examples) for one in factor])
            for factor in (at.saved("self"), at.delta)
        )
        return OuterBatch(inputs, grads, at.groups, shape)
    delta, rows = at.delta[0], Layout(0, layout.before, layout.after)
    if edge == 1 and layout.axis == 1:
        use = _product(NodeGradient(at.node, (delta,), (rows,), at.groups), at.saved("self")[0], 1)
    elif edge == 0 and layout.axis == 2:
        moved = NodeGradient(at.node, (delta.t(),), (rows,), at.groups)
        use = _product(moved, at.saved("mat2")[0].t(), 1)
        use = use.transposed() if isinstance(use, Outer) else None
    else:
        return None
    if isinstance(use, Outer):
        use.shape = shape
    return use


def _trilinear(at: NodeGradient, edge: int, shape: tuple[int, ...]) -> Contribution | None:
    left, right = at.saved("i1"), at.saved("i3")
    if edge != 1 or at.layout.axis != 0 or left.dim() != 2 or right.dim() != 2:
        return None
    pairs = (left.unsqueeze(2) * right.unsqueeze(1)).flatten(1)
    return Outer(at.rows(pairs), at.rows(at.delta), at.groups, shape)


def _channel_sums(
    at: NodeGradient, products: Tensor, shape: tuple[int, ...]
) -> Contribution | None:
    """Sum ``[examples, channels, ...]`` over positions, and over examples of an environment."""
    if at.layout.axis != 0:
        return None
    wide = wide_dtype(products)
    sums = products.flatten(2).sum(2, dtype=wide) if products.dim() > 2 else products
    return at.summed(sums, shape[:1])


def _convolution(at: NodeGradient, edge: int, shape: tuple[int, ...]) -> Contribution | None:
    delta = at.delta
    if edge == 2:
        return (
            at.summed(delta.flatten(2).sum(2, dtype=None), shape) if at.layout.axis == 0 else None
        )
    if edge != 1 or at.layout.axis != 0:
        return None
    images, grads = at.saved("input").to(delta.dtype), delta
    if at.saved("transposed"):
        images, grads = grads, images
    spatial = delta.dim() - 2
    stride, padding, dilation = (
        [int(one) for one in at.saved(name)] * (spatial if len(at.saved(name)) == 1 else 1)
        for name in ("stride", "padding", "dilation")
    )
    return Convolution(
        images, grads, groups_of_axis(at.groups, at.layout), shape,
        stride, padding, dilation, at.saved("groups"),
    )  # fmt: skip


def _embedding(at: NodeGradient, edge: int, shape: tuple[int, ...]) -> Contribution | None:
    _refuse_sparse(at)
    if at.saved("scale_grad_by_freq"):
        return None
    lines = at.saved("indices")
    if at.layout.axis >= lines.dim():
        return None
    environments = _environments(at.layout, at.groups, lines).flatten()
    return _lookup(at.delta.reshape(-1, shape[1]), lines.flatten(), environments, at, shape)


def _embedding_bag(at: NodeGradient, edge: int, shape: tuple[int, ...]) -> Contribution | None:
    _refuse_sparse(at)
    mode = at.saved("mode")
    if at.saved("scale_grad_by_freq") or mode == 2 or edge != 0 or at.layout.axis != 0:
        return None
    bags, offsets, indices = at.saved("result1"), at.saved("offsets"), at.saved("indices")
    if bags.numel() < indices.numel():  # the kernel had no need of it
        places = torch.arange(len(indices), device=indices.device)
        bags = torch.searchsorted(offsets, places, right=True) - 1
    delta = at.delta
    if mode == 1:
        delta = delta / at.saved("result2").clamp(min=1).unsqueeze(1).to(delta.dtype)
    rows = delta[bags]
    factors = at.saved("per_sample_weights")
    if factors is not None:
        rows = rows * factors.unsqueeze(1)
    environments = ids_of_axis(at.groups, at.layout).to(bags.device)[bags]
    return _lookup(rows, at.saved("indices"), environments, at, shape)


def _refuse_sparse(at: NodeGradient) -> None:
    if at.saved("sparse"):
        raise TypeError(
            "Agreement: expected dense gradients, but got an embedding with sparse=True; "
            "construct it with sparse=False"
        )


def _environments(layout: Layout, groups: Groups, like: Tensor) -> Tensor:
    """Return the environment of each element of ``like``, in its shape."""
    ids = ids_of_axis(groups, layout).to(like.device)
    shape = [1] * like.dim()
    shape[layout.axis] = len(ids)
    return ids.view(shape).expand(like.shape)


def _lookup(
    rows: Tensor, lines: Tensor, environments: Tensor, at: NodeGradient, shape: tuple[int, ...]
) -> Contribution:
    padding = at.saved("padding_idx")
    if padding not in _NO_PADDING:
        real = lines != padding
        rows, lines, environments = rows[real], lines[real], environments[real]
    return Lookup(rows, lines.long(), environments, shape)


def _layer_norm(at: NodeGradient, edge: int, shape: tuple[int, ...]) -> Contribution | None:
    if edge == 2:
        return at.summed(at.delta, shape)
    normalized = (at.saved("input") - at.saved("result1")) * at.saved("result2")
    return at.summed(at.delta * normalized, shape)


def _rms_norm(at: NodeGradient, edge: int, shape: tuple[int, ...]) -> Contribution | None:
    return at.summed(at.delta * (at.saved("input") * at.saved("result1")), shape)


def _group_norm(at: NodeGradient, edge: int, shape: tuple[int, ...]) -> Contribution | None:
    if at.layout.axis != 0:
        return None
    delta = at.delta
    if edge == 2:
        return _channel_sums(at, delta, shape)
    inputs = at.saved("input")
    count, channels = inputs.shape[:2]
    groups = at.saved("group")
    mean, rstd = (
        at.saved(name).view(count, groups, 1).to(delta.dtype) for name in ("result1", "result2")
    )
    # sum of delta * (x - mean) * rstd over positions, by two sums that read each tensor once
    delta, inputs = delta.reshape(count, channels, -1), inputs.reshape(count, channels, -1)
    products = torch.bmm(
        delta.reshape(count * channels, 1, -1), inputs.reshape(count * channels, -1, 1)
    ).view(count, groups, -1)
    plain = delta.sum(2).view(count, groups, -1)
    return at.summed(((products - mean * plain) * rstd).view(count, channels), shape)


def _batch_norm(at: NodeGradient, edge: int, shape: tuple[int, ...]) -> Contribution | None:
    """In evaluation mode an affine map; in training mode for one environment only."""
    delta = at.delta
    if at.layout.axis != 0:
        return None
    if edge == 1:
        view = (1, -1) + (1,) * (delta.dim() - 2)
        if at.saved("training"):
            mean, rstd = at.saved("result1"), at.saved("result2")
        else:
            mean = at.saved("running_mean")
            rstd = (at.saved("running_var") + at.saved("eps")).rsqrt()
        delta = delta * (at.saved("input") - mean.view(view)) * rstd.view(view)
    return _channel_sums(at, delta, shape)


def _prelu(at: NodeGradient, edge: int, shape: tuple[int, ...]) -> Contribution | None:
    inputs = at.saved("self")
    return at.summed(at.delta * inputs.clamp(max=0), shape) if edge == 1 else None


def _scaled(value: Tensor, factor: float) -> Tensor:
    return value if factor == 1 else value * factor


def _add(at: NodeGradient, edge: int, shape: tuple[int, ...]) -> Contribution | None:
    return at.summed(at.delta if edge == 0 else _scaled(at.delta, at.saved("alpha")), shape)


def _sub(at: NodeGradient, edge: int, shape: tuple[int, ...]) -> Contribution | None:
    return at.summed(at.delta if edge == 0 else at.delta * -at.saved("alpha"), shape)


def _rsub(at: NodeGradient, edge: int, shape: tuple[int, ...]) -> Contribution | None:
    return at.summed(_scaled(-at.delta, at.saved("alpha")) if edge == 0 else at.delta, shape)


def _mul(at: NodeGradient, edge: int, shape: tuple[int, ...]) -> Contribution | None:
    return at.summed(at.delta * at.saved("other" if edge == 0 else "self"), shape)


def _div(at: NodeGradient, edge: int, shape: tuple[int, ...]) -> Contribution | None:
    quotient = at.delta / at.saved("other")
    if edge == 1:
        quotient = -quotient * (at.saved("self") / at.saved("other"))
    return at.summed(quotient, shape)


def _expand(at: NodeGradient, edge: int, shape: tuple[int, ...]) -> Contribution | None:
    return at.summed(at.delta, shape)


def _repeat(at: NodeGradient, edge: int, shape: tuple[int, ...]) -> Contribution | None:
    repeats = [int(count) for count in at.saved("repeats")]
    own = (1,) * (len(repeats) - len(shape)) + shape
    layout = at.layout
    if layout.after % own[layout.axis]:
        return None
    inner = layout.after // own[layout.axis]
    split = [size for pair in zip(repeats, own, strict=True) for size in pair]
    moved = NodeGradient(
        at.node, (at.delta.reshape(split),), (Layout(2 * layout.axis, layout.before, inner),),
        at.groups,
    )  # fmt: skip
    use = moved.summed(moved.delta, tuple(size for one in own for size in (1, one)))
    if isinstance(use, Stacked):
        use = Stacked(use.grads.reshape(-1, *shape), shape)
    return use


# Formulas, and the axes in which the batch may lie (None: any).
FORMULAS: dict[str, tuple[Formula, tuple[int, ...] | None]] = {
    "AddBackward0": (_add, None),
    "AddmmBackward0": (_addmm, (0, 1)),
    "BmmBackward0": (_bmm, (0, 1, 2)),
    "ConvolutionBackward0": (_convolution, (0,)),
    "DivBackward0": (_div, None),
    "EmbeddingBackward0": (_embedding, None),
    "EmbeddingBagBackward0": (_embedding_bag, (0,)),
    "ExpandBackward0": (_expand, None),
    "FusedRmsNormBackward0": (_rms_norm, None),
    "MmBackward0": (_mm, (0, 1)),
    "MulBackward0": (_mul, None),
    "NativeBatchNormBackward0": (_batch_norm, (0,)),
    "NativeGroupNormBackward0": (_group_norm, (0,)),
    "NativeLayerNormBackward0": (_layer_norm, None),
    "PreluKernelBackward0": (_prelu, None),
    "RepeatBackward0": (_repeat, None),
    "RsubBackward0": (_rsub, None),
    "SubBackward0": (_sub, None),
    "TrilinearBackward0": (_trilinear, (0,)),
}


# Of matrix products: by the operand that is made of parameters.
_PRODUCT_AXES = {
    ("AddmmBackward0", 1): (1,),
    ("AddmmBackward0", 2): (0,),
    ("BmmBackward0", 0): (2,),
    ("BmmBackward0", 1): (1,),
    ("MmBackward0", 0): (1,),
    ("MmBackward0", 1): (0,),
}


def axes_of(name: str, edge: int | None = None) -> tuple[int, ...] | None:
    """Return where the batch may lie in the output of a node of this type; None: anywhere.

    Args:
        name: the type.
        edge: the input that is made of parameters; None: any of them.
    """
    if (name, edge) in _PRODUCT_AXES:
        return _PRODUCT_AXES[name, edge]  # type: ignore[index]
    return FORMULAS[name][1] if name in FORMULAS else None


def make_contribution(at: NodeGradient, name: str, operand: Operand) -> Contribution:
    """Return the use of an operand, by the formula of the node's type or by calling the node."""
    delta = at.deltas[0]
    known = name in FORMULAS and at.layouts[0] is not None
    if known and delta is not None and not delta.is_complex():
        use = FORMULAS[name][0](at, operand.edge, operand.shape)
        if use is not None:
            return use
    return _one_by_one(at, name, operand)


def _one_by_one(at: NodeGradient, name: str, operand: Operand) -> Contribution:
    environments = [
        None if delta is None or layout is None else _environments(layout, at.groups, delta)
        for delta, layout in zip(at.deltas, at.layouts, strict=True)
    ]
    only = at.groups.environments == 1  # then there may be no layout
    some = next(delta for delta in at.deltas if delta is not None)

    def gradients(begin: int, end: int) -> list[Tensor]:
        # The formula is linear in the deltas: with those of one environment only, it gives the
        # gradient of that environment.
        found = []

        def body() -> None:
            for environment in range(begin, end):
                alone = list(at.deltas)
                if not only:
                    alone = [
                        None
                        if delta is None or ids is None
                        else torch.where(ids == environment, delta, torch.zeros_like(delta))
                        for ids, delta in zip(environments, at.deltas, strict=True)
                    ]
                gradient = call_node(at.node, operand.edge, alone)
                if gradient is None:
                    gradient = some.new_zeros(operand.shape)
                found.append(gradient.sum_to_size(operand.shape))  # as the engine does

        aside(body)
        return found

    return OneByOne(gradients, operand.shape, f"{name}, once per environment")
