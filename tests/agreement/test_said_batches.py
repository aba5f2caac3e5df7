"""Batches whose size or place cannot be guessed: the user says it, or evidence tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import andmask_ext as am

from .layers import Function, rand

RULE = am.AndMask(tau=0.6)
N = 6


def exact(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    parts: list[Callable[[], Tensor]],
    environments: Any = None,
    *,
    options: dict[str, Any] | None = None,
    **context: Any,
) -> None:
    """Compare one step with the losses of the environments, one after the other."""
    params = [param for param in model.parameters() if param.requires_grad]
    agreement = am.Agreement(model, RULE, params, keep_moments=True, **(options or {}))
    with agreement(environments, **context):
        loss(None).backward()
    expected = am.Moments(params, ("votes",))
    for part in parts:
        expected.add(list(torch.autograd.grad(part(), params, allow_unused=True)))
    (moments,) = agreement.moments
    assert moments.count == len(parts)
    for name in ("sum", "votes"):
        for ours, theirs in zip(getattr(moments, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-9, atol=1e-11)


def test_parts_that_are_called_as_methods() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.head = nn.Parameter(rand(4, 5)), nn.Linear(5, 3).double()

        def encode(self, x: Tensor) -> Tensor:
            return (x @ self.w).tanh()

        def classify(self, h: Tensor) -> Tensor:
            return F.linear(h, self.head.weight, self.head.bias)

    model, x, y = Model(), rand(N, 4), torch.randint(0, 3, (N,))

    def loss(rows: slice = slice(None)) -> Tensor:
        return F.cross_entropy(model.classify(model.encode(x[rows])), y[rows])

    with pytest.raises(RuntimeError, match="batch_size"), am.Agreement(model, RULE)():
        loss().backward()
    parts = [lambda i=i: loss(slice(i, i + 1)) for i in range(N)]
    exact(model, lambda _: loss(), parts, batch_size=N)
    exact(model, lambda _: loss(), parts, list(range(N)))


def test_offsets_of_an_embedding_bag() -> None:
    model = Function(lambda s, tokens, at: s.h(s.bag(tokens, at)), bag=nn.EmbeddingBag(9, 4),
                     h=nn.Linear(4, 3)).double()  # fmt: skip
    tokens, offsets = torch.randint(0, 9, (17,)), torch.tensor([0, 3, 4, 9, 12, 15])
    ends = [*offsets.tolist()[1:], 17]
    parts = [
        lambda a=a, b=b: model(tokens[a:b], torch.tensor([0])).sin().mean()
        for a, b in zip(offsets.tolist(), ends, strict=True)
    ]
    exact(model, lambda _: model(tokens, offsets).sin().mean(), parts)
    exact(model, lambda _: model(tokens, offsets).sin().mean(), parts, batch_size=N)


@pytest.mark.parametrize("time", [4, N])
def test_tokens_first_and_outputs_with_the_batch_first(time: int) -> None:
    """With as many tokens, or classes, as examples, only the user can tell."""
    model = Function(
        lambda s, x: s.h(s.rnn(x)[0][-1]), rnn=nn.GRU(3, 4), h=nn.Linear(4, N)
    ).double()
    x, y = rand(time, N, 3), torch.randint(0, N, (N,))
    parts = [lambda i=i: F.cross_entropy(model(x[:, i : i + 1]), y[i : i + 1]) for i in range(N)]
    exact(
        model, lambda _: F.cross_entropy(model(x), y), parts,
        options={"batch_dim": 1, "output_batch_dim": 0},
    )  # fmt: skip


@pytest.mark.parametrize("where", ["first", "last", "keyword"])
def test_a_broadcast_input_is_not_the_batch(where: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.t, self.h = nn.Linear(4, 5), nn.Linear(1, 5), nn.Linear(5, 3)

        def forward(
            self, one: Tensor, two: Tensor | None = None, time: Tensor | None = None
        ) -> Tensor:
            x, at = (two, one) if where == "first" else (one, two if time is None else time)
            return self.h((self.a(x) + self.t(at)).tanh())

    model, time = Model().double(), rand(1, 1)

    def call(x: Tensor) -> Tensor:
        if where == "keyword":
            return model(x, time=time).sin().mean()
        return (model(time, x) if where == "first" else model(x, time)).sin().mean()

    x = rand(N, 4)
    exact(model, lambda _: call(x), [lambda i=i: call(x[i : i + 1]) for i in range(N)])


def test_batches_of_two_sizes_have_their_share_of_each_environment() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y, u = rand(8, 4), torch.randint(0, 3, (8,)), rand(24, 4)

    def loss(x: Tensor, y: Tensor, u: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y) + model(u).softmax(1).square().mean()

    parts = [
        lambda a=a, b=b, c=c: loss(a, b, c)
        for a, b, c in zip(x.split(2), y.split(2), u.split(6), strict=True)
    ]
    exact(model, lambda _: loss(x, y, u), parts, 4)
    for environments in (None, torch.arange(8), torch.arange(24)):
        with pytest.raises(RuntimeError, match=r"andmask_ext\.backward"), \
                am.Agreement(model, RULE)(environments):  # fmt: skip
            loss(x, y, u).backward()


def test_graphs_are_told_by_their_nodes() -> None:
    def forward(self: Function, x: Tensor, graph: Tensor) -> Tensor:
        hidden = self.a(x).tanh()
        pooled = hidden.new_zeros(int(graph.max()) + 1, 5).index_add(0, graph, hidden)
        return self.b(pooled)

    model = Function(forward, a=nn.Linear(3, 5), b=nn.Linear(5, 2)).double()
    sizes = torch.tensor([3, 5, 4])
    graph, x, y = torch.arange(3).repeat_interleave(sizes), rand(12, 3), torch.tensor([0, 1, 1])

    def part(g: int) -> Tensor:
        rows = graph == g
        return F.cross_entropy(model(x[rows], torch.zeros(int(rows.sum())).long()), y[g : g + 1])

    parts = [lambda g=g: part(g) for g in range(3)]
    for environments in (graph, graph.tolist(), graph.int() * 7, graph.numpy()):
        exact(model, lambda _: F.cross_entropy(model(x, graph), y), parts, environments)

    def penalised(loss: Tensor) -> Tensor:
        return torch.stack([loss, 0.1 * model.a.weight.square().sum()]).sum()

    ragged = torch.tensor([0, 0, 1])  # two graphs in one environment
    with_penalty = [lambda g=g: penalised(part(g)) for g in range(3)]
    exact(model, lambda _: penalised(F.cross_entropy(model(x, graph), y)), with_penalty, graph)
    with pytest.raises(RuntimeError, match=r"andmask_ext\.backward"), \
            am.Agreement(model, RULE)(ragged[graph]):  # fmt: skip
        F.cross_entropy(model(x, graph), y).backward()
    with pytest.raises(RuntimeError, match="environment of each row"), \
            am.Agreement(model, RULE)(batch_size=3):  # fmt: skip
        F.cross_entropy(model(x, graph), y).backward()


def test_tokens_packed_into_one_row() -> None:
    """Attention sees its own sequence only. Tokens have the sequence as environment."""

    def forward(self: Function, x: Tensor, sequence: Tensor) -> Tensor:
        hidden = self.a(x)
        mask = sequence[0][:, None] == sequence[0][None]
        return self.h(F.scaled_dot_product_attention(hidden, hidden, x, attn_mask=mask))

    model = Function(forward, a=nn.Linear(4, 4), h=nn.Linear(4, 3)).double()
    ids = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    x = rand(1, 9, 4)

    def part(e: int) -> Tensor:
        rows = x[:, ids == e]
        return model(rows, torch.zeros(1, rows.shape[1])).sin().mean()

    with pytest.warns(UserWarning, match="one example"):  # noqa: PT031
        am_once = am.Agreement(model, RULE)
        with am_once():
            model(x, ids[None]).sin().mean().backward()
    parts = [lambda e=e: part(e) for e in range(3)]
    exact(model, lambda _: model(x, ids[None]).sin().mean(), parts, ids)


def test_complex_outputs_are_anchors() -> None:
    model = Function(lambda s, x: torch.fft.rfft(s.a(x)), a=nn.Linear(8, 8)).double()
    x = rand(N, 8)
    exact(
        model, lambda _: model(x).abs().mean(),
        [lambda i=i: model(x[i : i + 1]).abs().mean() for i in range(N)],
    )  # fmt: skip


def test_outputs_that_were_cast_after_the_loss() -> None:
    """As frameworks do: the model computes its loss, and its outputs are returned as copies."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            logits = self.b(self.a(x).tanh())
            return {"loss": F.cross_entropy(logits, y).float(), "logits": logits.float()}

    model, x, y = Wrapped(), rand(N, 4), torch.randint(0, 3, (N,))
    agreement = am.Agreement(model, am.rules.Mean())
    with agreement():
        model(x, y)["loss"].backward()
    ours = model.a.weight.grad
    model.zero_grad()
    model(x, y)["loss"].backward()
    torch.testing.assert_close(ours, model.a.weight.grad)
    assert all(line.uses == 1 for line in agreement.report())


def test_a_divided_loss_is_said_and_undone() -> None:
    model, x, y = nn.Linear(4, 3).double(), rand(8, 4), torch.randint(0, 3, (8,))
    agreement = am.Agreement(model, am.rules.Mean())
    with pytest.warns(UserWarning, match="loss_scale"):  # noqa: PT031
        for last, rows in enumerate((slice(0, 4), slice(4, 8))):
            with agreement(write_grads=bool(last)):
                (F.cross_entropy(model(x[rows]), y[rows]) / 2).backward()
    model.zero_grad()
    for last, rows in enumerate((slice(0, 4), slice(4, 8))):
        with agreement(write_grads=bool(last), loss_scale=0.5):
            (F.cross_entropy(model(x[rows]), y[rows]) / 2).backward()
    ours = model.weight.grad
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(ours, model.weight.grad)
    with pytest.raises(ValueError, match="loss_scale"), agreement(loss_scale=0.0):
        pass
