"""Random networks that move rows about: exact where environments are apart, else refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import andmask_ext as am

from ..models import curved
from .exact_loop import RULE, check
from .layers import Function, rand
from .moves import MIXERS, MOVES, experts, order_of
from .networks import SHOWN, draw, judge
from .outcomes import EXACT, MIXING, outcome

# Regions within reentrant ones are called without gradients at first.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")

EXAMPLES = max(6, settings().max_examples // 4)
SEEDS = st.integers(0, 2**32)


@pytest.mark.parametrize("move", MOVES)
@settings(max_examples=EXAMPLES)
@given(seed=SEEDS)
def test_networks_that_move_rows(move: str, seed: int) -> None:
    """Some frozen networks hide a move: they are exact once their inputs require gradients."""
    assert judge(seed, move) in (EXACT, SHOWN)


@pytest.mark.parametrize("mixer", MIXERS)
@settings(max_examples=EXAMPLES)
@given(seed=SEEDS)
def test_networks_that_mix_environments(mixer: str, seed: int) -> None:
    assert outcome(draw(seed, mixer=mixer).compare) == MIXING


def test_mixing_that_comes_later_is_refused() -> None:
    """Rows that were put back at first, and are not at a later step."""

    def forward(self: Function, x: Tensor) -> Tensor:
        hidden = self.a(x).tanh()
        order = order_of(hidden, 0)
        back = torch.arange(len(x)) if self.mix else order.argsort()
        return self.b(hidden[order]).tanh()[back] + self.c(hidden)

    model = Function(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4)).double()
    agreement = None
    for model.mix in (False, False, True, False):
        x = rand(5, 3)
        x = x[order_of(model.a(x).tanh(), 0).flip(0)]  # so that an order is never the one it has
        if model.mix:
            with pytest.raises(RuntimeError, match="environments mix"), agreement():
                curved(model, x).backward()
        else:
            agreement = check(model, curved, x, agreement=agreement)


# ---- rows that are packed ----


def packed(seed: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A network on rows of which each graph has some, pooled to one row for each graph."""
    torch.manual_seed(seed)
    width = int(torch.randint(2, 6, ()))

    def forward(self: Function, x: Tensor, graph: Tensor) -> Tensor:
        hidden = self.a(x).tanh()
        order = graph.argsort(stable=True)
        source, target = order[:-1], order[1:]
        same = graph[source] == graph[target]
        hidden = hidden.index_add(0, target[same], self.b(hidden[source[same]]).tanh())
        graphs = int(graph.max()) + 1
        return self.c(hidden.new_zeros(graphs, width).index_add(0, graph, hidden))

    model = Function(
        forward, a=nn.Linear(3, width), b=nn.Linear(width, width), c=nn.Linear(width, 2)
    ).double()
    batches = []
    for rows in (8, 8, 11):
        graph = torch.cat([torch.arange(4), torch.randint(0, 4, (rows - 4,))])
        batches.append((rand(rows, 3), graph[torch.randperm(rows)]))
    return model, batches


@settings(max_examples=EXAMPLES)
@given(seed=SEEDS)
def test_packed_rows_that_are_pooled(seed: int) -> None:
    model, batches = packed(seed)
    agreement = am.Agreement(model, RULE, keep_moments=True)

    def step(model: nn.Module, x: Tensor, graph: Tensor) -> Tensor:
        return curved(model, x, torch.unique(graph, return_inverse=True)[1])

    for x, graph in batches:
        check(model, step, x, graph, environments=graph, agreement=agreement)


# ---- the cost ----


def test_rows_that_move_are_checked_once(checks: list[object]) -> None:
    """Other experts, other last tokens, another order: the indices explain them at each step."""

    def forward(self: Function, x: Tensor) -> Tensor:
        hidden = self.a(x).tanh()
        hidden = hidden + experts(hidden, 0, self.b)
        order = order_of(hidden, 0)
        hidden = hidden + self.b(hidden[order])[order.argsort()].tanh()
        last = (x[..., 0] > 0).sum(1).clamp(max=x.shape[1] - 1)
        return self.c(hidden.sort(1).values[torch.arange(len(x)), last])

    model = Function(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 2)).double()
    agreement, routes = None, set()
    for _ in range(8):
        x = 5 * rand(6, 5, 3)
        routes.add(tuple(model.a(x).tanh()[..., :3].argmax(-1).flatten().tolist()))
        agreement = check(model, curved, x, agreement=agreement)
    assert len(routes) == 8
    assert len(checks) == 1


# ---- one example that another place is given ----

PLACES = {
    "joined": lambda x, row, k: torch.cat([0 * x[:k, :3], row[None], 0 * x[k + 1 :, :3]]),
    "padded": lambda x, row, k: nn.functional.pad(row[None], (0, 0, k, len(x) - k - 1)),
    "masked": lambda x, row, k: row * (torch.arange(len(x)) == k)[:, None],
    "chosen": lambda x, row, k: torch.where((torch.arange(len(x)) == k)[:, None], row, 0.0),
    "written": lambda x, row, k: torch.zeros_like(x).index_fill(0, torch.tensor(k), 0).index_put(
        (torch.tensor([k]),), row[None]
    ),
    "scattered": lambda x, row, k: torch.select_scatter(torch.zeros_like(x), row, 0, k),
    "multiplied": lambda x, row, k: (
        nn.functional.one_hot(torch.tensor([k]), len(x)).to(x).t() @ row[None]
    ),
}  # fmt: skip


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_one_example_that_has_another_place_at_each_step(place: str, hidden: bool) -> None:
    """The graphs are the same; only the data tell whose the row is."""

    def forward(self: Function, x: Tensor) -> Tensor:
        k = int(x.detach().sum(1).argmax())
        first = self.layer(x) if hidden else x
        return self.layer(first) + PLACES[place](x, self.layer(first[k]), k)

    model = Function(forward, layer=nn.Linear(3, 3)).double()
    agreement = am.Agreement(model, RULE, keep_moments=True)
    for number in (0, 2, 1, 3, 3):
        x = 0.1 * rand(4, 3)
        x[number] += 3
        columns = []
        for example in range(4):  # alone, an example would always be the chosen one
            model.zero_grad()
            curved_row = model(x)[example]
            (curved_row.sin() + 0.3 * curved_row).mean().backward()
            columns.append([param.grad.clone() for param in model.parameters()])
        model.zero_grad()
        with agreement():
            out = model(x)
            (out.sin() + 0.3 * out).mean().backward()
        for grads, votes in zip(
            zip(*columns, strict=True), agreement.moments[0].votes, strict=True
        ):
            torch.testing.assert_close(votes.double(), torch.stack(grads).sign().sum(0))
