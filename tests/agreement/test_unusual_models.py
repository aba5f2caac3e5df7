"""Models of other fields: equations, adjoints, graphs, queries; unusual types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import andmask_ext as am

from ..models import curved, mlp
from .exact_loop import RULE, check, loop
from .layers import rand
from .outcomes import refusal

IDS = torch.tensor([1, 0, 2, 1, 1, 0])


def classified(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(x), labels)


# ---- derivatives in the loss ----


def burgers(u: Tensor, x: Tensor) -> Tensor:
    """What is left of an equation in one dimension and time."""
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first[:, :1].sum(), x, create_graph=True)
    return first[:, 1:] - 0.1 * second[:, :1] + u * first[:, :1]


def laplace(u: Tensor, x: Tensor) -> Tensor:
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    seconds = [
        torch.autograd.grad(first[:, d].sum(), x, create_graph=True)[0][:, d] for d in range(2)
    ]
    return torch.stack(seconds).sum(0)[:, None]


class Equation(nn.Module):
    def __init__(self, residual: Callable[[Tensor, Tensor], Tensor], inside: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1)
        )
        self.residual, self.inside = residual, inside

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        u = self.body(x)
        return (u, self.residual(u, x)) if self.inside else (u,)


@pytest.mark.parametrize("environments", [None, 2, IDS])
@pytest.mark.parametrize("residual", [burgers, laplace])
def test_equations(residual: Callable[[Tensor, Tensor], Tensor], environments: Any) -> None:
    """Exact where the model returns what is left; else exact, or refused with another way."""

    def step(model: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        u, *left = model(x)
        return (left[0] if left else residual(u, x)).square().mean()

    model = Equation(residual, inside=True).double()
    check(model, step, rand(6, 2), environments=environments)
    other = Equation(residual, inside=False).double()
    message = refusal(lambda: check(other, step, rand(6, 2), environments=environments))
    assert not message or "andmask_ext.backward" in message or "return" in message


@pytest.mark.parametrize("environments", [2, 3])
def test_penalties_on_the_gradient_of_each_environment(environments: int) -> None:
    """Invariant risk minimization: the penalty of an environment is made of its examples."""
    model, (x, y) = mlp(4, 6, 2).double(), (rand(12, 4), torch.randint(0, 2, (12,)))

    def risk(logits: Tensor, labels: Tensor) -> Tensor:
        scale = torch.ones((), dtype=logits.dtype, requires_grad=True)
        halves = [F.cross_entropy(logits[k::2] * scale, labels[k::2]) for k in range(2)]
        a, b = (torch.autograd.grad(half, scale, create_graph=True)[0] for half in halves)
        return F.cross_entropy(logits, labels) + 3 * a * b

    grads = loop(model, lambda m, x, y: risk(m(x), y), [x, y], environments)
    with am.Agreement(model, RULE)(environments):
        parts = zip(model(x).chunk(environments), y.chunk(environments), strict=True)
        torch.stack([risk(*part) for part in parts]).mean().backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.grad, RULE(grads[name]), msg=name)


# ---- functions with backward passes of their own ----


class Adjoint(torch.autograd.Function):
    """Steps of x' = f(x), whose backward pass integrates the adjoint."""

    @staticmethod
    def forward(ctx: Any, f: nn.Module, x: Tensor, *params: Tensor) -> Tensor:
        states = [x]
        with torch.no_grad():
            for _ in range(3):
                states.append(states[-1] + 0.1 * f(states[-1]))
        ctx.f, ctx.count = f, len(states)
        ctx.save_for_backward(*states, *params)
        return states[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, params = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        totals = [torch.zeros_like(param) for param in params]
        for state in reversed(states[:-1]):
            with torch.enable_grad():
                before = state.detach().requires_grad_()
                out = before + 0.1 * ctx.f(before)
            grad, *found = torch.autograd.grad(out, [before, *params], grad)
            totals = [total + one for total, one in zip(totals, found, strict=True)]
        return None, grad, *totals


class Flow(nn.Module):
    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.into, self.head, self.field = nn.Linear(4, 5), nn.Linear(5, 3), field

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Adjoint.apply(self.field, self.into(x), *self.field.parameters()))


@pytest.mark.parametrize("environments", [None, 2, IDS])
@pytest.mark.parametrize("hidden", [5, 6])
def test_adjoints(hidden: int, environments: Any) -> None:
    model = Flow(mlp(5, hidden, 5)).double()
    check(model, classified, rand(6, 4), torch.randint(0, 3, (6,)), environments=environments)


# ---- graphs ----


class Graphs(nn.Module):
    """Messages along edges, and the sum over the nodes of each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, source: Tensor, target: Tensor, graph: Tensor) -> Tensor:
        hidden = self.a(x)
        hidden = hidden.index_add(0, target, hidden[source]).tanh()
        pooled = hidden.new_zeros(int(graph.max()) + 1, 5).index_add(0, graph, hidden)
        return self.b(pooled)


@pytest.mark.parametrize("sizes", [(3, 5, 4), (4, 4, 4)])
def test_graphs_are_exact_or_refused(sizes: tuple[int, ...]) -> None:
    model, count = Graphs().double(), sum(sizes)
    x, y = rand(count, 3), torch.randint(0, 2, (len(sizes),))
    graph = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    source = torch.arange(count)
    target = torch.cat([source[graph == g].roll(1) for g in range(len(sizes))])
    columns: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for g in range(len(sizes)):
        rows = graph == g
        first = int(rows.nonzero()[0])
        model.zero_grad()
        out = model(
            x[rows], source[rows] - first, target[rows] - first, torch.zeros_like(graph[rows])
        )
        F.cross_entropy(out, y[g : g + 1]).backward()
        for name, param in model.named_parameters():
            columns[name].append(param.grad)
    for environments in (graph, torch.arange(len(sizes)), None):
        model.zero_grad()

        def step(environments: Tensor | None = environments) -> None:
            with am.Agreement(model, RULE)(environments):
                F.cross_entropy(model(x, source, target, graph), y).backward()

        if not refusal(step):
            for name, param in model.named_parameters():
                torch.testing.assert_close(param.grad, RULE(torch.stack(columns[name])), msg=name)


# ---- queries ----


class Queries(nn.Module):
    """A decoder of queries that all examples share; one norm serves all of its layers."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.queries, self.into = nn.Embedding(5, 8), nn.Linear(4, 8)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=first) for _ in range(2)
        )
        self.norm, self.head, self.first = nn.LayerNorm(8), nn.Linear(8, 3), first

    def forward(self, x: Tensor) -> Tensor:
        memory = self.into(x)
        hidden = self.queries.weight.repeat(len(x), 1, 1)
        if not self.first:
            memory, hidden = memory.transpose(0, 1), hidden.transpose(0, 1)
        outputs = []
        for layer in self.layers:
            hidden = layer(hidden, memory)
            outputs.append(self.norm(hidden))
        stacked = torch.stack(outputs)
        return self.head(stacked.transpose(0, 1) if self.first else stacked.permute(2, 0, 1, 3))


@pytest.mark.parametrize("environments", [None, 2, IDS])
@pytest.mark.parametrize("first", [True, False])
def test_shared_queries(first: bool, environments: Any) -> None:
    check(Queries(first).double(), curved, rand(6, 7, 4), environments=environments)


# ---- other types ----


class Named(torch.Tensor):
    """Keeps its class through functions, as subclasses do by default."""


@pytest.mark.parametrize("environments", [None, IDS])
def test_inputs_of_a_subclass(environments: Any) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
    ).double()
    agreement = None
    for _ in range(2):
        agreement = check(
            model, lambda m, x, y: classified(m, x.as_subclass(Named), y), rand(6, 1, 5, 5),
            torch.randint(0, 3, (6,)), environments=environments, agreement=agreement,
        )  # fmt: skip
    assert {type(param.grad) for param in model.parameters()} == {Tensor}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_models_are_exact_or_refused() -> None:
    """From some step on the interpreter runs the model as one node."""
    model = mlp().double()
    scripted = torch.jit.script(model)
    agreement = am.Agreement(scripted, RULE)
    for _ in range(4):
        x, y = rand(6, 4), torch.randint(0, 3, (6,))
        grads = loop(model, classified, [x, y])
        scripted.zero_grad()

        def step(x: Tensor = x, y: Tensor = y) -> None:
            with agreement():
                classified(scripted, x, y).backward()

        if not refusal(step):
            for name, param in scripted.named_parameters():
                torch.testing.assert_close(param.grad, RULE(grads[name]), msg=name)
