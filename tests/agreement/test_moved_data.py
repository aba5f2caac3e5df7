"""Rows of data that require no gradients, and rows that the values of a matrix join."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import andmask_ext as am

from ..models import curved
from .exact_loop import RULE, check
from .layers import Function, rand
from .outcomes import MIXING, NOT_FROM_OUTPUTS, REENTRANT_INPUT, refusal

# ---- inputs whose rows are moved ----


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_packed_sequence_of_inputs(
    cell: Callable[..., nn.Module], in_order: bool, checks: list[object]
) -> None:
    def forward(self: Function, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=in_order)
        out = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=5)[0]
        return self.head(out[torch.arange(len(x)), lengths - 1])

    model = Function(forward, rnn=cell(3, 4, batch_first=True), head=nn.Linear(4, 2)).double()
    agreement = None
    for lengths in ([1, 5, 2, 4], [4, 1, 2, 5], [2, 5, 4, 1]):
        given = torch.tensor(sorted(lengths)[::-1] if in_order else lengths)
        agreement = check(model, curved, rand(4, 5, 3), given, agreement=agreement)
    assert len(checks) == 1


def rows_of(x: Tensor) -> Tensor:
    return x.sum(1).argsort()


def sent(self: Function, x: Tensor) -> Tensor:
    """The first layer is a mixture of two experts."""
    chosen = x.sum(1) > 0
    out = torch.zeros(len(x), 4, dtype=x.dtype)
    for layer, rows in ((self.a, chosen.nonzero()[:, 0]), (self.b, (~chosen).nonzero()[:, 0])):
        out = out.index_add(0, rows, layer(x[rows]))
    return self.c(out.tanh())


def exchanged(self: Function, x: Tensor) -> Tensor:
    """Messages along edges of a graph of inputs: 0 and 1, 2 and 3, and so on."""
    source = torch.arange(len(x))
    target = source ^ 1
    messages = self.a(torch.cat([x[source], x[target]], 1)).tanh()
    return self.c(torch.zeros(len(x), 4, dtype=x.dtype).index_add(0, target, messages))


def frozen(self: Function, x: Tensor) -> Tensor:
    hidden = self.d(x).tanh()
    order = rows_of(hidden)
    return self.c(self.b(hidden[order]).tanh()[order.argsort()])


def model_of(forward: Callable[..., Tensor]) -> Function:
    width = 6 if forward is exchanged else 3
    model = Function(
        forward, a=nn.Linear(width, 4), b=nn.Linear(4 if forward is frozen else 3, 4),
        c=nn.Linear(4, 2), d=nn.Linear(3, 4).requires_grad_(False),
    )  # fmt: skip
    return model.double()


@pytest.mark.parametrize("forward", [sent, exchanged, frozen])
def test_rows_of_inputs_that_are_moved(forward: Callable[..., Tensor]) -> None:
    model, agreement = model_of(forward), None
    environments = torch.tensor([0, 0, 1, 1, 2, 2]) if forward is exchanged else None
    for _ in range(4):
        x = rand(6, 3)
        agreement = check(model, curved, x, environments=environments, agreement=agreement)


def test_a_table_that_all_examples_share_is_checked_once(checks: list[object]) -> None:
    """It is an input of the model, and the rows that are looked up differ at each step."""

    def forward(self: Function, x: Tensor, table: Tensor) -> Tensor:
        return self.a(torch.cat([x, table[x.sum(1).abs().long() % len(table)]], 1))

    model, table = Function(forward, a=nn.Linear(6, 2)).double(), rand(7, 3)
    agreement = None
    for _ in range(4):
        step = lambda model, x: curved(model, x, table)  # noqa: E731
        agreement = check(model, step, rand(4, 3), agreement=agreement)
    assert len(checks) == 1


def test_what_is_made_of_moved_inputs_is_as_without_agreement() -> None:
    """Arrays, running means, and rows that are changed in place."""

    def forward(self: Function, x: Tensor) -> Tensor:
        picked = x[rows_of(x)]
        self.seen.append(picked.numpy().sum())
        self.mean.mul_(0.9).add_(picked.mean(0), alpha=0.1)
        x[0] += 0.0
        moved = x.flip(1)
        moved += self.mean
        return self.a(moved)

    model = Function(forward, a=nn.Linear(3, 2)).double()
    model.seen = []
    model.register_buffer("mean", torch.zeros(3, dtype=torch.float64))
    agreement = am.Agreement(model, RULE, keep_moments=True)
    for _ in range(3):
        x = rand(4, 3)
        mean = 0.9 * model.mean + 0.1 * x.mean(0)
        with agreement():
            curved(model, x).backward()
        assert not model.mean.requires_grad
        torch.testing.assert_close(model.mean, mean)
        out = F.linear(x.flip(1) + mean, model.a.weight, model.a.bias)
        columns = [
            torch.autograd.grad((row.sin() + 0.3 * row).mean(), model.a.weight, retain_graph=True)
            for row in out
        ]
        total = torch.stack([grad for (grad,) in columns])
        assert torch.equal(agreement.moments[0].votes[0].long(), total.sign().sum(0).long())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_a_region_that_torch_would_leave_out_is_refused() -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        moved = checkpoint(self.b, x[rows_of(x)], use_reentrant=True)
        return self.c(moved) + self.c(self.a(x))

    model = Function(
        forward, a=nn.Linear(3, 4), b=nn.Linear(3, 4), c=nn.Linear(4, 2)
    ).double()  # fmt: skip
    x = rand(4, 3)
    assert REENTRANT_INPUT in refusal(lambda: check(model, curved, x))


# ---- rows that go by the probes ----


@pytest.mark.parametrize("reentrant", [False, True])
def test_regions_between_a_move_and_its_way_back(reentrant: bool) -> None:
    def forward(self: Function, x: Tensor) -> Tensor:
        hidden = self.a(x).tanh()
        order = rows_of(hidden) if self.moved else torch.arange(len(x))
        inner = checkpoint(self.b, hidden[order], use_reentrant=reentrant)
        return self.c(inner.tanh()[order.argsort()])

    model = Function(
        forward, a=nn.Linear(3, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 2)
    ).double()  # fmt: skip
    agreement = None
    for model.moved in (False, True, True, False):
        agreement = check(
            model, curved, rand(4, 3), environments=torch.tensor([1, 0, 2, 1]), agreement=agreement
        )


def test_a_loss_of_rows_that_no_output_holds_is_refused() -> None:
    """The order is undone by a product, so that no index tells it."""

    def forward(self: Function, x: Tensor) -> Tensor:
        turn = torch.eye(len(x), dtype=x.dtype)[rows_of(x)]
        hidden = self.b(turn @ self.a(x).tanh())
        self.kept.append(hidden)
        chosen = (x[:, :1] > 0).to(x)
        return chosen * self.c(turn.t() @ hidden.tanh())

    def step(model: Function, x: Tensor) -> Tensor:
        loss = curved(model, x)
        hidden = model.kept.pop()
        return loss + (hidden.square().mean() if model.more else 0.0)

    model = Function(
        forward, a=nn.Linear(3, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 2)
    ).double()  # fmt: skip
    model.more, model.kept = False, []
    agreement = check(model, step, rand(4, 3))
    check(model, step, rand(4, 3), agreement=agreement)
    model.more, x = True, rand(4, 3)
    assert NOT_FROM_OUTPUTS in refusal(lambda: check(model, step, x, agreement=agreement))


# ---- rows that a matrix joins ----


def graph_convolution(self: Function, hidden: Tensor, joined: Tensor) -> Tensor:
    return 0.3 * joined.to(hidden) @ self.b(hidden)


def sparse_convolution(self: Function, hidden: Tensor, joined: Tensor) -> Tensor:
    return torch.sparse.mm(0.3 * joined.to(hidden).to_sparse(), self.b(hidden))


def attention(self: Function, hidden: Tensor, joined: Tensor) -> Tensor:
    q, k, v = (layer(hidden)[None, None] for layer in (self.b, self.d, self.e))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=joined)[0, 0]


def products(self: Function, hidden: Tensor, joined: Tensor) -> Tensor:
    scores = self.b(hidden) @ self.d(hidden).t()
    return scores.masked_fill(~joined, -1e30).softmax(-1) @ self.e(hidden)


@pytest.mark.parametrize(
    "join", [graph_convolution, sparse_convolution, attention, products]
)  # fmt: skip
def test_rows_that_a_matrix_joins(join: Callable[..., Tensor]) -> None:
    """Only its values tell which: rows of one graph, and at the third step of two."""

    def forward(self: Function, x: Tensor, graph: Tensor) -> Tensor:
        joined = graph[:, None] == graph
        if self.mix:
            joined = joined | torch.eye(len(x)).roll(1, 0).bool()
        return self.c(join(self, self.a(x).tanh(), joined))

    model = Function(
        forward, a=nn.Linear(3, 4), c=nn.Linear(4, 2), **{n: nn.Linear(4, 4) for n in "bde"}
    ).double()
    graph = torch.tensor([0, 2, 1, 1, 0, 2, 2])
    agreement = am.Agreement(model, RULE, keep_moments=True)

    def step() -> None:
        check(model, curved, rand(7, 3), graph, environments=graph, agreement=agreement)

    for model.mix in (False, False, True, False):
        assert (MIXING in refusal(step)) == model.mix


# ---- the cost ----

USUAL: dict[str, Callable[[], nn.Module]] = {
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True),
    "normalized": lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Softmax(-1)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten()
    ),
    "recurrent": lambda: Function(
        lambda s, x: s.rnn(x)[0][:, -1], rnn=nn.GRU(4, 3, batch_first=True)
    ),
    "class token": lambda: Function(
        lambda s, x: s.b(torch.cat([s.token.expand(len(x), 1, 4), s.a(x) + s.place], 1))[:, 0],
        a=nn.Linear(4, 4), b=nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True),
        token=rand(1, 1, 4), place=rand(1, 5, 4),
    ),
    "weighted mean": lambda: Function(
        lambda s, x: s.b((s.a(x).softmax(1) * x).sum(1)), a=nn.Linear(4, 1), b=nn.Linear(4, 2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("environments", [None, 2, "ids"])
@pytest.mark.parametrize("name", USUAL)
def test_usual_models_are_checked_once(
    name: str, environments: int | str | None, checks: list[object]
) -> None:
    """With ids, until all examples have been in different environments."""
    model, agreement = USUAL[name]().double(), None
    for number in range(4):
        ids = (
            torch.tensor([0, 1, 1, 2, 0, 2]).roll(number) if environments == "ids" else environments
        )
        agreement = check(model, curved, rand(6, 5, 4), environments=ids, agreement=agreement)
    assert len(checks) <= (3 if environments == "ids" else 1)
