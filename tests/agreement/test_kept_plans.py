"""Steps that differ from the first one in what its plan does not show, and rows of inputs."""

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
from .exact_loop import RULE, check, loop
from .layers import Function, rand
from .outcomes import EXACT, MIXING, outcome
from .test_attacks import IN_PLACE, ORDERS, built, hashed, order, outcomes

SQUARE: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "times": lambda s, x: x * s.w.t(),
    "plus": lambda s, x: x.tanh() + s.w.mT,
    "minus": lambda s, x: s.w.swapaxes(0, 1) - x.tanh(),
    "expanded": lambda s, x: torch.bmm(x, s.w.t().expand(len(x), 4, 4)),
    "joined": lambda s, x: torch.cat([x, s.w.t().expand(len(x), -1, -1)], 1),
    "in a region": lambda s, x: checkpoint(
        lambda rows: torch.maximum(rows, s.w.t()), s.a(x), use_reentrant=True
    ),
    "three dimensions": lambda s, x: x[..., None] * s.v.permute(2, 0, 1),
    "a layer in a region": lambda s, x: (
        checkpoint(s.b, s.a(x)[:5, 0], use_reentrant=True).sum(0) + x
    ),
}


@pytest.mark.parametrize("use", SQUARE)
def test_a_square_parameter_that_is_turned(use: str) -> None:
    model = Function(
        SQUARE[use], w=rand(4, 4), v=rand(4, 4, 4), a=nn.Linear(4, 4), b=nn.Linear(4, 4)
    ).double()
    given = [1] if use == "a layer in a region" else [None, 2, torch.tensor([0, 1, 1, 2, 0, 2])]
    for environments in given:
        check(model, curved, rand(6, 4, 4), environments=environments)


def test_sequences_of_one_frame_first() -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        batch, frames, parts, width = x.shape
        rows = self.a(x.transpose(0, 1).reshape(-1, width))
        return rows.view(frames, batch, parts, -1).transpose(0, 1) * 1

    model, agreement = built(forward), None
    for frames, parts in ((1, 3), (2, 3), (3, 3), (2, 5), (1, 3)):
        agreement = check(model, curved, rand(4, frames, parts, 3), agreement=agreement)


class Picked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.index = index
        return x[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.zeros_like(grad).index_copy(0, ctx.index, grad), None


def written(h: Tensor, p: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    for source, target in enumerate(p.argsort().tolist()):
        out[target] = h[source]
    return out


def sampled(h: Tensor, p: Tensor) -> Tensor:
    at = torch.stack([torch.zeros(len(p)), (p * 2 + 1) / len(p) - 1], -1).double()[None, :, None]
    image = h.t()[None, :, :, None]
    return F.grid_sample(image, at, mode="nearest", align_corners=False)[0, :, :, 0].t()


def eye(p: Tensor) -> Tensor:
    return torch.eye(len(p), dtype=torch.float64)[p]


MOVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # W2, W6, W7
    "written": written,
    "embedding": lambda h, p: F.embedding(p, h),
    "embedding bag": lambda h, p: F.embedding_bag(p[:, None], h, mode="sum"),
    "put": lambda h, p: torch.zeros_like(h).put(p.argsort()[:, None] * 4 + torch.arange(4), h),
    "unsafe index": lambda h, p: torch.ops.aten._unsafe_index(h, [p]),
    "function": Picked.apply,
    "sampled": sampled,
    "addbmm": lambda h, p: torch.addbmm(torch.zeros_like(h), eye(p)[None], h[None]),
    "convolution": lambda h, p: F.conv1d(h[None], eye(p)[:, :, None])[0],
    "solved": lambda h, p: torch.linalg.solve(eye(p).t(), h),
    "product and sum": lambda h, p: (eye(p)[:, :, None] * h[None]).sum(1),
}


@pytest.mark.parametrize("move", MOVES)
def test_an_order_that_is_in_place_at_first(move: str) -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        p = order(self, x)
        moved = self.b(MOVES[move](self.a(x).tanh(), p)).tanh()
        return self.c(MOVES[move](moved, p.argsort()))

    assert set(outcomes(built(forward), ORDERS)) == {EXACT}


def shifted(h: Tensor, now: int) -> Tensor:
    out = h * 1
    out[now] = h[0] * 1
    return out


def exchanged(h: Tensor, now: int) -> Tensor:
    out = h * 1
    out[:, :now] = h.flip(0)[:, :now]
    return out


WEIGHED: dict[str, Callable[[Tensor, int], Tensor]] = {  # W2, W3, W6, W8; 0 at first, then 1
    "mixup": lambda h, now: (1 - 0.3 * now) * h + 0.3 * now * h[torch.arange(len(h)).roll(1)],
    "gate": lambda h, now: h + now * h.roll(1, 0),
    "where": lambda h, now: torch.where(torch.full((len(h), 1), now == 0), h, h.roll(1, 0)),
    "maximum": lambda h, now: torch.maximum(h, h.flip(0) - 100 * (1 - now)),
    "messages": lambda h, now: h.index_add(
        0, torch.arange(len(h)).roll(1), h[torch.arange(len(h))] * float(now)
    ),
    "written": shifted,
    "exchanged": exchanged,
    "so far": lambda h, now: h + now * h.cumsum(0),
    "padded": lambda h, now: F.pad(h, (0, 0, now, -now)),
    "strided": lambda h, now: h.as_strided((4, 4), (1, 4) if now else (4, 1)),
    "windows": lambda h, now: F.pad(h, (0, 0, 0, now)).unfold(0, 1 + now, 1).sum(-1),
    "lines": lambda h, now: F.embedding_bag(
        torch.stack([torch.arange(len(h)).roll(now)], 1), h, mode="sum"
    ),
}


@pytest.mark.parametrize("mix", WEIGHED)
@pytest.mark.parametrize("region", [None, True, False])
def test_what_mixes_by_numbers(mix: str, region: bool | None) -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        def mixed(h: Tensor) -> Tensor:
            return WEIGHED[mix](h, self.now) if len(x) == 4 else h

        hidden = self.a(x).tanh()
        if region is None:
            return self.c(mixed(hidden))
        return self.c(checkpoint(mixed, hidden, use_reentrant=region))

    assert outcomes(built(forward), [0, 1, 0, 1]) == [EXACT, MIXING] * 2


def test_two_orders_that_are_the_same_at_first() -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        p, q = self.now if len(x) == 4 else (torch.arange(len(x)),) * 2
        hidden = self.a(x).tanh()
        return self.c(self.b(hidden[p] + 2 * hidden[q]).tanh()[q.argsort()])

    first = ORDERS[1]
    values = [(first, first), (torch.tensor([1, 2, 3, 0]), first), (first, first)]
    assert outcomes(built(forward), values, None) == [EXACT, MIXING, EXACT]


def test_pairs_inside_environments_at_first() -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        hidden = self.a(x).tanh()
        pairs = hidden.unflatten(0, (-1, 2))
        return self.c(hidden + pairs.mean(1, keepdim=True).expand_as(pairs).flatten(0, 1))

    model = built(forward)
    agreement = check(model, curved, rand(4, 3), environments=torch.tensor([1, 1, 0, 0]))
    step = partial(check, model, curved, rand(4, 3), agreement=agreement)
    assert outcome(partial(step, environments=torch.tensor([1, 0, 1, 0]))) == MIXING


def test_a_state_that_the_user_keeps() -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        if self.now:
            p = hashed(x)
            x = x[p][p.argsort()]
        hidden = self.a(x).tanh()
        out, self.state = self.c(hidden + self.state), hidden
        return out

    grads = []
    for now in (False, True):
        torch.manual_seed(0)
        model = built(forward)
        model.register_buffer("state", torch.zeros(4).double())
        model.now = now
        first, second = rand(4, 3), rand(4, 3)
        with am.Agreement(model, am.rules.Mean())():
            curved(model, first).backward(retain_graph=True)
            curved(model, second).backward()
        grads.append(model.a.weight.grad)
    torch.testing.assert_close(*grads)


def test_norms_of_a_layer_that_an_environment_does_not_reach() -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        hidden = self.a(x).tanh()
        chosen = (x[:, 0] > 0).nonzero()[:, 0]
        return self.c(hidden.index_add(0, chosen, self.b(hidden[chosen])))

    model, x = built(forward), rand(6, 3)
    x[:, 0] = torch.tensor([1, 1, 1, 1, -1, -1])
    grads = loop(model, curved, [x], 3)
    agreement = am.Agreement(model, RULE, keep_moments=True)
    am.metrics.Monitor(agreement)
    with agreement(3):
        curved(model, x).backward()
    for (name, _), norm in zip(
        model.named_parameters(), agreement.moments[0].squared_norms, strict=True
    ):
        assert float(grads[name].square().sum()) == pytest.approx(
            0.0 if norm is None else float(norm)
        )


# ---- rows of inputs ----


def kept(self: Function, rows: Tensor) -> Tensor:
    self.buffer = rows[:, :2]
    return rows


PREPARED: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "view in a buffer": kept,
}


@pytest.mark.parametrize("prepare", PREPARED)
def test_rows_of_inputs_are_prepared(prepare: str) -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        p = order(self, x)
        return self.c(self.a(PREPARED[prepare](self, x[p])).tanh()[p.argsort()])

    model = built(forward)
    model.register_buffer("buffer", torch.zeros(1))
    assert set(outcomes(model, ORDERS)) == {EXACT}


def test_an_input_that_is_used_again() -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        p, x = order(self, x), x.clone()
        rows = x.gather(0, p[:, None].expand_as(x))
        x.zero_()
        return self.c(self.a(rows).tanh()[p.argsort()])

    assert set(outcomes(built(forward), ORDERS)) == {EXACT}


def test_rows_of_inputs_inside_vmap() -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        p = order(self, x)
        return self.c(self.a(torch.func.vmap(lambda i: x[i])(p)).tanh()[p.argsort()])

    assert set(outcomes(built(forward), ORDERS)) == {EXACT}


# ---- regions ----


def test_another_branch_inside_a_region() -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        deep = self.now

        def region(rows: Tensor) -> Tensor:
            return self.d(self.b(rows).tanh()) if deep else self.b(rows)

        return self.c(checkpoint(region, self.a(x).tanh(), use_reentrant=True))

    assert set(outcomes(built(forward), [False, True, False, True])) == {EXACT}


def test_orders_of_two_regions() -> None:
    region = partial(checkpoint, use_reentrant=True)

    def forward(self: Function, x: Tensor) -> Tensor:
        p = order(self, x)
        moved = region(lambda rows: self.d(rows)[p], self.a(x).tanh())
        return self.c(region(lambda rows: self.b(rows).tanh()[p.argsort()], moved))

    assert set(outcomes(built(forward), [*ORDERS, IN_PLACE])) == {EXACT}


@pytest.mark.parametrize("back", [False, True])
def test_rows_out_of_place_with_some_parameters(back: bool) -> None:
    """No probe reads the layer at the source, as it is not tracked."""

    def forward(self: Function, x: Tensor) -> Tensor:
        turn = eye(order(self, x))
        out = self.c(self.b(turn @ self.a(x).tanh() if back else self.a(x).tanh()).tanh())
        return turn.t() @ out

    model = built(forward)
    model.now = ORDERS[1]
    agreement = am.Agreement(model, RULE, [model.b.weight])
    with pytest.raises(RuntimeError, match=MIXING), agreement():
        curved(model, rand(4, 3)).backward()


def test_inputs_that_are_out_of_place_prove_nothing() -> None:
    """Rows are moved by one product and put back by another one, which is not its inverse."""

    def forward(self: Function, x: Tensor) -> Tensor:
        turn = eye(order(self, x))
        return turn @ self.c(self.a(turn @ x).tanh())

    model = built(forward)
    model.now = torch.tensor([1, 2, 3, 0])
    with pytest.raises(RuntimeError, match=MIXING), am.Agreement(model, RULE)():
        curved(model, rand(4, 3).requires_grad_()).backward()


def test_a_row_whose_gradient_is_next_to_nothing() -> None:
    """Its environment cannot be told from rounding, so it is not left out."""

    def forward(self: Function, x: Tensor) -> Tensor:
        turn = eye(order(self, x))
        rows = turn.t() @ self.b(turn @ self.a(x).tanh()).tanh()
        return self.c(rows * torch.tensor([1, 1e-13, 1, 1]).double()[: len(x), None])

    assert outcomes(built(forward), ORDERS[1:3], None) == [MIXING] * 2
