"""What the tests of layers draw: a module, the shape of its input, and where the batch lies in it.

Sizes are small, so that they often coincide with that of the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

Draw = st.DrawFn
Case = tuple[nn.Module, Tensor]  # the batch lies in dimension 0

sizes = st.integers(1, 4)
batches = st.sampled_from([1, 2, 3, 4, 6])


class Function(nn.Module):
    """A function of parameters and an input, as a module."""

    def __init__(self, function: Callable[..., Tensor], **params: Tensor | nn.Module) -> None:
        super().__init__()
        for name, param in params.items():
            setattr(self, name, nn.Parameter(param) if isinstance(param, Tensor) else param)
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def linear(draw: Draw, batch: int) -> Case:
    leading = draw(st.lists(sizes, max_size=2))
    into, out = draw(sizes), draw(sizes)
    return nn.Linear(into, out, bias=draw(st.booleans())), rand(batch, *leading, into)


def bilinear(draw: Draw, batch: int) -> Case:
    left, right = draw(sizes), draw(sizes)
    layer = nn.Bilinear(left, right, draw(sizes), bias=draw(st.booleans()))
    leading = draw(st.lists(sizes, max_size=1))
    model = Function(lambda s, x: s.layer(x[..., :left], x[..., left:]), layer=layer)
    return model, rand(batch, *leading, left + right)


def convolution(draw: Draw, batch: int, transposed: bool = False) -> Case:
    dims = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 2))
    channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    kernel = [draw(st.integers(1, 2 if dims == 3 else 3)) for _ in range(dims)]
    stride = [draw(st.integers(1, 2)) for _ in range(dims)]
    options = {"stride": stride, "groups": groups, "bias": draw(st.booleans())}
    if transposed:
        kinds = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
        options["padding"] = [draw(st.integers(0, (k - 1) // 2)) for k in kernel]
        options["dilation"] = draw(st.integers(1, 3))
        longest = [max(step, options["dilation"]) - 1 for step in stride]
        options["output_padding"] = [draw(st.integers(0, most)) for most in longest]
    else:
        kinds = nn.Conv1d, nn.Conv2d, nn.Conv3d
        options["padding"] = draw(
            st.one_of(
                st.sampled_from(["valid", "same"] if max(stride) == 1 else ["valid"]),
                st.tuples(*[st.integers(0, 1)] * dims),
            )
        )
        modes = ["zeros", "reflect", "replicate", "circular"]
        options["padding_mode"] = draw(st.sampled_from(modes))
        options["dilation"] = [draw(st.integers(1, 2)) for _ in range(dims)]
    spatial = [draw(st.integers(5, 6) if dims < 3 else st.just(4)) for _ in range(dims)]
    if dims == 2 and draw(st.booleans()):
        layer = kinds[1](*channels, kernel, **options).to(memory_format=torch.channels_last)
    else:
        layer = kinds[dims - 1](*channels, kernel, **options)
    return layer, rand(batch, channels[0], *spatial)


def convolution_transposed(draw: Draw, batch: int) -> Case:
    return convolution(draw, batch, transposed=True)


def embedding(draw: Draw, batch: int) -> Case:
    lines, width = draw(st.integers(2, 4)), draw(sizes)
    padding = draw(st.sampled_from([None, 0, 1]))
    layer = nn.Embedding(lines, width, padding, scale_grad_by_freq=draw(st.booleans()))
    return layer, torch.randint(0, lines, (batch, *draw(st.lists(sizes, max_size=2))))


def embedding_bag(draw: Draw, batch: int) -> Case:
    lines, width = draw(st.integers(2, 4)), draw(sizes)
    mode = draw(st.sampled_from(["sum", "mean", "max"]))
    padding = draw(st.sampled_from([None, 0, 1]))
    layer = nn.EmbeddingBag(lines, width, mode=mode, padding_idx=padding)
    ids = torch.randint(0, lines, (batch, draw(sizes)))
    if not draw(st.booleans()):
        return layer, ids

    def with_offsets(self: Function, ids: Tensor) -> Tensor:
        offsets = torch.arange(0, ids.numel(), ids.shape[1])
        weights = None
        if mode == "sum":
            weights = torch.linspace(0.5, 2, ids.shape[1], dtype=torch.float64).repeat(len(ids))
        return self.layer(ids.flatten(), offsets, per_sample_weights=weights)

    return Function(with_offsets, layer=layer), ids


def layer_norm(draw: Draw, batch: int) -> Case:
    shape = draw(st.lists(sizes, min_size=1, max_size=2))
    leading = draw(st.lists(sizes, max_size=1))
    layer = nn.LayerNorm(shape, bias=draw(st.booleans()))
    return layer, rand(batch, *leading, *shape)


def rms_norm(draw: Draw, batch: int) -> Case:
    shape = draw(st.lists(sizes, min_size=1, max_size=2))
    return nn.RMSNorm(shape), rand(batch, *draw(st.lists(sizes, max_size=1)), *shape)


def group_norm(draw: Draw, batch: int) -> Case:
    groups, each = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    spatial = draw(st.lists(st.integers(2, 4), min_size=1, max_size=2))
    return nn.GroupNorm(groups, groups * each), rand(batch, groups * each, *spatial)


def instance_norm(draw: Draw, batch: int) -> Case:
    channels, dims = draw(sizes), draw(st.integers(1, 2))
    layer = (nn.InstanceNorm1d, nn.InstanceNorm2d)[dims - 1](channels, affine=True)
    return layer, rand(batch, channels, *[draw(st.integers(2, 4)) for _ in range(dims)])


def batch_norm_eval(draw: Draw, batch: int) -> Case:
    channels, spatial = draw(sizes), draw(st.lists(sizes, max_size=1))
    layer = nn.BatchNorm1d(channels).double()
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    return layer.eval(), rand(batch, channels, *spatial)


def prelu(draw: Draw, batch: int) -> Case:
    channels = draw(sizes)
    layer = nn.PReLU(draw(st.sampled_from([1, channels])))
    return layer, rand(batch, channels, *draw(st.lists(sizes, max_size=1)))


def products(draw: Draw, batch: int) -> Case:
    """A parameter on either side of a product."""
    rows, width, out = draw(sizes), draw(sizes), draw(sizes)
    w, square = rand(width, out), rand(width, width)
    name = draw(st.sampled_from(sorted(PRODUCTS)))
    flat, function, shapes = PRODUCTS[name]
    params = {
        key: {"w": w, "square": square, "b": rand(out), "one": rand(width),
              "cube": rand(rows, width, out)}[key]
        for key in shapes
    }  # fmt: skip
    return Function(function, **params), rand(batch, *([] if flat else [rows]), width)


PRODUCTS: dict[str, tuple[bool, Callable[..., Tensor], str]] = {
    name: (flat, function, shapes.split())
    for name, (flat, function, shapes) in {
        "mm": (True, lambda s, x: x @ s.w, "w"),
        "mm, parameter left": (True, lambda s, x: (s.w.t() @ x.t()).t(), "w"),
        "mv": (True, lambda s, x: torch.mv(x, s.one), "one"),
        "addmm": (True, lambda s, x: torch.addmm(s.b, x, s.w, beta=0.5, alpha=-2), "w b"),
        "addmm, parameter left": (
            True, lambda s, x: torch.addmm(s.b[:, None], s.w.t(), x.t(), alpha=3).t(), "w b"),
        "matmul": (False, lambda s, x: x @ s.w, "w"),
        "matmul, parameter left": (False, lambda s, x: s.square @ x.transpose(1, 2), "square"),
        "baddbmm": (
            False, lambda s, x: torch.baddbmm(s.b, x, s.w.expand(len(x), -1, -1)), "w b"),
        "batched": (False, lambda s, x: torch.einsum("btd,tde->bte", x, s.cube), "cube"),
        "einsum": (False, lambda s, x: torch.einsum("btd,de->ebt", x, s.w).movedim(0, 2), "w"),
        "tensordot": (False, lambda s, x: torch.tensordot(x, s.cube, ([1, 2], [0, 1])), "cube"),
        "rows first": (
            False, lambda s, x: (x.transpose(0, 1).flatten(0, 1) @ s.w)
            .unflatten(0, (x.shape[1], -1)).transpose(0, 1), "w"),
        "first row only": (False, lambda s, x: (x @ s.w)[:, 0], "w"),
        "last row only": (False, lambda s, x: (x @ s.w)[:, -1], "w"),
    }.items()
}  # fmt: skip


def elementwise(draw: Draw, batch: int) -> Case:
    """Arithmetic with a parameter that is broadcast, of up to the example's shape."""
    shape = draw(st.lists(sizes, min_size=1, max_size=2))
    own = [size if draw(st.booleans()) else 1 for size in shape]
    own = own[draw(st.integers(0, len(own))) :]
    name = draw(st.sampled_from(sorted(ELEMENTWISE)))
    return Function(ELEMENTWISE[name], w=rand(*own)), rand(batch, *shape)


ELEMENTWISE: dict[str, Callable[..., Tensor]] = {
    "add": lambda s, x: torch.add(x, s.w, alpha=3),
    "radd": lambda s, x: torch.add(s.w, x, alpha=3),
    "sub": lambda s, x: torch.sub(x, s.w, alpha=0.5),
    "rsub": lambda s, x: torch.rsub(x, s.w, alpha=0.5),
    "minus": lambda s, x: s.w - x,
    "one minus": lambda s, x: (1 - s.w) * x,
    "mul": lambda s, x: x * s.w,
    "rmul": lambda s, x: s.w * x,
    "div": lambda s, x: x / s.w.exp(),
    "rdiv": lambda s, x: s.w / x.exp(),
    "power": lambda s, x: x.exp() ** s.w,
    "where": lambda s, x: torch.where(x > 0, x, s.w),
    "where of the parameter": lambda s, x: torch.where(x > 0, s.w, 0) + x,
    "masked": lambda s, x: s.w.masked_fill(x > 0, 0.5) + x,
    "maximum": lambda s, x: torch.maximum(x, s.w),
    "addcmul": lambda s, x: torch.addcmul(s.w, x, s.w, value=2),
    "lerp": lambda s, x: torch.lerp(x, s.w.expand_as(x), 0.3),
    "clamp": lambda s, x: x.clamp(min=s.w),
    "in place": lambda s, x: (x * 1).mul_(s.w).add_(s.w),
    "twice": lambda s, x: x * s.w * s.w + s.w * s.w,
    "square": lambda s, x: x + s.w.square(),
}


def views(draw: Draw, batch: int) -> Case:
    """A view or a copy of a parameter [4, 3] that is used as the weight of a linear layer."""
    name = draw(st.sampled_from(sorted(VIEWS)))
    weight, into = VIEWS[name]
    rows = draw(st.lists(sizes, max_size=1))
    return Function(lambda s, x: F.linear(x, weight(s.w)), w=rand(4, 3)), rand(batch, *rows, into)


VIEWS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "whole": (lambda w: w, 3),
    "transposed": (lambda w: w.t(), 4),
    "transposed twice": (lambda w: w.transpose(0, 1).transpose(1, 0), 3),
    "rows": (lambda w: w[1:3], 3),
    "rows without a start": (lambda w: torch.ops.aten.slice.Tensor(w, 0, None, 2), 3),
    "rows without an end": (lambda w: torch.ops.aten.slice.Tensor(w, -2, 1, None), 3),
    "no rows": (lambda w: torch.cat([w[4:], w[:1]]), 3),
    "columns": (lambda w: w[:, 1:], 2),
    "every other row": (lambda w: w[::2], 3),
    "one row": (lambda w: w[2][None], 3),
    "one column": (lambda w: w.select(1, -1)[None], 4),
    "chunk": (lambda w: w.chunk(2)[1], 3),
    "split": (lambda w: w.split([1, 3])[1], 3),
    "unbound": (lambda w: torch.stack(w.unbind()[1:]), 3),
    "reshaped": (lambda w: w.reshape(2, 6), 6),
    "reshaped transpose": (lambda w: w.t().reshape(2, 6), 6),
    "flat": (lambda w: w.flatten()[None], 12),
    "view of a view": (lambda w: w.view(2, 2, 3)[:, 1].t(), 2),
    "permuted": (lambda w: w.view(2, 2, 3).permute(2, 0, 1).flatten(1), 4),
    "diagonal": (lambda w: w.diagonal()[None], 3),
    "narrow": (lambda w: w.narrow(0, 1, 2).narrow(1, 0, 2), 2),
    "unfolded": (lambda w: w.unfold(0, 2, 1)[0], 2),
    "strided": (lambda w: w.as_strided((2, 3), (1, 2), 1), 3),
    "cat": (lambda w: torch.cat([w, w[1:2]]), 3),
    "cat with constants": (lambda w: torch.cat([w, w.new_ones(1, 3)]), 3),
    "stacked": (lambda w: torch.stack([w[0], w[0], w[3]]), 3),
    "expanded": (lambda w: w[:1].expand(4, 3), 3),
    "repeated": (lambda w: w.repeat(1, 2), 6),
    "flipped": (lambda w: w.flip(0), 3),
    "rolled": (lambda w: w.roll(1, 0), 3),
    "indexed": (lambda w: w[torch.tensor([3, 0, 3])], 3),
    "selected": (lambda w: w.index_select(1, torch.tensor([2, 1])), 2),
    "lower triangle": (lambda w: w.tril(), 3),
    "masked": (lambda w: w * (torch.arange(12).view(4, 3) % 5 > 0), 3),
    "scaled": (lambda w: w * 2.5, 3),
    "product of parts": (lambda w: w[:2, :2] @ w[2:, :], 3),
    "normalized": (lambda w: F.normalize(w, dim=1), 3),
    "softmax": (lambda w: w.softmax(1), 3),
    "outer": (lambda w: w[0][:, None] * w[1], 3),
    "padded": (lambda w: F.pad(w, (0, 1)), 4),
    "summed": (lambda w: w.sum(0, keepdim=True), 3),
    "clone": (lambda w: w.clone().contiguous(), 3),
}


def tokens(draw: Draw, batch: int) -> Case:
    """Parameters that are repeated for each example, or added to each position."""
    rows, width = draw(sizes), draw(sizes)
    name = draw(st.sampled_from(sorted(TOKENS)))
    model = Function(TOKENS[name], w=rand(1, rows, width), h=rand(width, width))
    return model, rand(batch, rows, width)


TOKENS: dict[str, Callable[..., Tensor]] = {
    "class token": lambda s, x: torch.cat([s.w[:, :1].expand(len(x), -1, -1), x], 1) @ s.h,
    "only its output": lambda s, x: _mixed(
        torch.cat([s.w[:, :1].expand(len(x), -1, -1), x @ s.h], 1))[:, 0],
    "repeated": lambda s, x: torch.cat([s.w.repeat(len(x), 1, 1), x], 1) @ s.h,
    "expanded in two": lambda s, x: s.w.expand(len(x), -1, -1) @ s.h + x,
    "repeat interleaved": lambda s, x: s.w.repeat_interleave(len(x), 0) @ s.h * x,
    "written": lambda s, x: _written(s, x),
    "positions": lambda s, x: (x + s.w) @ s.h,
    "positions, first row only": lambda s, x: (x + s.w)[:, 0] @ s.h,
    "indexed positions": lambda s, x: ((x + s.w[:, torch.arange(x.shape[1])]) @ s.h)[:, -1],
    "looked up positions": lambda s, x: (x + F.embedding(torch.arange(x.shape[1]), s.w[0])) @ s.h,
    "queries": lambda s, x: F.scaled_dot_product_attention(s.w.expand(len(x), -1, -1), x, x) @ s.h,
    "projected queries": lambda s, x: _mixed((s.w @ s.h).expand(len(x), -1, -1) * x),
    "row chosen by data": lambda s, x: s.w[0][(x[..., 0] > 0).long() % x.shape[1]] @ s.h + x,
    "gathered by data": lambda s, x: s.w.expand(len(x), -1, -1).gather(
        1, (x > 0).long() % x.shape[1]) @ s.h,
}  # fmt: skip


def _mixed(x: Tensor) -> Tensor:
    return x.softmax(1) * x.sum(1, keepdim=True)


def _written(self: Function, x: Tensor) -> Tensor:
    buffer = x.new_zeros(len(x), x.shape[1] + 1, x.shape[2])
    buffer[:, :1] = self.w[:, :1]
    buffer[:, 1:] = x @ self.h
    return buffer


LAYERS: dict[str, Callable[[Draw, int], Case]] = {
    function.__name__: function
    for function in (
        linear, bilinear, convolution, convolution_transposed, embedding, embedding_bag, layer_norm,
        rms_norm, group_norm, instance_norm, batch_norm_eval, prelu, products, elementwise, views,
        tokens,
    )
}  # fmt: skip
