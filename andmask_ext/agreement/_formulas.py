"""Formulas of contributions: one per type of autograd node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .._dtypes import wide_dtype
from ._contributions import (
    Contribution,
    Convolution,
    Lookup,
    Matrices,
    OneByOne,
    Outer,
    Stacked,
    groups_of_axis,
    ids_of_axis,
)
from ._experts import grouped_mm
from ._graph import Operand
from ._node_gradient import NodeGradient, environments_of
from ._nodes import aside, call_node, computes_all, keep_all_checkpoints, refuse_sparse

_NO_PADDING = (2**64 - 1, -1)


Shape = tuple[int, ...]
Formula = Callable[[NodeGradient, int, Shape], Contribution | None]


def _product(node_grad: NodeGradient, inputs: Tensor, factor: float) -> Outer | None:
    """Return the contribution to ``operand`` of ``inputs @ operand``, examples in the rows."""
    if node_grad.layout.axis != 0:
        return None
    delta = _scaled(node_grad.delta, factor)
    rows, deltas = node_grad.rows(inputs.to(delta.dtype)), node_grad.rows(delta)
    return Outer(deltas, rows, node_grad.groups, (inputs.shape[1], delta.shape[1]))


def _scaled(value: Tensor, factor: float) -> Tensor:
    return value if factor == 1 else value * factor


def _addmm(node_grad: NodeGradient, edge: int, shape: Shape) -> Contribution | None:
    saved = node_grad.saved
    if edge == 0:
        return node_grad.summed(_scaled(node_grad.delta, saved("beta")), shape)
    return _product(node_grad, saved("mat1"), saved("alpha")) if edge == 2 else None


def _mm(node_grad: NodeGradient, edge: int, shape: Shape) -> Contribution | None:
    return _product(node_grad, node_grad.saved("self"), 1) if edge == 1 else None


def _bmm(node_grad: NodeGradient, edge: int, shape: Shape) -> Contribution | None:
    layout, saved = node_grad.layout, node_grad.saved
    if node_grad.delta.shape[0] != 1:
        if edge != 1 or layout.axis != 1:
            return None
        factors = zip(node_grad.delta, saved("self"), strict=True)
        products = [
            Outer(node_grad.rows(delta), node_grad.rows(rows), node_grad.groups, shape[1:])
            for delta, rows in factors
        ]
        return Matrices(products, node_grad.delta, shape)
    delta, rows = node_grad.delta[0], replace(layout, axis=0)
    if edge == 1 and layout.axis == 1:
        matrix_grad = NodeGradient(node_grad.node, (delta,), (rows,), node_grad.partitions)
        outer = _product(matrix_grad, saved("self")[0], 1)
    elif edge == 0 and layout.axis == 2:
        matrix_grad = NodeGradient(node_grad.node, (delta.t(),), (rows,), node_grad.partitions)
        outer = _product(matrix_grad, saved("mat2")[0].t(), 1)
        outer = None if outer is None else outer.transposed()
    else:
        return None
    if outer is not None:
        outer.shape = shape
    return outer


def _trilinear(node_grad: NodeGradient, edge: int, shape: Shape) -> Contribution | None:
    left, right = node_grad.saved("i1"), node_grad.saved("i3")
    if edge != 1 or node_grad.layout.axis != 0 or left.dim() != 2 or right.dim() != 2:
        return None
    pairs = (left.unsqueeze(2) * right.unsqueeze(1)).flatten(1)
    return Outer(node_grad.rows(pairs), node_grad.rows(node_grad.delta), node_grad.groups, shape)


def _channel_sums(node_grad: NodeGradient, products: Tensor, shape: Shape) -> Contribution | None:
    """Sum ``[examples, channels, ...]`` over positions and the examples of each environment."""
    if node_grad.layout.axis != 0:
        return None
    wide = wide_dtype(products)
    sums = products.flatten(2).sum(2, dtype=wide) if products.dim() > 2 else products
    return node_grad.summed(sums, shape[:1])


def _convolution(node_grad: NodeGradient, edge: int, shape: Shape) -> Contribution | None:
    delta, saved = node_grad.delta, node_grad.saved
    if node_grad.layout.axis != 0 or edge == 0:
        return None
    if edge == 2:
        return node_grad.summed(delta.flatten(2).sum(2, dtype=None), shape)
    images, grads = saved("input").to(delta.dtype), delta
    spatial = delta.dim() - 2
    stride, padding, dilation = (
        [int(size) for size in sizes] * (spatial if len(sizes) == 1 else 1)
        for sizes in map(saved, ("stride", "padding", "dilation"))
    )
    if saved("transposed"):
        images, grads = grads, images
        if any(more >= step for more, step in zip(saved("output_padding"), stride, strict=True)):
            return None  # the kernel would fit into the image once more than there are gradients
    return Convolution(
        images, grads, groups_of_axis(node_grad.groups, node_grad.layout), shape,
        stride, padding, dilation, saved("groups"),
    )  # fmt: skip


def _embedding(node_grad: NodeGradient, edge: int, shape: Shape) -> Contribution | None:
    _refuse_sparse(node_grad)
    lines = node_grad.saved("indices")
    if node_grad.layout.axis >= lines.dim():
        return None
    environments = environments_of(node_grad.layout, node_grad.groups, lines).flatten()
    rows = node_grad.delta.reshape(-1, shape[1])
    return _lookup(node_grad, rows, lines.flatten(), environments, shape)


def _embedding_bag(node_grad: NodeGradient, edge: int, shape: Shape) -> Contribution | None:
    _refuse_sparse(node_grad)
    delta, layout, saved = node_grad.delta, node_grad.layout, node_grad.saved
    mode = saved("mode")
    if mode == 2 or edge != 0 or layout.axis != 0 or node_grad.groups.environments == 1:
        return None
    if saved("scale_grad_by_freq"):
        raise RuntimeError(
            "Agreement: expected an embedding bag with scale_grad_by_freq=False, but got True: "
            "torch divides its gradients by counts over all environments; use "
            "torch.nn.Embedding(..., scale_grad_by_freq=True) and add up the lines of each bag, "
            "or andmask_ext.backward"
        )
    bags, offsets, indices = saved("result1"), saved("offsets"), saved("indices")
    if bags.numel() < indices.numel():  # the kernel did not save the bags
        places = torch.arange(len(indices), device=indices.device)
        bags = torch.searchsorted(offsets, places, right=True) - 1
    if mode == 1:
        delta = delta / saved("result2").clamp(min=1).unsqueeze(1).to(delta.dtype)
    rows = delta[bags]
    factors = saved("per_sample_weights")
    if factors is not None:
        rows = rows * factors.unsqueeze(1)
    environments = ids_of_axis(node_grad.groups, layout).to(bags.device)[bags]
    return _lookup(node_grad, rows, indices, environments, shape)


def _refuse_sparse(node_grad: NodeGradient) -> None:
    if node_grad.saved("sparse"):
        refuse_sparse()


def _lookup(
    node_grad: NodeGradient, rows: Tensor, lines: Tensor, environments: Tensor, shape: Shape
) -> Contribution:
    padding = node_grad.saved("padding_idx")
    if padding not in _NO_PADDING:
        real = lines != padding
        rows, lines, environments = rows[real], lines[real], environments[real]
    if node_grad.saved("scale_grad_by_freq"):
        places = environments * shape[0] + lines
        _, place, counts = places.unique(return_inverse=True, return_counts=True)
        rows = rows / counts[place].unsqueeze(1).to(rows.dtype)
    return Lookup(rows, lines.long(), environments, shape)


def _layer_norm(node_grad: NodeGradient, edge: int, shape: Shape) -> Contribution | None:
    delta, saved = node_grad.delta, node_grad.saved
    if edge == 0:
        return None
    if edge == 1:
        delta = (saved("input") - saved("result1")).mul_(saved("result2")).mul_(delta)
    return node_grad.summed(delta, shape)


def _rms_norm(node_grad: NodeGradient, edge: int, shape: Shape) -> Contribution | None:
    if edge == 0:
        return None
    normalized = node_grad.saved("input") * node_grad.saved("result1")
    return node_grad.summed(normalized.mul_(node_grad.delta), shape)


def _group_norm(node_grad: NodeGradient, edge: int, shape: Shape) -> Contribution | None:
    delta, saved = node_grad.delta, node_grad.saved
    if node_grad.layout.axis != 0 or edge == 0:
        return None
    if edge == 2:
        return _channel_sums(node_grad, delta, shape)
    inputs, groups = saved("input"), saved("group")
    count, channels = inputs.shape[:2]
    mean, rstd = (
        saved(name).view(count, groups, 1).to(delta.dtype) for name in ("result1", "result2")
    )
    # The sum of delta * (x - mean) * rstd over positions, as two sums that read each tensor once.
    delta, inputs = delta.reshape(count, channels, -1), inputs.reshape(count, channels, -1)
    products = torch.bmm(
        delta.reshape(count * channels, 1, -1), inputs.reshape(count * channels, -1, 1)
    ).view(count, groups, -1)
    plain = delta.sum(2).view(count, groups, -1)
    return node_grad.summed(((products - mean * plain) * rstd).view(count, channels), shape)


def _batch_norm(node_grad: NodeGradient, edge: int, shape: Shape) -> Contribution | None:
    """In evaluation mode it is an affine map. Training mode works for one environment only."""
    delta, saved = node_grad.delta, node_grad.saved
    if node_grad.layout.axis != 0 or edge == 0:
        return None
    if edge == 1:
        view = (1, -1) + (1,) * (delta.dim() - 2)
        if saved("training"):
            mean, rstd = saved("result1"), saved("result2")
        else:
            mean, rstd = saved("running_mean"), (saved("running_var") + saved("eps")).rsqrt()
        delta = delta * (saved("input") - mean.view(view)) * rstd.view(view)
    return _channel_sums(node_grad, delta, shape)


def _prelu(node_grad: NodeGradient, edge: int, shape: Shape) -> Contribution | None:
    inputs = node_grad.saved("self")
    return node_grad.summed(node_grad.delta * inputs.clamp(max=0), shape) if edge == 1 else None


def _add(node_grad: NodeGradient, edge: int, shape: Shape) -> Contribution | None:
    factor = 1 if edge == 0 else node_grad.saved("alpha")
    return node_grad.summed(_scaled(node_grad.delta, factor), shape)


def _sub(node_grad: NodeGradient, edge: int, shape: Shape) -> Contribution | None:
    factor = 1 if edge == 0 else -node_grad.saved("alpha")
    return node_grad.summed(_scaled(node_grad.delta, factor), shape)


def _rsub(node_grad: NodeGradient, edge: int, shape: Shape) -> Contribution | None:
    factor = -node_grad.saved("alpha") if edge == 0 else 1
    return node_grad.summed(_scaled(node_grad.delta, factor), shape)


def _mul(node_grad: NodeGradient, edge: int, shape: Shape) -> Contribution | None:
    factor = node_grad.saved("other" if edge == 0 else "self")
    return node_grad.summed(node_grad.delta * factor, shape)


def _div(node_grad: NodeGradient, edge: int, shape: Shape) -> Contribution | None:
    quotient = node_grad.delta / node_grad.saved("other")
    if edge == 1:
        quotient = -quotient * (node_grad.saved("self") / node_grad.saved("other"))
    return node_grad.summed(quotient, shape)


def _expand(node_grad: NodeGradient, edge: int, shape: Shape) -> Contribution | None:
    return node_grad.summed(node_grad.delta, shape)


def _repeat(node_grad: NodeGradient, edge: int, shape: Shape) -> Contribution | None:
    repeats = [int(count) for count in node_grad.saved("repeats")]
    aligned = (1,) * (len(repeats) - len(shape)) + shape
    axis, after = node_grad.layout.axis, node_grad.layout.after
    if after % aligned[axis]:
        return None
    # With repeats and sizes in separate dimensions, repeat is a broadcast.
    split = [size for pair in zip(repeats, aligned, strict=True) for size in pair]
    layout = replace(node_grad.layout, axis=2 * axis, after=after // aligned[axis])
    delta = node_grad.delta.reshape(split)
    broadcast = NodeGradient(node_grad.node, (delta,), (layout,), node_grad.partitions)
    sums = broadcast.summed(delta, tuple(n for size in aligned for n in (1, size)))
    return None if sums is None else Stacked(sums.grads.reshape(-1, *shape), shape)


# Each type has a formula and the axes that may be the batch axis (None: any).
FORMULAS: dict[str, tuple[Formula, tuple[int, ...] | None]] = {
    "AddBackward0": (_add, None),
    "AddmmBackward0": (_addmm, (0, 1)),
    "BmmBackward0": (_bmm, (0, 1, 2)),
    "ConvolutionBackward0": (_convolution, (0, 1)),
    "DivBackward0": (_div, None),
    "EmbeddingBackward0": (_embedding, None),
    "EmbeddingBagBackward0": (_embedding_bag, (0, 1)),
    "ExpandBackward0": (_expand, None),
    "FusedRmsNormBackward0": (_rms_norm, None),
    "GroupedMmBackward0": (grouped_mm, None),
    "MmBackward0": (_mm, (0, 1)),
    "MulBackward0": (_mul, None),
    "NativeBatchNormBackward0": (_batch_norm, (0,)),
    "NativeGroupNormBackward0": (_group_norm, (0,)),
    "NativeLayerNormBackward0": (_layer_norm, None),
    "PreluKernelBackward0": (_prelu, None),
    "RepeatBackward0": (_repeat, None),
    "RsubBackward0": (_rsub, None),
    "SubBackward0": (_sub, None),
    "TrilinearBackward0": (_trilinear, (0, 1)),
}


# Products: the axes depend on which operand is computed from parameters. Where the data are the
# matrix, the kernels or the table, the batch may be a dimension of these.
_PRODUCT_AXES = {
    ("AddmmBackward0", 1): (1,), ("AddmmBackward0", 2): (0,),
    ("BmmBackward0", 0): (2, 0), ("BmmBackward0", 1): (1, 0),
    ("ConvolutionBackward0", 1): (0,), ("ConvolutionBackward0", 2): (0,),
    ("EmbeddingBagBackward0", 0): (0,),
    ("MmBackward0", 0): (1,), ("MmBackward0", 1): (0,), ("TrilinearBackward0", 1): (0,),
}  # fmt: skip


def axes_of(name: str, edge: int | None = None) -> tuple[int, ...] | None:
    """Return the possible batch axes in the output of a node of this type; None: any axis.

    Args:
        name: the type.
        edge: the input that is computed from parameters; None: any of them.
    """
    if (name, edge) in _PRODUCT_AXES:
        return _PRODUCT_AXES[name, edge]  # type: ignore[index]
    return FORMULAS[name][1] if name in FORMULAS else None


def make_contribution(node_grad: NodeGradient, name: str, operand: Operand) -> Contribution | None:
    """Return the contribution of a node to an operand, by the formula or by calling the node.

    It is None for an operand without elements.
    """
    if 0 in operand.shape:
        return None
    delta = node_grad.deltas[0]
    known = name in FORMULAS and node_grad.layouts[0] is not None
    if known and delta is not None and not delta.is_complex():
        contribution = FORMULAS[name][0](node_grad, operand.edge, operand.shape)
        if contribution is not None:
            return contribution
    return _one_by_one(node_grad, name, operand)


def gradient_of(node: Node, operand: Operand, deltas: Sequence[Tensor | None]) -> Tensor:
    """Return the gradient of an operand, by calling its node."""
    found: list[Tensor | None] = []
    aside(lambda: found.append(call_node(node, operand.edge, deltas)))
    grad = found[0]
    assert grad is not None
    return grad.sum_to_size(operand.shape)


def _one_by_one(node_grad: NodeGradient, name: str, operand: Operand) -> Contribution:
    deltas, partitions = node_grad.deltas, node_grad.partitions
    environments = [
        None
        if delta is None or layout is None
        else environments_of(layout, partitions[layout.partition], delta)
        for delta, layout in zip(deltas, node_grad.layouts, strict=True)
    ]
    like = next(delta for delta in deltas if delta is not None)

    def of_environment(environment: int) -> list[Tensor | None]:
        if partitions[0].environments == 1:  # then there may be no layout
            return list(deltas)
        return [
            None
            if delta is None or ids is None
            else torch.where(ids == environment, delta, torch.zeros_like(delta))
            for ids, delta in zip(environments, deltas, strict=True)
        ]

    def gradients(begin: int, end: int) -> list[Tensor]:
        # The formula is linear in the deltas: with those of one environment only, it gives the
        # gradient of that environment.
        by_environment = []
        keep_all_checkpoints(node_grad.node)

        def body() -> None:
            for environment in range(begin, end):
                grad = call_node(node_grad.node, operand.edge, of_environment(environment))
                if grad is None:  # it is zero, unless this pass computes only what it needs
                    if not computes_all():
                        raise RuntimeError(
                            f"Agreement: expected the gradient of input {operand.edge} of {name}, "
                            "but the backward pass in which it was called left it out; use "
                            "andmask_ext.backward, and report this as a fault of andmask_ext"
                        )
                    grad = like.new_zeros(operand.shape)
                if grad.layout != torch.strided:
                    refuse_sparse()
                by_environment.append(grad.sum_to_size(operand.shape))  # as the engine does

        aside(body)
        return by_environment

    return OneByOne(gradients, operand.shape, f"{name}, once per environment")
