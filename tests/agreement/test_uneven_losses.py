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


def test_a_framework_that_divides() -> None:
    """`loss_scale` and a scaler work on top of it."""
    model, x = nn.Linear(3, C), torch.randn(N, 3)
    y = torch.tensor([0, 1, 1, 2, 0, 1])
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    grads = []
    for scale, used in ((1.0, None), (0.25, scaler)):
        model.zero_grad()
        with am.Agreement(model, RULE)(2, loss_scale=scale, grad_scaler=used):
            loss = scale * F.cross_entropy(model(x), y, weight=WEIGHT.float())
            (loss if used is None else used.scale(loss)).backward()
        grads.append(model.weight.grad / (1.0 if used is None else 64.0))
    torch.testing.assert_close(*grads)
