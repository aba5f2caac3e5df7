"""What verify says of models with dropout, of losses of other kinds, and of noise."""

from __future__ import annotations

import random
from collections import UserDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import andmask_ext as am

from ..models import curved, mlp
from .exact_loop import RULE
from .layers import Function, rand

X, Y = torch.randn(6, 5, 8), torch.tensor([0, 1, 1, 2, 2, 1])


class Noise(nn.Module):
    """Drops rows of examples in training, as layers of stochastic depth do."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(len(x), *(1,) * (x.dim() - 1)) if self.training else x


def recurrent(kind: type) -> nn.Module:
    return Function(
        lambda s, x: s.h(s.r(x)[0][:, -1]), r=kind(8, 6, 2, batch_first=True, dropout=0.5),
        h=nn.Linear(6, 3),
    )  # fmt: skip


def functional(function: Callable[[Tensor], Tensor]) -> nn.Module:
    return Function(
        lambda s, x: s.b(function(s.a(x).tanh()).mean(1)), a=nn.Linear(8, 6), b=nn.Linear(6, 3)
    )


def attention(function: Callable[[Tensor], Tensor]) -> nn.Module:
    return Function(
        lambda s, x: s.b(function(s.a(x))).mean(1), a=nn.Linear(8, 6), b=nn.Linear(6, 3)
    )


DROPOUT = {
    "module": lambda: mlp(8, 6, 3, nn.Tanh(), nn.Dropout(0.5)),
    "noise": lambda: mlp(8, 6, 3, Noise(), nn.RReLU()),
    "functional": lambda: functional(lambda x: F.dropout(x, 0.5)),
    "by name": lambda: functional(lambda x: F.dropout(x, p=0.5, training=True, inplace=False)),
    "alpha": lambda: functional(lambda x: F.alpha_dropout(x, 0.5, training=True)),
    "native": lambda: functional(lambda x: torch.dropout(x, 0.5, True)),
    "rrelu": lambda: functional(lambda x: F.rrelu(x, training=True)),
    "attention": lambda: attention(
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
    ),
    "attention by place": lambda: attention(
        lambda x: F.scaled_dot_product_attention(x, x, x, None, 0.5)
    ),
    "multihead": lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.5, batch_first=True),
    "lstm": lambda: recurrent(nn.LSTM),
    "gru": lambda: recurrent(nn.GRU),
    "rnn": lambda: recurrent(nn.RNN),
}


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_is_off(name: str) -> None:
    model = DROPOUT[name]().double()
    verified = am.Agreement(model, RULE).verify(X.double(), curved)
    assert verified.passed, str(verified)
    assert all(module.training for module in model.modules())


def test_modules_keep_their_mode() -> None:
    seen = []

    class Asserting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp(8, 6, 3, nn.Dropout(0.5))

        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, self.body[1].training))
            return self.body(x)

    assert am.Agreement(Asserting(), RULE).verify(X[:, 0], curved).passed
    assert set(seen) == {(True, False)}


def test_reversible_and_rescaled_models() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.RwkvConfig(
        vocab_size=20, context_length=8, hidden_size=8, num_hidden_layers=2, rescale_every=1
    )
    model = transformers.RwkvModel(config).double()
    tokens = torch.randint(0, 20, (4, 6))
    found = am.Agreement(model, RULE).verify(
        tokens, lambda m, ids: m(ids, use_cache=False).last_hidden_state.sin().mean()
    )
    assert found.passed, str(found)


def test_random_numbers_are_drawn_again() -> None:
    """Noise on weights is the same for the batch and each environment; states are restored."""
    model = Function(
        lambda s, x: F.linear(x, s.w + 0.1 * torch.randn(3, 4, dtype=x.dtype)), w=rand(3, 4)
    )
    agreement, x = am.Agreement(model, RULE), rand(7, 4)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    verified = agreement.verify(x, lambda m, x: m(x + random.random()).sin().mean())
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert verified.passed, str(verified)
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_noise_of_examples_is_named() -> None:
    model = functional(lambda x: x + torch.randn_like(x)).double()
    verified = am.Agreement(model, RULE).verify(X.double(), curved)
    assert not verified.passed
    assert "draws random numbers" in str(verified.cause)
    assert "cause: loss_fn draws" in str(verified)


def cross_entropy(**options: Any) -> Callable[[nn.Module, Any], Tensor]:
    return lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"], **options)


@pytest.mark.filterwarnings("ignore:Agreement:UserWarning")
@pytest.mark.parametrize("environments", [None, 2, torch.tensor([0, 0, 1, 0, 2, 1])], ids=str)
def test_another_reduction_is_named(environments: Any) -> None:
    batch = {"x": X[:, 0], "y": Y}
    for given, used in (("mean", "sum"), ("sum", "mean")):
        agreement = am.Agreement(mlp(8, 6, 3), RULE, loss_reduction=given)
        found = agreement.verify(batch, cross_entropy(reduction=used), environments)
        assert not found.passed
        assert f"pass loss_reduction={used!r}" in str(found.cause)
        fine = agreement.verify(batch, cross_entropy(reduction=given), environments)
        assert fine.passed
        assert fine.cause is None


@pytest.mark.filterwarnings("ignore:Agreement:UserWarning")
def test_class_weights_and_ignored_labels_are_named() -> None:
    agreement = am.Agreement(mlp(8, 6, 3), RULE)
    batch = {"x": X[:, 0], "y": Y}
    weight = torch.tensor([1.0, 3.0, 0.5])

    def with_penalty(**options: Any) -> Callable[[nn.Module, Any], Tensor]:
        loss = cross_entropy(**options)
        return lambda model, batch: loss(model, batch) + model(batch["x"]).square().mean()

    assert "class weights" in str(agreement.verify(batch, with_penalty(weight=weight)).cause)
    found = agreement.verify(batch, with_penalty(ignore_index=0), 3)
    assert "ignores labels" in str(found.cause)
    assert agreement.verify(batch, cross_entropy(weight=weight)).passed
    assert agreement.verify(batch, cross_entropy(ignore_index=0), 3).passed

    def remedy(model: nn.Module, batch: Any) -> Tensor:
        losses = F.cross_entropy(model(batch["x"]), batch["y"], weight, reduction="none")
        return losses.mean() + model(batch["x"]).square().mean()

    assert agreement.verify(batch, remedy).passed


def test_a_loss_divided_by_the_batch_is_named() -> None:
    agreement = am.Agreement(mlp(8, 6, 3), RULE)

    def padded(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) ** 2 * batch[1]).sum() / batch[1].sum()

    found = agreement.verify((X[:, 0], Y[:, None] + 1.0), padded)
    assert "ignored or padded labels" in str(found.cause)


def test_statistics_of_the_batch_are_no_fault_of_the_loss() -> None:
    model = Function(lambda s, x: s.h(x - x.mean(0)), h=nn.Linear(8, 3))
    found = am.Agreement(model, RULE).verify(X[:, 0], lambda m, x: m(x).exp().mean(), 2)
    assert not found.passed


def test_lists_of_labels() -> None:
    class Boxes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(8, 4)

        def forward(self, pixels: Tensor, labels: list[dict[str, Tensor]]) -> Tensor:
            losses = [
                (out - label["boxes"]).abs().mean()
                for out, label in zip(self.body(pixels), labels, strict=True)
            ]
            return torch.stack(losses)

    labels = [{"boxes": torch.randn(n, 4), "area": torch.tensor(n)} for n in (1, 4, 2, 6, 2, 3)]
    batch = UserDict(pixels=X[:, 0], labels=labels)
    agreement = am.Agreement(Boxes(), RULE)
    for environments in (None, 2):
        found = agreement.verify(batch, lambda m, b: m(**b).mean(), environments)
        assert found.passed, str(found)


def test_nothing_but_zeros_verifies_nothing() -> None:
    model = nn.Linear(8, 3)
    agreement = am.Agreement(model, RULE)
    with pytest.raises(ValueError, match="all of them are zero"):
        agreement.verify(X[:, 0], lambda m, x: 0 * m(x).mean())
