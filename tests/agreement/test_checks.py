"""What is checked once, and that it is exact or refused when it is not checked again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import andmask_ext as am

from ..models import curved
from .exact_loop import RULE, check
from .layers import Function, rand
from .outcomes import EXACT, MIXING
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


MIXED_LATER = [
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


# ---- parts of a model without a gradient ----

Part = Callable[[Tensor], Tensor]

APART: dict[str, Part] = {
    "itself": lambda h: h,
    "swapped": lambda h: torch.cat([h[..., 2:], h[..., :2]], -1),
    "one token": lambda h: h[:, :1] + h[:, 3:],
    "heads": lambda h: (
        h.unflatten(-1, (2, 2)).transpose(1, 2).flatten(0, 1)[:, 1:]
        .unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)
    ),
    "windows": lambda h: h.flatten(1).as_strided((len(h), 3, 4), (16, 4, 1)),
    "tokens first": lambda h: h.transpose(0, 1).contiguous()[1:].transpose(0, 1),
    "chosen": lambda h: h.gather(2, h.detach().argsort(-1)[..., :2]).repeat(1, 1, 2),
}  # fmt: skip

MIXING_PARTS: dict[str, Part] = {
    "rolled": lambda h: h.roll(1, 0),
    "shifted": lambda h: torch.cat([h[1:], h[:1]]),
    "mean": lambda h: h + h.mean(0, keepdim=True),
    "turned": lambda h: h.transpose(0, 1),
    "so far": lambda h: h.cumsum(0),
    "products": lambda h: ((h.flatten(1) @ h.flatten(1).t()) @ h.flatten(1)).unflatten(1, (4, 4)),
}  # fmt: skip


def gated(part: Part, order: str, region: bool | None = None) -> Function:
    """Return a model with a layer before or after a part, both behind a gate."""

    def behind(self: Function, hidden: Tensor) -> Tensor:
        inside = part(self.b(hidden)) if order == "before" else self.b(part(hidden))
        return self.now * inside.tanh().mean(1)

    def forward(self: Function, x: Tensor) -> Tensor:
        hidden = self.a(x).tanh()
        if region is None:
            return self.c(hidden.mean(1) + behind(self, hidden))
        call = partial(behind, self)
        return self.c(hidden.mean(1) + checkpoint(call, hidden, use_reentrant=region))

    return built(forward)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("part", APART)
def test_a_part_behind_a_gate_is_checked_when_the_gate_opens(
    part: str, order: str, checks: list[object]
) -> None:
    """Sizes coincide with that of the batch, so that nothing but a gradient tells its axis."""
    model = gated(APART[part], order)
    assert set(outcomes(model, [0, 0, 0, 1, 1, 0, 1], None, 4, 3)) == {EXACT}
    assert len(checks) == 2


@pytest.mark.parametrize("region", [None, True, False])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("part", MIXING_PARTS)
def test_a_part_that_mixes_behind_a_gate(part: str, order: str, region: bool | None) -> None:
    model = gated(lambda h: MIXING_PARTS[part](h) if len(h) == 4 else h, order, region)
    found = outcomes(model, [0, 0, 1, 0, 1], None, 4, 3)
    assert found == [EXACT, EXACT, MIXING, EXACT, MIXING]


class Turned(torch.autograd.Function):
    """Exchanges two axes of the same size, which nothing but a gradient shows."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.t().contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.t()


def test_an_axis_that_seemed_to_stay() -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        hidden = self.a(x).tanh()
        moved = Turned.apply(Turned.apply(hidden).roll(1, 1)) if len(x) == 4 else hidden
        return self.c(hidden + self.now * moved)

    found = outcomes(built(forward), [0, 0, 1, 0, 1], None)
    assert found == [EXACT, EXACT, MIXING, EXACT, MIXING]


def test_hooks_do_not_see_how_a_gate_is_watched() -> None:
    model = gated(APART["itself"], "before")
    agreement, seen = am.Agreement(model, RULE), list[str]()
    model.b.register_full_backward_hook(lambda *_: seen.append("module"))
    for model.now in (0, 0, 0):
        with agreement():
            hidden = model.a(rand(4, 4, 3)).tanh()
            hidden.register_hook(lambda grad: seen.append("tensor"))
            out = model.c(hidden.mean(1) + model.now * model.b(hidden).mean(1))
            out.retain_grad()
            out.square().mean().backward()
        assert sorted(seen) == ["module", "tensor"]
        assert torch.equal(out.grad, out.detach() / 4)
        seen.clear()


def test_a_gate_that_is_a_parameter(checks: list[object]) -> None:
    model = built(lambda s, x: s.c(s.a(x).tanh() + s.gate * s.b(s.a(x))), gate=torch.zeros(1))
    agreement = None
    for step in range(5):
        agreement = check(model, curved, rand(4, 3), agreement=agreement)
        with torch.no_grad():
            model.gate.add_(0.5 * (step > 1))
    assert len(checks) == 2


def test_attention_to_one_token_has_no_gradient(checks: list[object]) -> None:
    """As softmax of one score is constant: there is no gradient at any step."""
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    model = Function(lambda s, x: s.attention(x, x, x)[0][:, 0], attention=attention).double()
    agreement = None
    for _ in range(4):
        agreement = check(model, curved, rand(4, 1, 4), agreement=agreement)
    assert len(checks) == 1


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
