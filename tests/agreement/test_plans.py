"""What is learnt of one batch is used for the next, and only where it holds there, too.

Each test runs several steps with one Agreement; each step is compared with the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import andmask_ext as am

from ..models import curved
from .exact_loop import RULE, check, compare, loop
from .layers import Function, rand
from .outcomes import NOT_FROM_OUTPUTS, outcome


def assert_exact(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Check batch after batch with one Agreement."""
    agreement = am.Agreement(model.double(), RULE, keep_moments=True)
    for number, x in enumerate(batches):
        try:
            check(model, curved, x, agreement=agreement)
        except (AssertionError, RuntimeError) as error:
            raise AssertionError(f"step {number}: {error}") from error


LENGTHS = [4, 6, 3, 1, 2, 9, 8, 4]

POSITIONS = {
    "slice": lambda s, x: s.layer(x + s.p[:, : x.shape[1]]),
    "slice of rows": lambda s, x: s.layer(x + s.p[0, : x.shape[1]]),
    "slice of a transpose": lambda s, x: s.layer(x + s.p[0].t().t()[: x.shape[1]]),
    "slice from 3": lambda s, x: s.layer(x + s.p[:, 3 : 3 + x.shape[1]]),
    "last": lambda s, x: s.layer(x + s.p[:, -x.shape[1] :]),
    "embedding": lambda s, x: s.layer(x + F.embedding(torch.arange(x.shape[1]), s.p[0])),
    "indexed": lambda s, x: s.layer(x + s.p[0, torch.arange(x.shape[1])]),
    "rows first": lambda s, x: (
        s.layer(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (x.shape[1], -1)).transpose(0, 1)
    ),
    "first row": lambda s, x: s.layer((s.layer(x).tanh() + s.p[:, : x.shape[1]])[:, 0]),
    "last row": lambda s, x: s.layer(s.layer(x)[:, -1].tanh()),
    "class token": lambda s, x: s.layer(
        torch.cat([s.p[:, :1].expand(len(x), -1, -1), s.layer(x)], 1).softmax(1)[:, 0]
    ),
    "attention": lambda s, x: F.scaled_dot_product_attention(s.layer(x), x, s.layer(x).tanh()),
}


@pytest.mark.parametrize(("batch", "width"), [(4, 5), (3, 3), (2, 4)])
@pytest.mark.parametrize("positions", POSITIONS)
def test_sequences_of_other_lengths(positions: str, batch: int, width: int) -> None:
    model = Function(POSITIONS[positions], p=rand(1, 12, width), layer=nn.Linear(width, width))
    assert_exact(model, [rand(batch, length, width) for length in LENGTHS])


@pytest.mark.parametrize("width", [3, 4])
def test_batches_of_other_sizes(width: int) -> None:
    model = Function(
        lambda s, x: s.second(s.first(x + s.p).tanh()),
        first=nn.Linear(width, width), second=nn.Linear(width, 3), p=rand(3, width),
    )  # fmt: skip
    assert_exact(model, [rand(batch, 3, width) for batch in (4, 4, 2, 8, 1, 3, 4)])


class Moving(nn.Module):
    """What it uses of its parameter, and how, changes from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.layer, self.at = nn.Parameter(rand(6, 4)), nn.Linear(4, 4), 0

    def part(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        out = self.part(x)
        self.at += 1
        return out


class Rows(Moving):
    def part(self, x: Tensor) -> Tensor:
        return self.layer(x + self.w[self.at % 3]) + x @ self.w[self.at % 3 :][:4]


class Chunks(Moving):
    def part(self, x: Tensor) -> Tensor:
        return x @ self.w.chunk(3)[self.at % 3].t() + self.w.unbind()[self.at % 6][:2]


class Turned(Moving):
    def part(self, x: Tensor) -> Tensor:
        square = self.w[None, :4].transpose(*((0, 1), (1, 2))[self.at % 2])
        return x @ square.reshape(4, 4)


class Permuted(Moving):
    def part(self, x: Tensor) -> Tensor:
        order = ((0, 1, 2), (1, 0, 2), (1, 2, 0))[self.at % 3]
        return x @ self.w.view(2, 3, 4).permute(order).reshape(6, 4).t()[:, :4].t()


@pytest.mark.parametrize("kind", [Rows, Chunks, Turned, Permuted])
def test_other_parts_of_a_parameter(kind: type[Moving]) -> None:
    """The graphs look the same: only what their nodes have saved differs."""
    model, agreement = kind().double(), None
    for _ in range(5):
        x, before = rand(5, 4), model.at
        grads: list[dict[str, Tensor]] = []
        for row in x:  # `at` moves with each call
            model.at = before
            grads.append(loop(model, curved, [row[None]]))
        agreement = agreement or am.Agreement(model, RULE)
        model.zero_grad()
        model.at = before
        with agreement():
            curved(model, x).backward()
        for name, param in model.named_parameters():
            compare(name, torch.cat([g[name] for g in grads]), param.grad, RULE, 1e-10)


class Flipped(nn.Module):
    """Takes the rows of its batch in another order when told so."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.flip = nn.Linear(4, 4), False

    def forward(self, x: Tensor) -> Tensor:
        first, second = (0, 1) if self.flip else (1, 1)
        rows = x.transpose(first, second)
        return self.layer(rows.reshape(-1, 4)).reshape(rows.shape).transpose(first, second)


@pytest.mark.parametrize("rows", [4, 3])
def test_other_orders_of_the_data(rows: int) -> None:
    model, agreement = Flipped().double(), None
    for flip in (False, True, False):
        model.flip = flip
        agreement = check(model, curved, rand(4, rows, 4), agreement=agreement)


class Shuffled(nn.Module):
    """Mixes environments from the second call on."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.order = torch.tensor(order)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        return self.second(hidden[self.order] if len(x) > 1 else hidden)


@pytest.mark.parametrize("order", [[0, 2, 1, 3], [1, 0, 3, 2], [3, 2, 1, 0], [3, 1, 2, 0]])
def test_shuffled_rows_are_refused_even_if_they_were_in_order_at_first(order: list[int]) -> None:
    model = Shuffled([0, 1, 2, 3])
    assert_exact(model, [rand(4, 4)])
    agreement = am.Agreement(model, RULE)
    with agreement():
        curved(model, rand(4, 4)).backward()
    model.order = torch.tensor(order)
    with pytest.raises(RuntimeError, match="environments mix"), agreement():
        curved(model, rand(4, 4)).backward()


class Experts(nn.Module):
    """Each row goes to one of two experts, chosen by the sign of its first entry."""

    def __init__(self, below: bool) -> None:
        super().__init__()
        self.below = nn.Linear(4, 4) if below else None
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        chosen = (rows[:, 0] > 0).long()
        rows = rows if self.below is None else self.below(rows)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).nonzero()[:, 0]
            if len(mine):
                out = out.index_add(0, mine, expert(rows[mine]))
        return out.unflatten(0, x.shape[:2])


EVEN = [[1, -1]] * 4
PAIRS = [[1, 1], [-1, -1], [1, -1], [-1, 1]]
HALVES = [[1, 1], [1, 1], [-1, -1], [-1, -1]]


@pytest.mark.parametrize("below", [True, False])
@pytest.mark.parametrize("order", [(EVEN, PAIRS, HALVES), (HALVES, EVEN), (PAIRS, EVEN, PAIRS)])
def test_experts_that_get_rows_of_some_examples(
    below: bool, order: Sequence[list[list[int]]]
) -> None:
    """As many rows for each expert in each step, but of other examples.

    They are rows of a layer, or of the input, which requires no gradients.
    """
    batches = []
    for signs in order:
        x = rand(4, 2, 4)
        x[..., 0] = torch.tensor(signs)
        batches.append(x)
    model = Experts(below).double()
    agreement = am.Agreement(model, RULE, keep_moments=True)
    for x in batches:
        check(model, curved, x, agreement=agreement)


TABLES = {
    "permuted": lambda s, x: s.h(F.embedding(x, s.w[torch.tensor([1, 0, 3, 2])])),
    "expanded": lambda s, x: s.h(F.embedding(x, s.w[:1].expand(4, 4))),
    "repeated": lambda s, x: s.h(F.embedding(x, s.w[:1].repeat(4, 1))),
    "scaled": lambda s, x: s.h(F.embedding(x, s.w * torch.arange(1, 5)[:, None])),
    "masked": lambda s, x: s.h(F.embedding(x, s.w * (s.w.detach() > 0))),
}


@pytest.mark.parametrize("table", TABLES)
def test_as_many_lines_as_examples(table: str) -> None:
    """With ids 0, 1, 2, 3 each example has a line of the table of its own."""
    model = Function(TABLES[table], w=rand(4, 4), h=nn.Linear(4, 3))
    ids = [[0, 1, 2, 3], [2, 2, 1, 0], [3, 3, 3, 3], [1, 0, 1, 2]]
    assert_exact(model, [torch.tensor(one) for one in ids])


def test_gradients_that_were_zero_come_later() -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        hidden = (self.w @ x.flatten(0, 1).t()).t().unflatten(0, x.shape[:2])
        return self.layer(x) + hidden * self.gate

    model = Function(forward, w=rand(4, 4), layer=nn.Linear(4, 4), gate=torch.zeros(()))
    assert_exact(model, [rand(4, 4, 4)])
    agreement = None
    for gate in (0.0, 1.0, 0.0, 2.0):
        model.gate.data.fill_(gate)
        agreement = check(model.double(), curved, rand(4, 4, 4), agreement=agreement)


def test_zero_towards_the_output_but_not_towards_the_loss_is_refused() -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        hidden = (self.w @ x.t()).t()
        self.kept = hidden.square().mean()
        return self.layer(x) + hidden @ self.b

    model = Function(forward, w=rand(4, 4), layer=nn.Linear(4, 4), b=torch.zeros(4, 4)).double()
    step = partial(check, model, lambda m, x: curved(m, x) + m.kept, rand(4, 4))
    assert outcome(step) == NOT_FROM_OUTPUTS
