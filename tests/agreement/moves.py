"""Ways in which random networks move rows of the batch about, and ways to mix environments.

Indices are made from data: they differ at each step, and are the same when a checkpointed region is
computed again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Layer = Callable[[Tensor], Tensor]  # of rows [..., width]
Move = Callable[[Tensor, int, Layer], Tensor]  # of [batch, tokens, width], or tokens first


def order_of(x: Tensor, axis: int) -> Tensor:
    """Return an order of the rows along an axis, which hangs on the data."""
    other = [dim for dim in range(x.dim()) if dim != axis]
    return x.detach().sum(other).argsort()


def along(index: Tensor, x: Tensor, axis: int) -> Tensor:
    """Expand an index of rows to the shape of a tensor."""
    return index.view([-1 if dim == axis else 1 for dim in range(x.dim())]).expand_as(x)


# ---- rows that are moved and put back ----


def by_index(x: Tensor, b: int, layer: Layer) -> Tensor:
    order = order_of(x, b)
    back = order.argsort()
    return layer(x[order])[back] if b == 0 else layer(x[:, order])[:, back]


def by_index_select(x: Tensor, b: int, layer: Layer) -> Tensor:
    order = order_of(x, b)
    return layer(x.index_select(b, order)).index_select(b, order.argsort())


def by_gather(x: Tensor, b: int, layer: Layer) -> Tensor:
    order = order_of(x, b)
    moved = layer(x.gather(b, along(order, x, b)))
    return moved.gather(b, along(order.argsort(), x, b))


def by_scatter(x: Tensor, b: int, layer: Layer) -> Tensor:
    index = along(order_of(x, b), x, b)
    return torch.zeros_like(x).scatter(b, index, layer(x.gather(b, index)))


def by_index_copy(x: Tensor, b: int, layer: Layer) -> Tensor:
    order = order_of(x, b)
    return torch.zeros_like(x).index_copy(b, order, layer(x.index_select(b, order)))


def by_index_put(x: Tensor, b: int, layer: Layer) -> Tensor:
    order = order_of(x, b)
    at = (order,) if b == 0 else (slice(None), order)
    out = torch.zeros_like(x)
    out[at] = layer(x[at])
    return out


def by_flip(x: Tensor, b: int, layer: Layer) -> Tensor:
    return layer(x.flip(b)).flip(b)


def by_roll(x: Tensor, b: int, layer: Layer) -> Tensor:
    shift = int(order_of(x, b)[0])
    return layer(x.roll(shift, b)).roll(-shift, b)


def in_parts(x: Tensor, b: int, layer: Layer) -> Tensor:
    return torch.cat([layer(part) for part in x.split([1, x.shape[b] - 1], b)], b)


def one_by_one(x: Tensor, b: int, layer: Layer) -> Tensor:
    return torch.stack([layer(one) for one in x.unbind(b)], b)


def flattened(x: Tensor, b: int, layer: Layer) -> Tensor:
    rows = x.flatten(0, 1)
    order = order_of(rows, 0)
    return layer(rows[order])[order.argsort()].unflatten(0, x.shape[:2])


def some_rows(x: Tensor, b: int, layer: Layer) -> Tensor:
    chosen = x.detach().sum(-1) > 0
    out = torch.zeros_like(x)
    out[chosen] = layer(x[chosen])
    return out


def some_rows_by_mask(x: Tensor, b: int, layer: Layer) -> Tensor:
    chosen = (x.detach().sum(-1, keepdim=True) > 0).expand_as(x)
    rows = x.masked_select(chosen).view(-1, x.shape[-1])
    return torch.zeros_like(x).masked_scatter(chosen, layer(rows))


def experts(x: Tensor, b: int, layer: Layer, most: int = 2) -> Tensor:
    """Each row goes to ``most`` of three experts, which weigh it."""
    rows = x.flatten(0, 1)
    scores, chosen = rows[:, :3].softmax(-1).topk(min(most, rows.shape[-1]), -1)
    out = torch.zeros_like(rows)
    for expert in range(3):
        row, place = torch.where(chosen == expert)
        weight = scores[row, place, None]
        out = out.index_add(0, row, layer(rows[row] * (expert + 1)) * weight)
    return out.unflatten(0, x.shape[:2])


def sorted_experts(x: Tensor, b: int, layer: Layer) -> Tensor:
    """Rows are sorted by their expert, and those of each are multiplied at once."""
    rows = x.flatten(0, 1)
    scores, chosen = rows[:, :3].softmax(-1).topk(min(2, rows.shape[-1]), -1)
    order = chosen.flatten().argsort(stable=True)
    source = order // chosen.shape[1]
    counts = torch.bincount(chosen.flatten(), minlength=3).tolist()
    parts = rows[source].split(counts)
    done = torch.cat([layer(part * (expert + 1)) for expert, part in enumerate(parts)])
    done = done * scores.flatten()[order, None]
    return torch.zeros_like(rows).index_add(0, source, done).unflatten(0, x.shape[:2])


def sorted_tokens(x: Tensor, b: int, layer: Layer) -> Tensor:
    return layer(x.sort(1 - b).values)


def ordered_tokens(x: Tensor, b: int, layer: Layer) -> Tensor:
    return layer(x.gather(1 - b, x.detach().argsort(1 - b)))


def largest_tokens(x: Tensor, b: int, layer: Layer) -> Tensor:
    return x + layer(x.topk(min(2, x.shape[1 - b]), 1 - b).values).mean(1 - b, keepdim=True)


def largest_token(x: Tensor, b: int, layer: Layer) -> Tensor:
    return x + layer(x.max(1 - b, keepdim=True).values)


def turned_tokens(x: Tensor, b: int, layer: Layer) -> Tensor:
    return layer(x.flip(1 - b).roll(1, 1 - b))


def plain(x: Tensor, b: int, layer: Layer) -> Tensor:
    return layer(x)


def rows_first(x: Tensor, b: int, layer: Layer) -> Tensor:
    """The other order of tokens and batch, flattened."""
    turned = x.transpose(0, 1)
    return layer(turned.flatten(0, 1)).unflatten(0, turned.shape[:2]).transpose(0, 1)


MOVES: dict[str, Move] = {
    move.__name__: move
    for move in (
        by_index, by_index_select, by_gather, by_scatter, by_index_copy, by_index_put, by_flip,
        by_roll, in_parts, one_by_one, flattened, some_rows, some_rows_by_mask, experts,
        sorted_experts, sorted_tokens, ordered_tokens, largest_tokens, largest_token,
        turned_tokens, plain, rows_first,
    )
}  # fmt: skip


# ---- environments that mix ----


def not_put_back(x: Tensor, b: int) -> Tensor:
    order = order_of(x, b)
    in_order = torch.equal(order, torch.arange(len(order)))
    return x.index_select(b, order.flip(0) if in_order else order)


MIXERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "not put back": not_put_back,
    "rolled": lambda x, b: x.roll(1, b),
    "turned": lambda x, b: x.flip(b),
    "mean": lambda x, b: x - x.mean(b, keepdim=True),
    "deviation": lambda x, b: x / (1 + x.var(b, keepdim=True, correction=0)),
    "softmax": lambda x, b: x.softmax(b),
    "sum so far": lambda x, b: x.cumsum(b),
    "largest": lambda x, b: x - x.amax(b, keepdim=True),
    "sorted": lambda x, b: x.sort(b).values,
    "first": lambda x, b: x + x.narrow(b, 0, 1),
    "a little": lambda x, b: x + 1e-3 * x.roll(1, b),
}
