"""What the test of a rule keeps of each parameter, and how much of that noise would explain."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._devices import call_by_device
from .._vote_test import VoteTest
from ..moments import Moments
from ._base import Rule
from ._conflicts import AgreementSum
from ._masks import Tested

_ENTRIES = 1 << 20  # of a table of chances, so many at once


class Kept(NamedTuple):
    """A value for each touched parameter, on the device of the first.

    Attributes:
        thresholds: the least ``|votes|`` that keep a coordinate, int64 ``[parameters, 1]``; with
            zeros that abstain ``[parameters, d + 1]``, by the number of voters. If they are more
            than the voters, nothing is kept.
        kept: the number of coordinates that are kept, int64 ``[parameters]``.
        noise: how many would be kept of noise on average, float64 ``[parameters]``.
    """

    thresholds: Tensor
    kept: Tensor
    noise: Tensor


def noise_share(noise: Tensor, kept: Tensor) -> Tensor:
    """Return noise / kept, which is at most 1, and NaN where nothing is kept."""
    return torch.where(kept > 0, (noise / kept).clamp(max=1), torch.nan)


def test_of(rule: Rule) -> VoteTest | None:
    """Return the test of a rule; None: its update depends on no threshold of votes."""
    if isinstance(rule, AgreementSum):
        return VoteTest(0, 1.0, False)
    return rule.test if isinstance(rule, Tested) else None


def kept_by(test: VoteTest, moments: Moments) -> Kept:
    """Return what a test keeps of touched parameters, without waiting for their device.

    Args:
        test: the test. It may be another one than that of the rule.
        moments: moments of at least one environment and parameter, with votes; with voters, too, if
            zeros abstain.
    """
    sums, votes, _, _, voters = moments._lists(moments._touched)
    count = moments.count
    find = torch.ops.andmask._vote_thresholds.default
    thresholds, kept, coordinates = call_by_device(
        lambda *lists: find(*lists, count, test.level, test.criterion, test.abstain),
        votes,
        voters if test.abstain else [],
    )
    thresholds = thresholds.long()
    if not test.abstain:
        one = torch.full((1,), count, device=thresholds.device)
        return Kept(thresholds, kept, coordinates * _tails(one, count)[0][thresholds[:, 0]])
    # Voters are not negative, so this counts coordinates by their voters.
    counts = torch.ops.andmask._vote_histograms.default
    by_voters, _ = call_by_device(lambda *lists: counts(*lists, count), sums, voters)
    noise = torch.zeros_like(kept, dtype=torch.float64)
    all_voters = torch.arange(count + 1, device=thresholds.device)
    for some in all_voters.split(max(1, _ENTRIES // (count + 2))):
        chances = _tails(some, count)[some - some[0], thresholds[:, some]]
        noise += (by_voters[:, some] * chances).sum(1)
    return Kept(thresholds, kept, noise)


def _tails(voters: Tensor, most: int) -> Tensor:
    """Return the chances that so many fair signs add up to at least k or at most -k.

    Args:
        voters: numbers of signs, int64 ``[rows]``, from 0 to ``most``.
        most: the largest number of votes that is of interest.

    Returns:
        float64 ``[rows, most + 2]``, for k from 0 to ``most + 1``.
    """
    signs, votes = voters[:, None], torch.arange(most + 2, device=voters.device)
    log_factorial = torch.arange(1, most + 2, dtype=torch.float64, device=voters.device).lgamma()
    ways = (
        log_factorial[signs]
        - log_factorial[(signs + votes) // 2]
        - log_factorial[((signs - votes) // 2).clamp(min=0)]
    )
    chances = (ways - signs.double() * math.log(2)).exp() * torch.where(votes > 0, 2.0, 1.0)
    chances = torch.where((votes <= signs) & ((signs - votes) % 2 == 0), chances, 0.0)
    tails = chances.flip(1).cumsum(1).flip(1)
    return tails / tails[:, :1]  # the error of many factors, at most 1e-10
