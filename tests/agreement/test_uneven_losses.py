"""Cross entropies that divide by labels or class weights are exact, as each environment does so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import andmask_ext as am

from .exact_loop import RULE, check

pytestmark = pytest.mark.filterwarnings("error")

N, T, C = 6, 5, 4
WEIGHT = torch.tensor([0.5, 3.0, 1.0, 0.0], dtype=torch.float64)
ENVIRONMENTS = [None, 2, torch.tensor([0, 1, 1, 2, 0, 1])]


class Tagger(nn.Module):
    """A class for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8, dtype=torch.float64)
        self.out = nn.Linear(8, C, dtype=torch.float64)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.table(tokens).tanh())


def flat(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)


def maps(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.mT, labels, **options)


def next_labels(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits[:, :-1].reshape(-1, C), labels[:, 1:].reshape(-1), **options)


def in_single(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    if options:
        options = {"weight": options["weight"].float()}
    return flat(logits.float(), labels, **options).double() / 3


def likelihood(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.nll_loss(logits.log_softmax(2).flatten(0, 1), labels.flatten(), **options)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "flat": flat, "maps": maps, "next labels": next_labels, "in single": in_single,
    "likelihood": likelihood,
}  # fmt: skip


def padded(labels: Tensor, kept: list[int]) -> Tensor:
    """Labels of which each example keeps the first few."""
    labels = labels.clone()
    for row, count in zip(labels, kept, strict=True):
        row[count:] = -100
    return labels


@pytest.mark.parametrize("environments", ENVIRONMENTS, ids=str)
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["labels", "class weights"])
@pytest.mark.parametrize("name", LOSSES)
def test_tokens(name: str, weight: Tensor | None, environments: Any) -> None:
    options = {} if weight is None else {"weight": weight}
    scale = 3.0 if name == "in single" else 1.0

    def step(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
        return scale * LOSSES[name](model(tokens), labels, **options)

    tokens = torch.randint(0, 10, (N, T))
    labels = torch.randint(0, 3, (N, T))
    labels[:, 1] = 1  # each example has a label that counts
    check(
        Tagger(), step, tokens, padded(labels, [5, 2, 3, 5, 4, 2]), environments=environments,
        tolerance=1e-6 if name == "in single" else 1e-9,
    )  # fmt: skip


@given(st.lists(st.integers(1, T), min_size=N, max_size=N), st.sampled_from(ENVIRONMENTS))
def test_any_number_of_labels(kept: list[int], environments: Any) -> None:
    def step(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
        return flat(model(tokens), labels)

    tokens, labels = torch.randint(0, 10, (N, T)), torch.randint(0, C, (N, T))
    check(Tagger(), step, tokens, padded(labels, kept), environments=environments)


@pytest.mark.parametrize("environments", ENVIRONMENTS, ids=str)
def test_images(environments: Any) -> None:
    labels = torch.randint(0, C, (N, 4, 3))
    labels[2, 1:], labels[4, :, :2] = -100, -100
    check(
        nn.Conv2d(3, C, 3, padding=1, dtype=torch.float64),
        lambda model, x, y: F.cross_entropy(model(x), y),
        torch.randn(N, 3, 4, 3, dtype=torch.float64), labels, environments=environments,
    )  # fmt: skip


@pytest.mark.parametrize("environments", ENVIRONMENTS, ids=str)
def test_a_class_for_each_example(environments: Any) -> None:
    check(
        nn.Linear(3, C, dtype=torch.float64),
        lambda model, x, y: F.cross_entropy(model(x), y, weight=WEIGHT),
        torch.randn(N, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 2, 0, 1]),
        environments=environments,
    )  # fmt: skip


def test_an_environment_without_labels_has_no_gradient() -> None:
    """Its loss alone would be NaN. In the batch it votes for neither side, and counts."""
    model = nn.Linear(3, C, dtype=torch.float64)
    x, y = torch.randn(3, 3, dtype=torch.float64), torch.tensor([1, -100, 2])
    agreement = am.Agreement(model, am.AndMask(tau=0.0), keep_moments=True)
    with agreement():
        F.cross_entropy(model(x), y).backward()
    grads = [
        torch.autograd.grad(F.cross_entropy(model(x[k : k + 1]), y[k : k + 1]), model.weight)[0]
        for k in (0, 2)
    ]
    torch.testing.assert_close(model.weight.grad, (grads[0] + grads[1]) / 3)
    votes = agreement.moments[0].votes[0]
    assert torch.equal(votes.long(), (grads[0].sign() + grads[1].sign()).long())


@pytest.mark.parametrize("size", [1.0, 64.0])  # a scaler may come down to 1
def test_a_framework_that_divides(size: float) -> None:
    """`loss_scale` and a scaler work on top of it."""
    model, x = nn.Linear(3, C), torch.randn(N, 3)
    y = torch.tensor([0, 1, 1, 2, 0, 1])
    scaler = torch.amp.GradScaler("cpu", init_scale=size)
    grads = []
    for scale, used in ((1.0, None), (0.25, scaler)):
        model.zero_grad()
        with am.Agreement(model, RULE)(2, loss_scale=scale, grad_scaler=used):
            loss = scale * F.cross_entropy(model(x), y, weight=WEIGHT.float())
            (loss if used is None else used.scale(loss)).backward()
        grads.append(model.weight.grad / (1.0 if used is None else size))
    torch.testing.assert_close(*grads)


# ---- what the way from the outputs to the loss tells ----

KEPT = [5, 2, 3, 5, 4, 2]
SORTED = torch.tensor([3, 0, 5, 1, 4, 2])


def run(
    loss: Callable[[Tensor, Tensor], Tensor], length: int = T, batch_dim: int = 0, **options: Any
) -> None:  # fmt: skip
    """Compare a loss of outputs and padded labels with the loop."""
    tokens = torch.randint(0, 10, (N, length))
    labels = padded(torch.randint(0, C, (N, length)), [min(k, length) for k in KEPT])
    if batch_dim:
        tokens, labels = tokens.T.contiguous(), labels.T.contiguous()
    check(
        Tagger(), lambda m, x, y: loss(m(x), y), tokens, labels, batch_dim=batch_dim,
        dims=(batch_dim, batch_dim),
        **options,
    )  # fmt: skip


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a number": lambda o, y: -0.5 * flat(o, y) / 4 + 1,
    "the mean of one": lambda o, y: flat(o, y).mean(),
    "the sum of one": lambda o, y: torch.stack([flat(o, y)]).sum(),
    "turned": lambda o, y: F.cross_entropy(o.transpose(0, 1).flatten(0, 1), y.T.flatten()),
    "permuted": lambda o, y: F.cross_entropy(o.permute(0, 2, 1), y),
    "cut": lambda o, y: flat(o[:, 1:], y[:, 1:]),
    "capped": lambda o, y: flat(5 * (o / 5).tanh(), y),
    "one axis more": lambda o, y: F.cross_entropy(o.mT[..., None], y[..., None]),
}


@pytest.mark.parametrize("environments", ENVIRONMENTS, ids=str)
@pytest.mark.parametrize("loss", WAYS.values(), ids=WAYS)
def test_ways_to_the_loss(loss: Callable[[Tensor, Tensor], Tensor], environments: Any) -> None:
    run(loss, environments=environments)


@pytest.mark.parametrize("way", [flat, maps, WAYS["turned"], WAYS["permuted"]])
def test_as_many_tokens_as_examples(way: Callable[..., Tensor]) -> None:
    run(way, length=N)


def test_a_batch_in_dimension_one() -> None:
    run(flat, batch_dim=1)
    run(lambda o, y: F.cross_entropy(o.permute(0, 2, 1), y), batch_dim=1)
    run(flat, batch_dim=1, length=N)


NOT_CERTAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a factor of the batch": lambda o, y: flat(o, y) * (y != -100).sum() / y.numel(),
    "other rows": lambda o, y: flat(o[SORTED], y[SORTED]),
    "rows that are turned round": lambda o, y: flat(o.flip(0), y.flip(0)),
    "another term": lambda o, y: flat(o, y) + o.square().mean(),
    "the same twice": lambda o, y: flat(o, y) + flat(o, y),
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("loss", NOT_CERTAIN.values(), ids=NOT_CERTAIN)
def test_what_is_not_certain_is_said_and_left_alone(
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """The gradient of an environment is then its examples' part of that of the batch."""
    model, tokens = Tagger(), torch.randint(0, 10, (N, T))
    labels = padded(torch.randint(0, C, (N, T)), KEPT)
    agreement = am.Agreement(model, am.AndMask(tau=0.0))
    with pytest.warns(UserWarning, match="one cross entropy of the outputs of the model"):
        with agreement():
            loss(model(tokens), labels).backward()
    found = [param.grad for param in model.parameters()]
    expected = torch.autograd.grad(loss(model(tokens), labels), list(model.parameters()))
    torch.testing.assert_close(found, list(expected))


def test_a_mean_over_examples_in_another_way_is_exact() -> None:
    """Its factor undoes the division."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y, weight=WEIGHT) * WEIGHT[y].mean()

    x, y = torch.randn(N, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 2, 0, 1])
    with pytest.warns(UserWarning, match="class weights"):
        check(nn.Linear(3, C, dtype=torch.float64), loss, x, y)


def test_labels_are_counted_exactly() -> None:
    """In bfloat16 1022 labels are 1024."""
    labels = torch.randint(0, C, (4, 256))
    labels[0, :2] = -100
    model = Tagger()

    def step(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
        scores = model(tokens).flatten(0, 1).bfloat16()
        return F.cross_entropy(scores, labels.flatten()).double()

    agreement = am.Agreement(model, am.AndMask(tau=0.0))
    tokens = torch.randint(0, 10, (4, 256))
    with agreement():
        step(model, tokens, labels).backward()
    votes = [param.grad.clone() for param in model.parameters()]
    model.zero_grad()
    for k in range(4):
        (step(model, tokens[[k]], labels[[k]]) / 4).backward()
    for ours, param in zip(votes, model.parameters(), strict=True):
        torch.testing.assert_close(ours, param.grad, rtol=0.1, atol=1e-3)


def test_a_model_that_returns_its_loss_only() -> None:
    class Whole(Tagger):
        def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
            return flat(super().forward(tokens), labels)

    tokens = torch.randint(0, 10, (N, T))
    labels = padded(torch.randint(0, C, (N, T)), KEPT)
    check(Whole(), lambda m, x, y: m(x, y), tokens, labels)
