"""The comparison with the loop itself: what it has to catch, and what is rounding."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import andmask_ext as am

from .exact_loop import RULE, check, compare
from .layers import rand
from .outcomes import EXACT, MIXING, NO_BATCH, Tally, outcome

TINY = 1e-17  # what rounding leaves of gradients of about 1
DEAD, ZERO = 2, 3  # a ReLU that is dead in one environment; zero only mathematically
GRADS = torch.tensor([[0.5, -0.25, 0.0, 0.0], [0.125, -0.5, 0.25, 0.0]], dtype=torch.float64)
ELSEWHERE = torch.tensor([[0.5, -0.25, 0.0, -TINY], [0.125, -0.5, 0.25, TINY]], dtype=torch.float64)


def engine(
    votes: dict[int, float] | None = None,
    sums: dict[int, float] | None = None,
    got: Tensor | None = None,
) -> None:
    """Compare the loop's `GRADS` with an engine that is right except in what is given."""
    moments = GRADS.sum(0), GRADS.sign().sum(0)
    for moment, changes in zip(moments, (sums, votes), strict=True):
        for index, value in (changes or {}).items():
            moment[index] = value
    got = RULE(GRADS) if got is None else got
    compare("w", GRADS, got, RULE, 1e-10, moments=moments, elsewhere=lambda: [ELSEWHERE])


def test_an_engine_that_is_right_passes() -> None:
    engine()


@pytest.mark.parametrize("votes", [{0: 0}, {0: -2}, {1: 2}, {DEAD: 2}, {DEAD: 0}, {0: math.nan}])
def test_a_wrong_vote_is_caught(votes: dict[int, float]) -> None:
    with pytest.raises(AssertionError, match="w: 1 of 4 votes differ"):
        engine(votes)


@pytest.mark.parametrize("votes", [-2, -1, 0, 1, 2])
def test_a_gradient_that_is_zero_only_mathematically_may_vote_as_it_likes(votes: int) -> None:
    engine({ZERO: votes}, {ZERO: TINY})


@pytest.mark.parametrize(
    ("votes", "total"), [(3, TINY), (1, 3e-11), (1, 1e-3), (0, 1e-3), (0, math.nan)]
)
def test_but_not_more_often_nor_with_more_than_rounding(votes: int, total: float) -> None:
    with pytest.raises(AssertionError, match="differ"):
        engine({ZERO: votes}, {ZERO: total})


def rescaled(scale: float, **changes: float) -> Tensor:
    """The gradient when the noise votes for it, with the scale that this gives all others."""
    got = scale * am.AndMask(RULE.tau)(GRADS)
    got[ZERO] = scale * TINY
    for index, value in changes.items():
        got[int(index[1:])] = value
    return got


def test_noise_that_is_kept_scales_all_other_coordinates() -> None:
    engine({ZERO: 2}, {ZERO: TINY}, rescaled(4 / 3))


@pytest.mark.parametrize(
    "got",
    [rescaled(0.5), rescaled(4 / 3, _0=0.5), rescaled(4 / 3, _2=0.1), rescaled(math.nan),
     rescaled(4 / 3, _3=math.inf)],
)  # fmt: skip
def test_and_nothing_else_may_differ_then(got: Tensor) -> None:
    with pytest.raises(AssertionError, match="coordinates differ"):
        engine({ZERO: 2}, {ZERO: TINY}, got)


class Tampered(am.Agreement):
    """One vote is as a faulty engine would count it."""

    fault: tuple[int, int]  # the parameter and the coordinate

    @property
    def moments(self) -> list[am.Moments]:
        moments = super().moments
        param, index = self.fault
        moments[0].votes[param][index] = 1  # of two environments: wrong, unless one is zero
        return moments


CAUGHT = pytest.raises(AssertionError, match=r"1 of \d+ votes differ")


class Attention(nn.Module):
    """The keys' bias has a gradient of zero; of the hidden layer the last unit is dead."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
        self.hidden = nn.Linear(4, 5)
        self.hidden.bias.data[:] = torch.tensor([10.0, 10, 10, 10, -10])

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.attention(x, x, x, need_weights=False)
        return self.hidden(out).relu()


@pytest.mark.parametrize(
    ("name", "index", "expected"),
    [("attention.in_proj_bias", 5, nullcontext()), ("attention.in_proj_bias", 9, CAUGHT),
     ("hidden.bias", 0, CAUGHT), ("hidden.bias", 4, CAUGHT)],
)  # fmt: skip
def test_a_wrong_vote_in_a_model(name: str, index: int, expected: Any) -> None:
    """Index 5 is of a key, 9 of a value: rounding is told from what is zero in every rounding."""
    model = Attention().double()
    agreement = Tampered(model, RULE, keep_moments=True)
    agreement.fault = list(dict(model.named_parameters())).index(name), index
    with expected:
        check(model, lambda m, x: m(x).sin().mean(), rand(2, 3, 4), agreement=agreement)


# ---- outcomes ----


def refuse(message: str) -> None:
    raise RuntimeError(message)


def test_a_refusal_without_a_name_is_an_error() -> None:
    assert outcome(lambda: None) == EXACT
    assert outcome(lambda: refuse(f"Agreement: {MIXING}: ...")) == MIXING
    for message in ("Agreement: something new", f"another library: {MIXING}"):
        with pytest.raises(RuntimeError, match=message):
            outcome(lambda message=message: refuse(message))


def test_a_tally_of_random_programs() -> None:
    tally = Tally(MIXING, exact=0.5)
    tally.add(lambda: None)
    tally.add(lambda: refuse(f"Agreement: {MIXING}"))
    tally.close()
    with pytest.raises(AssertionError, match=NO_BATCH):
        tally.add(lambda: refuse(f"Agreement: {NO_BATCH}"))
    tally.add(lambda: refuse(f"Agreement: {MIXING}"))
    with pytest.raises(AssertionError, match=r"0\.333 exact, expected 0\.5"):
        tally.close()
