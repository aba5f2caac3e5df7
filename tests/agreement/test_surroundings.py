"""What stands around a model: hooks, checkpoints, compiled functions, other orders of batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import andmask_ext as am

from ..models import mlp
from .exact_loop import RULE, check, loop
from .layers import rand
from .outcomes import refusal


def classified(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(x), labels)


def labels(count: int = 6) -> Tensor:
    return torch.randint(0, 3, (count,))


# ---- checkpoints that save some results ----

SAVED = {
    "products": (torch.ops.aten.addmm.default, torch.ops.aten.mm.default),
    "activations": (torch.ops.aten.gelu.default,),
    "nothing": (),
}


class Selective(nn.Module):
    def __init__(self, saved: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))
        self.saved = SAVED[saved]

    def policy(self, context: object, op: object, *args: object, **kwargs: object) -> Any:
        save = op in self.saved
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    def forward(self, x: Tensor) -> Tensor:
        contexts = partial(create_selective_checkpoint_contexts, self.policy)
        hidden = self.a(x).tanh()
        return self.b(checkpoint(self.block, hidden, use_reentrant=False, context_fn=contexts))


@pytest.mark.parametrize("saved", SAVED)
def test_checkpoints_that_save_some_results(saved: str) -> None:
    """They allow one backward pass, so the mixing check cannot run before it."""
    model = Selective(saved).double()
    if saved != "nothing":
        with pytest.raises(RuntimeError, match="context_fn"), am.Agreement(model, RULE)():
            classified(model, rand(6, 4), labels()).backward()
    how = "auto" if saved == "nothing" else "never"
    agreement = None
    for _ in range(2):
        agreement = check(
            model, classified, rand(6, 4), labels(), agreement=agreement, check_mixing=how
        )


# ---- compiled functions without parameters ----


compiled = partial(torch.compile, backend="aot_eager")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "methods": lambda h: h.sin() * h.exp().cos(),
    "functions": lambda h: torch.tanh(0.7 * h),
    "rows": lambda h: h[torch.arange(len(h))].softmax(1),
}
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "methods": lambda out, y: (out.sin().square() * out.exp() * (1 + y[:, None])).mean(),
    "functions": F.cross_entropy,
    "rows": lambda out, y: out[torch.arange(len(y)), y].square().mean(),
}


class Activated(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)
        self.activation, self.gate = activation, 0.0

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.a(x))
        return self.b(hidden) + self.gate * self.c(hidden)


@pytest.mark.filterwarnings("ignore")  # those of torch.compile
@pytest.mark.parametrize("how", ACTIVATIONS)
@pytest.mark.parametrize("what", ["loss", "activation", "both"])
def test_compiled_functions_without_parameters(what: str, how: str) -> None:
    torch.compiler.reset()
    activation, loss = ACTIVATIONS[how], LOSSES[how]
    activation = activation if what == "loss" else compiled(activation)
    loss = loss if what == "activation" else compiled(loss)
    model, agreement = Activated(activation).double(), None
    for model.gate in (0.0, 0.0, 1.0):
        agreement = check(
            model, lambda m, x, y: loss(m(x), y), rand(6, 4), labels(), agreement=agreement
        )


@pytest.mark.filterwarnings("ignore")
def test_functions_that_were_compiled_before_the_context() -> None:
    torch.compiler.reset()
    model, loss = Activated(compiled(ACTIVATIONS["methods"])).double(), compiled(LOSSES["methods"])
    for _ in range(2):
        loss(model(rand(6, 4)), labels()).backward()
        check(model, lambda m, x, y: loss(m(x), y), rand(6, 4), labels())


@pytest.mark.filterwarnings("ignore")
def test_compiled_functions_that_use_up_what_they_have_saved() -> None:
    torch.compiler.reset()
    model = Activated(compiled(ACTIVATIONS["methods"])).double()
    agreement = am.Agreement(model, RULE, keep_moments=True)
    with pytest.raises(RuntimeError, match="donated buffers"), agreement():
        with torch._functorch.config.patch(donated_buffer=True):
            classified(model, rand(6, 4), labels()).backward()
    assert torch._functorch.config.donated_buffer
    torch.compiler.reset()
    check(model, classified, rand(6, 4), labels(), agreement=agreement)


# ---- hooks ----


@pytest.mark.parametrize("where", ["every parameter", "the bias", "the first weight"])
def test_hooks_that_look_at_gradients_of_parameters(where: str) -> None:
    """A hook that changes nothing changes nothing: exact, or a refusal that names a way to log."""
    model, seen = mlp().double(), []
    chosen = {"every parameter": list(model.parameters()), "the bias": [model[0].bias],
              "the first weight": [model[0].weight]}  # fmt: skip
    handles = [p.register_hook(lambda grad: seen.append(float(grad.norm()))) for p in chosen[where]]

    def step() -> None:
        with am.Agreement(model, RULE)():
            classified(model, rand(6, 4), labels()).backward()

    message = refusal(step)
    if message:
        assert "Monitor" in message or "unwatch" in message
    for handle in handles:
        handle.remove()
    check(model, classified, rand(6, 4), labels())


class Kept(nn.Module):
    """Keeps the gradient of a hidden layer, as programs that explain decisions do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.a(x).tanh()
        self.kept.retain_grad()
        self.kept.register_hook(lambda grad: self.seen.append(grad.clone()))
        return self.c(self.b(self.kept).tanh())


@pytest.mark.parametrize("kind", ["tensor", "module", "module before"])
def test_hooks_see_the_true_gradient_once(kind: str) -> None:
    model, calls = Kept().double(), []
    x, y = rand(6, 4), labels()
    if kind == "module":
        model.b.register_full_backward_hook(lambda m, into, out: calls.append(out[0].clone()))
    if kind == "module before":
        model.b.register_full_backward_pre_hook(lambda m, out: calls.append(out[0].clone()))
    classified(model, x, y).backward()
    wanted, seen, called = model.kept.grad, list(model.seen), list(calls)
    for _ in range(2):
        model.zero_grad()
        model.seen.clear()
        calls.clear()
        with am.Agreement(model, RULE)():
            classified(model, x, y).backward()
        torch.testing.assert_close(model.kept.grad, wanted)
        assert [len(model.seen), len(calls)] == [len(seen), len(called)]
        for mine, other in zip([*model.seen, *calls], [*seen, *called], strict=True):
            torch.testing.assert_close(mine, other)


# ---- the batch lies elsewhere ----


class Sequence(nn.Module):
    """Tokens first, batch second; its output has the batch first."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.table, self.head, self.kind = nn.Embedding(20, 6), nn.Linear(6, 3), kind
        if kind == "attention":
            self.body: nn.Module = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0)
        else:
            self.body = (nn.LSTM if kind == "lstm" else nn.GRU)(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.body(self.table(tokens))
        if self.kind == "attention":
            return self.head(hidden.mean(0))
        return self.head(hidden[0][-1])


@pytest.mark.parametrize("length", [9, 6])
@pytest.mark.parametrize("kind", ["lstm", "gru", "attention"])
def test_sequence_first_classifiers(kind: str, length: int) -> None:
    model, agreement = Sequence(kind).double(), None
    for _ in range(2):
        agreement = check(
            model, classified, torch.randint(0, 20, (length, 6)), labels(), dims=[1, 0],
            agreement=agreement, batch_dim=1,
        )  # fmt: skip


class Shared(nn.Module):
    """Its first input belongs to all examples."""

    def __init__(self, first: str) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.first = nn.Embedding(9, 6) if first == "positions" else nn.Linear(1, 6)
        self.kind = first

    def forward(self, shared: Tensor, x: Tensor) -> Tensor:
        other = self.first(shared)
        hidden = self.body(x) + other
        hidden = hidden.tanh()
        return self.head(hidden.mean(1) if hidden.dim() == 3 else hidden)


FIRST = {
    "time": (torch.tensor([[0.3]], dtype=torch.float64), (6, 4)),
    "positions": (torch.arange(5)[None], (6, 5, 4)),
}


@pytest.mark.parametrize("first", FIRST)
def test_a_first_input_of_size_one(first: str) -> None:
    """It is no batch of one example: exact, or refused; never plain training in silence."""
    shared, shape = FIRST[first]
    model = Shared(first).double()

    def step(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(shared, x), y)

    message = refusal(lambda: check(model, step, rand(*shape), labels()))
    assert not message or "batch" in message


# ---- parameters that come later ----


def replace_head(model: nn.Sequential) -> None:
    model[2] = nn.Linear(5, 3).double()


def replace_weight(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(rand(5, 4))


def append(model: nn.Sequential) -> None:
    model.append(nn.Linear(3, 3).double())


def thaw(model: nn.Sequential) -> None:
    model[0].bias.requires_grad_()


@pytest.mark.parametrize("change", [replace_head, replace_weight, append, thaw])
def test_parameters_that_come_later(change: Callable[[nn.Sequential], None]) -> None:
    """They are masked, too, or their plain gradient is announced."""
    model = mlp().double()
    model[0].bias.requires_grad_(change is not thaw)
    agreement = am.Agreement(model, RULE)
    x, y = rand(6, 4), labels()
    with agreement():
        classified(model, x, y).backward()
    model.zero_grad()
    change(model)
    grads = loop(model, classified, [x, y])

    def step() -> None:
        with agreement():
            classified(model, x, y).backward()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        message = refusal(step)
    if caught or message:
        assert "param" in message or any("param" in str(each.message) for each in caught)
        return
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.grad, RULE(grads[name]), msg=name)


# ---- several batches, several passes ----


def two_batches(model: nn.Module, x: Tensor, u: Tensor) -> Tensor:
    return F.cross_entropy(model(x), x.argmax(1) % 3) + model(u).softmax(1).square().mean()


@pytest.mark.parametrize("sizes", [(8, 24), (6, 6), (4, 6)])
def test_each_environment_has_its_share_of_two_batches(sizes: tuple[int, int]) -> None:
    model, (x, u) = mlp().double(), (rand(size, 4) for size in sizes)
    agreement = am.Agreement(model, RULE)
    for environments in (2, None) if sizes[0] == sizes[1] else (2, 2):
        model.zero_grad()
        with agreement(environments):
            two_batches(model, x, u).backward()
        got = [param.grad.clone() for param in model.parameters()]
        model.zero_grad()
        parts = (batch.chunk(environments or len(batch)) for batch in (x, u))
        losses = (two_batches(model, *part) for part in zip(*parts, strict=True))
        am.backward(losses, RULE, model.parameters())
        for mine, param in zip(got, model.parameters(), strict=True):
            torch.testing.assert_close(mine, param.grad)


@pytest.mark.parametrize("sizes", [(8, 24), (4, 6)])
def test_examples_of_two_batches_are_no_environments(sizes: tuple[int, int]) -> None:
    """The message names what serves: one pass per environment."""
    model, (x, u) = mlp().double(), (rand(size, 4) for size in sizes)
    for environments in (None, torch.arange(sizes[0]), torch.arange(sizes[1])):
        with (
            pytest.raises(RuntimeError, match=r"andmask_ext\.backward"),
            am.Agreement(model, RULE)(environments),
        ):
            two_batches(model, x, u).backward()
        assert all(param.grad is None for param in model.parameters())
