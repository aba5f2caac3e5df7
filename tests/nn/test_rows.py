"""Batch norm per environment where an example has several rows of the layer's input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import andmask_ext as am
from andmask_ext.agreement._current import activate, announce, require_batch

from ..agreement.exact_loop import RULE, check, loop
from ..agreement.layers import rand
from ..models import curved

IDS = torch.tensor([1, 0, 2, 1, 1, 0])
ENVIRONMENTS = pytest.mark.parametrize("environments", [None, 3, IDS], ids=["each", "3", "ids"])


class Rows(nn.Module):
    """Batch norm of tokens ``[batch, tokens, channels]`` as rows.

    Args:
        first: the layer has no parameters before it.
        affine: of the layer.
        order: of the rows: by "batch" or by "token".
        kind: "plain", "reentrant" or "recomputed" (under checkpointing).
    """

    def __init__(
        self, first: bool = False, affine: bool = True, order: str = "batch", kind: str = "plain"
    ) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(4, affine=affine)
        self.first, self.by_token, self.kind = first, order == "token", kind

    def normalised(self, x: Tensor) -> Tensor:
        rows = x.transpose(0, 1) if self.by_token else x
        rows = self.norm(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        return rows.transpose(0, 1) if self.by_token else rows

    def forward(self, x: Tensor, *, extra: Tensor | None = None) -> Tensor:
        x = x if self.first else self.a(x)
        if self.kind == "plain":
            x = self.normalised(x)
        else:
            x = checkpoint(self.normalised, x, use_reentrant=self.kind == "reentrant")
        return self.b((self.a(x) if self.first else x).tanh())


def converted(*args: Any, **kwargs: Any) -> nn.Module:
    return am.nn.convert_batchnorm(Rows(*args, **kwargs).double())


@ENVIRONMENTS
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["plain", "reentrant", "recomputed"])
def test_rows_of_each_example(
    kind: str, first: bool, affine: bool, environments: int | Tensor | None
) -> None:
    if kind == "reentrant" and first:
        kind = "plain"  # such a region needs an input with a gradient
    model, agreement = converted(first, affine, kind=kind), None
    for tokens in (5, 2, 5):
        agreement = check(
            model, curved, rand(6, tokens, 4), environments=environments, agreement=agreement
        )


@ENVIRONMENTS
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_rows_in_another_order_are_refused(
    first: bool, affine: bool, environments: int | Tensor | None
) -> None:
    model = converted(first, affine, "token")
    message = "rows of each example one after the other" if first else "environments mix"
    with pytest.raises(RuntimeError, match=message), am.Agreement(model, RULE)(environments):
        curved(model, rand(6, 5, 4)).backward()
    assert all(param.grad is None for param in model.parameters())


def test_the_order_does_not_matter_in_one_environment() -> None:
    check(converted(order="token"), curved, rand(6, 5, 4), environments=1)


@pytest.mark.parametrize("dims", [3, 4])
def test_images_of_an_example(dims: int) -> None:
    """As in a layer that sees ``[batch * channels, features, patches]``."""
    shape = (6, 2, 4, 5) if dims == 3 else (6, 2, 4, 3, 2)
    norm = nn.BatchNorm1d(4) if dims == 3 else nn.BatchNorm2d(4)

    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.w = norm, nn.Parameter(rand(*shape[1:]))

        def forward(self, x: Tensor) -> Tensor:
            x = x * self.w
            return self.norm(x.flatten(0, 1)).unflatten(0, x.shape[:2]).tanh() * self.w

    check(am.nn.convert_batchnorm(Images().double()), curved, rand(*shape))


@pytest.mark.parametrize("inputs", ["x", "x and extra"])
def test_where_the_batch_is_known_from(inputs: str) -> None:
    def step(model: nn.Module, x: Tensor) -> Tensor:
        return model(x=x, **({"extra": x[:1]} if "extra" in inputs else {})).sin().mean()

    check(converted(), step, rand(6, 5, 4))


def test_several_batches_in_one_context() -> None:
    model = converted()
    batches = [rand(*shape, 4) for shape in ((4, 3), (6, 2), (2, 6))]
    grads = [loop(model, curved, [x]) for x in batches]
    agreement = am.Agreement(model, RULE)
    with agreement():
        for x in batches:
            curved(model, x).backward()
    for name, param in model.named_parameters():
        expected = RULE(torch.cat([each[name] for each in grads]))
        torch.testing.assert_close(param.grad, expected)


def test_a_wrong_guess_of_the_batch_is_refused() -> None:
    layer = am.nn.convert_batchnorm(nn.BatchNorm1d(4).double())
    with activate(None):
        announce([rand(3, 4), rand(6, 4)], 0)
        layer(rand(30, 4))
        with pytest.raises(RuntimeError, match=r"batch to have 3 .* batch_size=6"):
            require_batch(6)
        announce([rand(1, 4), rand(6, 4), rand(3, 4)], 0)
        layer(rand(30, 4))
        require_batch(6)
    for arguments in ((None, 6), (torch.arange(6), None)):  # the remedy, and ids
        with activate(*arguments):
            announce([rand(3, 4), rand(6, 4)], 0)
            layer(rand(30, 4))
            require_batch(6)


def test_some_rows_are_refused() -> None:
    class Chosen(Rows):
        def forward(self, x: Tensor) -> Tensor:
            rows = self.a(x).flatten(0, 1)
            chosen = rows.clone()
            chosen[:-1] = self.norm(rows[:-1])
            return chosen.unflatten(0, x.shape[:2])

    model = am.nn.convert_batchnorm(Chosen().double())
    with pytest.raises(RuntimeError, match="as many rows for each of the 6"), \
            am.Agreement(model, RULE)():  # fmt: skip
        curved(model, rand(6, 5, 4)).backward()
