"""Parts of a model without a gradient: a plan that was made there holds while there is none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import andmask_ext as am

from ..models import curved
from .exact_loop import RULE, check
from .layers import Function, rand
from .outcomes import EXACT, MIXING
from .test_attacks import UNEQUAL, built, outcomes

OPENING = [0, 0, 1, 0, 1]  # the values of the gate
MIXED = [EXACT, EXACT, MIXING, EXACT, MIXING]

# ---- behind a layer ----

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
    found = outcomes(model, OPENING, None, 4, 3)
    assert found == MIXED


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

    found = outcomes(built(forward), OPENING, None)
    assert found == MIXED


def test_hooks_do_not_see_how_a_gate_is_watched() -> None:
    model = gated(APART["itself"], "before")
    agreement, seen = am.Agreement(model, RULE), list[str]()
    model.b.register_full_backward_hook(lambda *_: seen.append("module"))
    for model.now in (0, 0, 0):
        with agreement():
            hidden = model.a(rand(4, 4, 3)).tanh()
            hidden.register_hook(lambda grad: seen.append("tensor"))
            out = model.c(hidden.mean(1) + model.now * model.b(hidden).mean(1))
            out.register_hook(lambda grad: seen.append("output"))
            out.retain_grad()
            out.square().mean().backward()
        assert sorted(seen) == ["module", "output", "tensor"]
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


def test_experts_without_rows(checks: list[object]) -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        hidden = self.a(x).tanh()
        chosen = (torch.arange(len(x)) < self.now) if len(x) == 4 else x[:, 0] > 9
        out = torch.zeros_like(hidden)
        for rows, expert in ((chosen, self.b), (~chosen, self.d)):
            out = out.index_add(0, rows.nonzero()[:, 0], expert(hidden[rows]).tanh())
        return self.c(hidden + out)

    model = built(forward)
    model.d = model.b
    assert set(outcomes(model, [2, 0, 4, 1, 0, 3], None)) == {EXACT}
    assert len(checks) == 1


# ---- without a layer ----


class Both(torch.autograd.Function):
    """Returns the rows, and in another tensor the rows in reverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x.flip(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, reverse: Tensor) -> Tensor:
        return grad * 2 + reverse.flip(0)


BARE: dict[str, Part] = {
    "so far": lambda h: h.tanh().cumsum(0),
    "attention": lambda h: F.scaled_dot_product_attention(*[h.tanh()[None]] * 3)[0],
    "products": lambda h: h.tanh() @ h.tanh().t() @ h.tanh(),
    "distances": lambda h: torch.cdist(h.tanh(), h.sigmoid()),
    "graph": lambda h: torch.ones(4, 4, dtype=h.dtype) @ h.tanh(),
    "softmax": lambda h: h.tanh().softmax(0),
    "normalized": lambda h: F.normalize(h.tanh(), dim=0),
    "mean": lambda h: h.tanh().mean(0, keepdim=True).expand(4, 4).tanh(),
    "turned": lambda h: h.tanh().t(),
    "other rows": lambda h: torch.stack(h.tanh().unbind(0)[::-1]),
    "differences": lambda h: h.tanh().diff(dim=0, append=h[:1]),
    "convolution": lambda h: F.conv1d(h.tanh()[None], torch.ones(4, 4, 1, dtype=h.dtype))[0],
    "function": lambda h: Both.apply(h)[1],
    "repeated": lambda h: h[1:3].repeat(2, 1),
}


@pytest.mark.parametrize("environments", [None, UNEQUAL], ids=["each", "ids"])
@pytest.mark.parametrize("part", BARE)
def test_a_part_without_layers_that_mixes(part: str, environments: Tensor | None) -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        hidden = self.a(x).tanh()
        return self.c(hidden + self.now * BARE[part](hidden) if len(x) == 4 else hidden)

    assert outcomes(built(forward), OPENING, environments) == MIXED


def test_one_of_two_outputs_behind_a_gate() -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        first, second = Both.apply(self.a(x).tanh())
        return self.c(first + self.now * second)

    assert outcomes(built(forward), OPENING, None) == MIXED


def test_a_gate_of_which_one_row_is_open() -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        hidden = self.a(x).tanh()
        if len(x) < 4:
            return self.c(hidden)
        gate = torch.tensor([1.0, self.now, self.now, 0]).double()[:, None]
        return self.c(hidden + gate * hidden.tanh().cumsum(0) - gate * hidden.tanh())

    assert outcomes(built(forward), OPENING, None) == MIXED


def test_a_layer_of_which_one_token_has_a_gradient() -> None:
    """The other tokens mix, once their gate opens."""

    def forward(self: Function, x: Tensor) -> Tensor:
        hidden = self.a(x).tanh()
        rest = hidden[:, 1:].tanh().cumsum(0) if len(x) == 4 else 0 * hidden[:, 1:]
        rows = self.b(torch.cat([hidden[:, :1], rest], 1))
        gate = torch.tensor([1.0, self.now, 0.0]).double()[:, None]
        return self.c((hidden + gate * rows).mean(1))

    assert outcomes(built(forward), OPENING, UNEQUAL, 3, 3) == MIXED


def test_other_ids_before_the_gate_opens() -> None:
    """Rows 2 and 3 mix behind the gate: with the second ids they are of two environments."""

    def forward(self: Function, x: Tensor) -> Tensor:
        hidden = self.b(self.a(x).tanh())
        rows = torch.cat([hidden[:2], hidden[2:].mean(0, keepdim=True).expand(2, 4)])
        return self.c(hidden + self.now * rows.tanh())

    model = built(forward)
    agreement = am.Agreement(model, RULE)
    together, apart = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2])
    for ids, model.now in ((together, 0), (apart, 0), (together, 0), (apart, 0)):
        with agreement(ids):
            curved(model, rand(4, 3)).backward()
    model.now = 1
    with pytest.raises(RuntimeError, match=MIXING), agreement(apart):
        curved(model, rand(4, 3)).backward()


@pytest.mark.parametrize("layer", [False, True])
def test_repeated_rows(layer: bool) -> None:
    """Rows [0, 1, 0, 1] look like [0, 0, 1, 1] where none has a gradient."""

    def forward(self: Function, x: Tensor) -> Tensor:
        hidden = self.a(x).tanh()
        part = self.b if layer else nn.Identity()
        if len(x) < 4:
            return self.c(hidden + 0 * part(hidden))
        return self.c(hidden + self.now * part(hidden[1:3]).repeat(2, 1))

    assert outcomes(built(forward), OPENING, 2) == MIXED


def test_rows_written_one_further_behind_a_layer() -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        hidden = self.a(x).tanh()
        out = hidden * 1
        if len(x) == 4:
            out[1:].add_(self.now * self.b(hidden[:3]).tanh())
        return self.c(out + 0 * self.b(hidden))

    assert outcomes(built(forward), OPENING) == MIXED


def test_a_view_made_without_gradients_after_a_write() -> None:
    """Torch refuses to say which node such a view belongs to."""

    def forward(self: Function, x: Tensor) -> Tensor:
        out = self.a(x).tanh() * 1
        out[:, :2].mul_(2)
        with torch.no_grad():
            out[:, 3:].clamp_(-5, 5)
        return self.c(out)

    assert outcomes(built(forward), [0, 0]) == [EXACT, EXACT]
