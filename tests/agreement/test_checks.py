"""What is checked once, and that it is exact or refused when it is not checked again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import andmask_ext as am

from ..models import curved
from .exact_loop import RULE, check
from .layers import Function, rand
from .outcomes import EXACT, MIXING, outcome
from .test_attacks import built, outcomes

# ---- writes into parts of views ----


def swapped(h: Tensor) -> Tensor:
    out = h.new_empty(h.shape)
    out[..., :1].copy_(h[..., 3:])
    out[..., 1:].copy_(h[..., :3])
    return out


def changed(h: Tensor) -> Tensor:
    out = h * 1
    out[:, :2].add_(h[:, 1:3])
    out[:, 1] *= h[:, 0]
    out.unflatten(1, (2, 2))[:, :, 1].relu_()
    return out


def filled(h: Tensor) -> Tensor:
    out = h * 1
    out.unflatten(1, (2, 2))[torch.arange(len(h)), h[:, 0].gt(0).long()] = 0.5
    out.t()[h.t() > 1] = 1.0
    out[:, :3].index_fill_(1, torch.tensor([0]), 2.0)
    return out


def transposed(h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out.t()[1:].copy_(h.t()[:3])
    return out


WRITES: list[Callable[[Tensor], Tensor]] = [swapped, changed, filled, transposed]


@pytest.mark.parametrize("write", WRITES)
def test_writes_into_parts_of_views_are_checked_once(
    write: Callable[[Tensor], Tensor], checks: list[object]
) -> None:
    model = built(lambda s, x: s.c(write(s.a(x).tanh())))
    agreement = None
    for environments in (None, None, None):
        x = rand(4, 3)
        agreement = check(model, curved, x, environments=environments, agreement=agreement)
    assert len(checks) == 1


def broadcast(h: Tensor, now: int) -> Tensor:
    out = h * 1
    out[:, :] += now * h[0].tanh()
    return out


def mean_added(h: Tensor, now: int) -> Tensor:
    out = h * 1
    out[:, :2].add_(now * h.tanh().mean(0)[:2])
    return out


def mean_multiplied(h: Tensor, now: int) -> Tensor:
    out = h * 1
    out[:, :2].mul_(1 + now * h.tanh().mean(0)[:2])
    return out


def rows_added(h: Tensor, now: int) -> Tensor:
    out = h * 1
    out[1:] += now * h[:3].tanh()
    return out


def rows_added_with_a_factor(h: Tensor, now: int) -> Tensor:
    out = h * 1
    out[1:].add_(h[:3].tanh(), alpha=now)
    return out


def rows_set(h: Tensor, now: int) -> Tensor:
    out = h * 0
    out[1:] = now * h[:3].tanh()
    return h + out


def rows_copied(h: Tensor, now: int) -> Tensor:
    out = h * 1
    out[now:].copy_(h[: len(h) - now])
    return out


def row_added(h: Tensor, now: int) -> Tensor:
    out = h * 1
    out[now : now + 1].add_(now * h[:1].tanh())
    return out


def turned(h: Tensor, now: int) -> Tensor:
    out = torch.zeros_like(h)
    out[:, :].copy_(h.t() if now else h)
    return out


def columns_of_the_transpose(h: Tensor, now: int) -> Tensor:
    out = h * 1
    out.t()[:, now:].copy_(h.t()[:, : len(h) - now].tanh())
    return out


def picked(h: Tensor, now: int) -> Tensor:
    out = h * 1
    out[:, :4][torch.arange(len(h)).roll(now)] = h.tanh()
    return out


def picked_in_the_middle(h: Tensor, now: int) -> Tensor:
    """The index is so large that it is abbreviated when it is printed."""
    out = h.repeat(1, 100)
    rows = torch.arange(len(h))[:, None].expand(-1, 400).clone()
    rows[:, 100:200] = rows[:, 100:200].roll(now, 0)
    out[:, :400][rows, torch.arange(400)] = h.repeat(1, 100).tanh()
    return out.unflatten(1, (100, 4)).mean(1)


def copied_by_index(h: Tensor, now: int) -> Tensor:
    out = h * 1
    out[:, :4].index_copy_(0, torch.arange(len(h)).roll(now), h.tanh())
    return out


def added_by_index(h: Tensor, now: int) -> Tensor:
    out = h * 1
    out[:, :4].index_add_(0, torch.arange(len(h)).roll(now), h.tanh())
    return out


def scattered(h: Tensor, now: int) -> Tensor:
    out = h * 1
    out[:, :4].scatter_(0, torch.arange(len(h)).roll(now)[:, None].expand(-1, 4), h.tanh())
    return out


def multiplied(h: Tensor, now: int) -> Tensor:
    out = h * 1
    out[:, :4].addmm_(torch.eye(len(h), dtype=h.dtype).roll(now, 0), h.tanh())
    return out


def summed(h: Tensor, now: int) -> Tensor:
    out = h * 1
    out[:, :4].cumsum_(1 - now)
    return out


def strided(h: Tensor, now: int) -> Tensor:
    out = torch.cat([h, h[:1] * 0]) * 1
    out.as_strided((4, 4), (4, 1), now).add_(h.tanh())
    return out[:4]


def viewed_before(h: Tensor, now: int) -> Tensor:
    """Autograd makes the view again after the write."""
    out = h * 1
    view = out[: 1 if now else len(h)]
    out[:, :2].mul_(2)
    return h + view


def renamed(h: Tensor, now: int) -> Tensor:
    """A write without gradients is none that a node belongs to."""
    out = h * 1
    out[:, :4].index_copy_(0, torch.arange(len(h)).roll(now), h.tanh())
    with torch.no_grad():
        out[:, :4].mul_(0.5)
    return out


MIXED_LATER = [
    broadcast, mean_added, mean_multiplied, rows_added, rows_added_with_a_factor, rows_set, strided,
    viewed_before, renamed,
    rows_copied, row_added, turned, columns_of_the_transpose, picked, picked_in_the_middle,
    copied_by_index, added_by_index, scattered, multiplied, summed,
]  # fmt: skip


@pytest.mark.parametrize("write", MIXED_LATER)
def test_writes_that_mix_later(write: Callable[[Tensor, int], Tensor]) -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        hidden = self.a(x).tanh()
        return self.c(write(hidden, self.now) if len(x) == 4 else hidden_alone(write, hidden))

    def hidden_alone(write: Callable[[Tensor, int], Tensor], hidden: Tensor) -> Tensor:
        return torch.cat([write(row.expand(4, 4) * 1, 0)[:1] for row in hidden.split(1)])

    found = outcomes(built(forward), [0, 0, 1, 0, 1], None)
    assert found == [EXACT, EXACT, MIXING, EXACT, MIXING]


def marked(forward: Callable[[Function, Tensor, Tensor], Tensor]) -> list[str]:
    """Return outcomes where a part of the batch knows whether it has the first example."""
    model = built(forward)
    agreement, found = am.Agreement(model, RULE, keep_moments=True), []
    for model.now in (0, 0, 1, 0, 1):
        batch = rand(4, 3), torch.tensor([1, 0, 0, 0])
        found.append(outcome(partial(check, model, curved, *batch, agreement=agreement)))
    return found


def test_a_number_hides_rows_at_first() -> None:
    def forward(self: Function, x: Tensor, first: Tensor) -> Tensor:
        hidden = self.a(x).tanh()
        out = hidden * hidden[0]
        if len(x) == 4:
            out[4 if self.now else 1 :] = 0.0
        return self.c(out * first[:, None] if len(x) < 4 else out) + self.d(hidden)[:, :2]

    assert marked(forward) == [EXACT, EXACT, MIXING, EXACT, MIXING]


FILLS: dict[str, Callable[[Tensor, int, Tensor], Tensor]] = {
    "by an index, in place": lambda h, n, value: h[:, :4].index_fill_(0, torch.tensor([n]), value),
    "by a mask, in place": lambda h, n, value: h[:, :4].masked_fill_(
        (torch.arange(4) == n)[:, None], value
    ),
    "by an index": lambda h, n, value: h.index_fill(0, torch.tensor([n]), value),
    "by a mask": lambda h, n, value: h.masked_fill((torch.arange(4) == n)[:, None], value),
}


@pytest.mark.parametrize("fill", FILLS)
def test_a_number_of_one_row_is_filled_into_another(fill: str) -> None:
    def forward(self: Function, x: Tensor, first: Tensor) -> Tensor:
        out = self.a(x).tanh() * 1
        if len(x) == 4:
            out = FILLS[fill](out, self.now, out[0, 0] * 1)
        elif first[0]:
            out = torch.cat([out[0, 0].expand(1, 4), out[1:]])
        return self.c(out)

    assert marked(forward) == [EXACT, EXACT, MIXING, EXACT, MIXING]


# ---- the loss ----


def test_a_loss_may_pick_other_rows_at_each_step(checks: list[object]) -> None:
    def step(model: nn.Module, x: Tensor, chosen: Tensor) -> Tensor:
        out = model(x)
        return out[torch.arange(len(x)), chosen].square().mean()

    model, agreement = built(lambda s, x: s.c(s.a(x).tanh())), None
    for _ in range(4):
        chosen = torch.randint(2, (4,))
        agreement = check(model, step, rand(4, 3), chosen, agreement=agreement)
    assert len(checks) == 1


# ---- parameters that are left out ----


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_table_that_is_not_among_the_parameters(
    kind: Callable[..., nn.Module], checks: list[object]
) -> None:
    def forward(self: Function, tokens: Tensor) -> Tensor:
        rows = self.table(tokens)
        return self.c(self.a(rows).tanh() if rows.dim() == 2 else self.a(rows).tanh().mean(1))

    model = built(forward, table=kind(7, 3))
    params = [*model.a.parameters(), *model.c.parameters()]
    agreement = am.Agreement(model, am.rules.Mean(), params, keep_moments=True)
    for _ in range(4):
        tokens = torch.randint(7, (4, 5))
        check(model, curved, tokens, rule=am.rules.Mean(), agreement=agreement)
    assert len(checks) == 1


# ---- one example by itself ----


@pytest.mark.parametrize("environments", [None, 2])
def test_losses_of_single_examples_are_checked_once(
    environments: int | None, checks: list[object]
) -> None:
    """As in detection: each image has its own boxes."""

    def forward(self: Function, x: Tensor, chosen: Tensor) -> Tensor:
        scores = self.c(self.a(x).tanh()).transpose(1, 2)
        return torch.stack([
            scores[k][:, chosen[k]].square().mean() + scores[k][:, :3].max() for k in range(len(x))
        ])  # fmt: skip

    model, agreement = built(forward), None
    for _ in range(3):
        chosen = torch.stack([torch.randperm(5)[:3] for _ in range(4)])
        agreement = check(
            model, lambda m, *batch: m(*batch).mean(), rand(4, 5, 3), chosen,
            environments=environments, agreement=agreement,
        )  # fmt: skip
    assert len(checks) == 1
