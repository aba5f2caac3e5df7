"""Functions that write into a part of a tensor: which part. Their nodes keep that to themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ._graph import COPY_SLICES, PLACE, WRITTEN
from ._shown import picks_by_index
from ._views import VIEWS

# Functions that treat elements alone, and write into their first argument.
WRITING = frozenset((
    "__iadd__", "__idiv__", "__imul__", "__isub__", "__itruediv__", "abs_", "add_", "addcdiv_",
    "addcmul_", "bernoulli_", "celu_", "clamp_", "clamp_max_", "clamp_min_", "clip_", "copy_",
    "cos_", "div_", "divide_", "dropout_", "elu_", "erf_", "exp_", "expm1_", "fill_", "gelu_",
    "hardsigmoid_", "hardswish_", "hardtanh_", "index_fill_", "leaky_relu_", "lerp_", "log1p_",
    "log_", "logit_", "masked_fill_", "mish_", "mul_", "multiply_", "nan_to_num_", "neg_",
    "normal_", "pow_", "reciprocal_", "relu6_", "relu_", "rsqrt_", "selu_", "sigmoid_", "silu_",
    "sin_", "sqrt_", "square_", "sub_", "subtract_", "tanh_", "threshold_", "true_divide_",
    "uniform_", "zero_",
))  # fmt: skip


def say_index(tensor: Tensor, index: Any, values: Any) -> None:
    """Say which part of a tensor ``tensor[index] = values`` has written."""
    node = _writer(tensor)
    if node is None:
        return
    if isinstance(values, (bool, int, float, complex)):  # it moves no rows, whatever the index
        _say(node, "a number", ())
    elif not picks_by_index(index):
        with torch._C.DisableTorchFunction(), torch.no_grad():
            _say(node, f"{_part(tensor)} {index}", tensor[index].shape)


def say_view(view: Tensor) -> None:
    """Say that one of :data:`WRITING` has written a view: which part of its base it is."""
    node = _writer(view)
    if node is not None and view._base is not None:
        _say(node, _part(view), view.shape)


def say_steps(tensor: Tensor, steps: str) -> None:
    """Say which parts a function has written that fills a tensor part by part."""
    node = tensor.grad_fn
    while node is not None and (node.name() in VIEWS or node.name() == COPY_SLICES):
        if node.name() == COPY_SLICES:
            _say(node, steps, None)
        node = node.next_functions[0][0] if node.next_functions else None


def _writer(written: Tensor) -> Node | None:
    """Return the node of the write that has just been; without gradients there is none."""
    if not (torch.is_grad_enabled() and written.requires_grad):
        return None
    node = (written if written._base is None else written._base).grad_fn
    return node if node is not None and node.name() == COPY_SLICES else None


def _say(node: Node, place: str, shape: Sequence[int] | None) -> None:
    node.metadata[PLACE] = place  # type: ignore[index]
    node.metadata[WRITTEN] = shape  # type: ignore[index]


def _part(tensor: Tensor) -> str:
    """Describe the place of a tensor in its base: by the dimensions that it shortens, if possible.

    So the description holds for other sizes of the other dimensions.
    """
    base = tensor._base
    if base is None:
        return ""
    left = offset = tensor.storage_offset() - base.storage_offset()
    part = []
    if tensor.stride() == base.stride() and base.is_contiguous():
        sizes = zip(tensor.shape, base.shape, base.stride(), strict=True)
        for dim, (size, whole, stride) in enumerate(sizes):
            if size != whole:
                first = offset // stride % whole
                left -= first * stride
                part.append((dim, first, size))
        if left == 0:
            return str(part)
    return str((offset, tuple(tensor.shape), tensor.stride(), tuple(base.shape)))
