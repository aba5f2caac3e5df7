"""Losses that are no mean over the examples, seen in the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from andmask_ext.agreement._groups import make_groups
from andmask_ext.agreement._losses import losses_that_are_no_mean
from andmask_ext.agreement._uneven import amounts_of_loss

N, C = 6, 4
Y = torch.tensor([0, 1, 1, 2, 3, 1])
TOKENS = torch.randint(0, C, (N, 5))
W = torch.tensor([1.0, 2.0, 3.0, 4.0])
Loss = Callable[[Tensor], Tensor]


def note(
    loss: Loss, reduction: str = "mean", environments: Any = None, batch_dim: int = 0,
    shape: tuple[int, ...] = (N, C),
) -> str:  # fmt: skip
    x = torch.randn(shape, requires_grad=True)
    root = get_gradient_edge(loss(x)).node
    groups = make_groups(environments, N)
    return losses_that_are_no_mean([root], groups, batch_dim, reduction) or ""


def ignoring(labels: Tensor, *places: Any) -> Tensor:
    labels = labels.clone()
    for place in places:
        labels[place] = -100
    return labels


def amounts(
    loss: Loss, environments: Any = None, batch_dim: int = 0, shape: tuple[int, ...] = (N, C)
) -> list[float] | None:
    """What each environment counts in the loss of an output of the model."""
    output = torch.randn(shape, requires_grad=True).exp()
    root = get_gradient_edge(loss(output)).node
    groups = make_groups(environments, N)
    found = amounts_of_loss([root], groups, {output.grad_fn}, batch_dim)
    return None if found is None else found.tolist()


def two(loss: Loss) -> Loss:
    """The loss and another term: what environments count in it is nothing for the other."""
    return lambda x: loss(x) + x.square().mean()


ALONE = {
    "cross_entropy": lambda x: F.cross_entropy(x, Y, weight=W),
    "nll_loss": lambda x: F.nll_loss(x.log_softmax(1), Y, weight=W),
    "a part of it": lambda x: F.cross_entropy(x, Y, weight=W) / 4 + 1,
    "cast": lambda x: F.cross_entropy(x.double(), Y, weight=W.double()).float(),
}
WEIGHTED = {
    "cross_entropy": two(lambda x: F.cross_entropy(x, Y, weight=W)),
    "nll_loss": two(lambda x: F.nll_loss(x.log_softmax(1), Y, weight=W)),
    "smoothed": lambda x: F.cross_entropy(x, Y, weight=W, label_smoothing=0.1),
    "a term": lambda x: 0.5 * F.cross_entropy(x, Y, weight=W) / 3 + x.square().mean(),
    "subtracted": lambda x: x.square().mean() - F.cross_entropy(x, Y, weight=W),
}
IGNORED = {
    "cross_entropy": lambda x: F.cross_entropy(x, ignoring(Y, 2)),
    "another index": lambda x: F.cross_entropy(x, Y, ignore_index=2),
}


@pytest.mark.parametrize("loss", WEIGHTED.values(), ids=WEIGHTED)
def test_class_weights(loss: Loss) -> None:
    assert "class weights" in note(loss)
    assert "class weights" in note(loss, environments=3)
    assert note(loss, environments=1) == ""


@pytest.mark.parametrize("loss", ALONE.values(), ids=ALONE)
def test_class_weights_of_a_loss_that_has_no_other_term(loss: Loss) -> None:
    assert amounts(loss) == W[Y].tolist()
    assert amounts(loss, 3) == W[Y].view(3, 2).sum(1).tolist()
    assert amounts(loss, torch.tensor([0, 1, 1, 0, 0, 1])) == [8.0, 6.0]
    assert amounts(loss, 1) is None
    assert amounts(two(loss)) is None


@pytest.mark.parametrize("loss", IGNORED.values(), ids=IGNORED)
def test_ignored_labels(loss: Loss) -> None:
    assert "ignores labels" in note(two(loss))
    place = 2 if loss is IGNORED["cross_entropy"] else 3
    assert amounts(loss) == [float(index != place) for index in range(N)]


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "not flat"])
@pytest.mark.parametrize(
    ("places", "expected"),
    [([], ""), ([(slice(None), 4)], ""), ([(0, 4), (2, slice(3, 5))], "ignores labels")],
    ids=["none", "as many of each", "some"],
)
def test_padded_tokens(flat: bool, places: list[Any], expected: str) -> None:
    labels = ignoring(TOKENS, *places)

    def loss(x: Tensor) -> Tensor:
        if flat:
            return F.cross_entropy(x.flatten(0, 1), labels.flatten())
        return F.cross_entropy(x.mT, labels)

    found = note(two(loss), shape=(N, 5, C))
    assert expected in found
    assert bool(found) == bool(expected)
    counts = [float(count) for count in (labels != -100).sum(1)]
    assert amounts(loss, shape=(N, 5, C)) == (counts if expected else None)


def test_padded_tokens_of_a_batch_in_dimension_one() -> None:
    even = ignoring(TOKENS, (slice(None), 4)).T.flatten()
    uneven = ignoring(TOKENS, (0, 4)).T.flatten()
    shape = (5, N, C)
    assert note(lambda x: F.cross_entropy(x.flatten(0, 1), even), batch_dim=1, shape=shape) == ""
    loss = lambda x: F.cross_entropy(x.flatten(0, 1), uneven)  # noqa: E731
    assert "ignores labels" in note(two(loss), batch_dim=1, shape=shape)
    assert amounts(loss, batch_dim=1, shape=shape) == [4.0, *[5.0] * 5]


def test_even_class_weights() -> None:
    assert note(lambda x: F.cross_entropy(x, Y, weight=torch.full((C,), 0.3))) == ""
    pairs = torch.tensor([0, 1, 1, 0, 0, 1])  # each of three environments has both classes
    assert note(lambda x: F.cross_entropy(x, pairs, weight=W), environments=3) == ""
    ids = torch.tensor([0, 0, 0, 0, 1, 1])  # environments of different size
    assert note(lambda x: F.cross_entropy(x, pairs, weight=W), environments=ids) == ""
    assert note(two(lambda x: F.cross_entropy(x, Y, weight=W)), environments=ids) != ""


SUMS = {
    "sum": lambda x: x.square().sum(),
    "sum of a dimension": lambda x: x.square().mean(1).sum(0),
    "mse": lambda x: F.mse_loss(x, torch.zeros(N, C), reduction="sum"),
    "l1": lambda x: F.l1_loss(x, torch.zeros(N, C), reduction="sum"),
    "cross_entropy": lambda x: F.cross_entropy(x, Y, reduction="sum"),
    "weighted": lambda x: F.cross_entropy(x, Y, weight=W, reduction="sum"),
    "bce": lambda x: F.binary_cross_entropy_with_logits(x, torch.ones(N, C), reduction="sum"),
    "ctc": lambda x: F.ctc_loss(
        x.log_softmax(2), torch.ones(N, 2, dtype=torch.int64), torch.full((N,), 5),
        torch.full((N,), 2), reduction="sum",
    ),
    "losses": lambda x: F.cross_entropy(x, Y, reduction="none").sum(),
    "two": lambda x: F.mse_loss(x, torch.zeros(N, C), reduction="sum") + x.exp().sum(1).sum(),
    "negative": lambda x: -x.log_softmax(1)[torch.arange(N), Y].sum(),
    "a constant": lambda x: x.square().sum() + torch.ones(()),
}  # fmt: skip
MEANS = {
    "mean": lambda x: x.square().mean(),
    "sums": lambda x: x.square().sum(1).mean(),
    "sums kept": lambda x: x.square().sum(1, keepdim=True).mean(),
    "mse": lambda x: F.mse_loss(x, torch.zeros(N, C)),
    "cross_entropy": lambda x: F.cross_entropy(x, Y),
    "bce": lambda x: F.binary_cross_entropy_with_logits(x, torch.ones(N, C)),
    "two": lambda x: F.mse_loss(x, torch.zeros(N, C)) + x.exp().mean(),
    "negative": lambda x: -x.log_softmax(1)[torch.arange(N), Y].mean(),
}
NEITHER = {
    "divided": lambda x: x.square().sum() / N,
    "multiplied": lambda x: x.square().mean() * N,
    "divided before": lambda x: (x.square() / N).sum(),
    "weighted": lambda x: (x.square().sum(1) * torch.full((N,), 1 / N)).sum(),
    "mean before": lambda x: x.square().mean(0).sum(),
    "sum before": lambda x: x.square().sum(0).mean(),
    "both": lambda x: x.square().sum() + x.square().mean(),
    "batchmean": lambda x: F.kl_div(x.log_softmax(1), x.detach().softmax(1), reduction="batchmean"),
    "part of the examples": lambda x: x[:4].square().sum(),
    "no batch": lambda x: x.square().mean(0).exp().sum(),
    "dot": lambda x: x.square().sum(1) @ torch.full((N,), 1 / N),
    "soft labels": lambda x: F.cross_entropy(x, x.detach().softmax(1), weight=W),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums(name: str) -> None:
    batch_dim, shape = (1, (5, N, C)) if name == "ctc" else (0, (N, C))
    found = note(SUMS[name], batch_dim=batch_dim, shape=shape)
    assert "pass loss_reduction='sum'" in found
    assert note(SUMS[name], "sum", batch_dim=batch_dim, shape=shape) == ""


@pytest.mark.parametrize("name", MEANS)
def test_means(name: str) -> None:
    assert note(MEANS[name]) == ""
    assert "pass loss_reduction='mean'" in note(MEANS[name], "sum")


@pytest.mark.parametrize("name", NEITHER)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_what_is_not_certain(name: str, reduction: str) -> None:
    assert note(NEITHER[name], reduction) == ""


@pytest.mark.parametrize("name", ["mean before", "sum before"])
def test_as_many_outputs_as_examples(name: str) -> None:
    assert note(NEITHER[name], "mean", shape=(N, N)) == ""
    assert note(NEITHER[name], "sum", shape=(N, N)) == ""


def test_a_long_chain_ends() -> None:
    def chain(x: Tensor) -> Tensor:
        loss = x.sum() * 0
        for _ in range(500):
            loss = loss + x.square().sum()
        return loss

    assert note(chain) == ""
