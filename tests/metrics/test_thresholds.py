"""The threshold of a level, what it keeps and the noise in it, against the exact definition."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torch import Tensor, nn

import andmask_ext as am
from andmask_ext import metrics, reference
from tests.optim.common import environments
from tests.rules.rule_table import votings


def exact(grads: Tensor, options: dict[str, Any]) -> tuple[Tensor, float, float, float]:
    """Return the mask, its mean, that of noise, and the share of noise in what is kept."""
    thresholds = reference.vote_thresholds(grads, **options).flatten()
    voters = reference.voters(grads, options.get("zeros", "count")).flatten()
    mask = reference.votes(grads).abs().flatten() >= thresholds
    chances = [
        reference.sign_test_tail(t, m)
        for t, m in zip(thresholds.tolist(), voters.tolist(), strict=True)
    ]
    kept, noise, n = int(mask.sum()), sum(chances, Fraction(0)), mask.numel()
    if n == 0:
        return mask, math.nan, math.nan, math.nan
    share = float(min(Fraction(1), noise / kept)) if kept else math.nan
    return mask, kept / n, float(noise / n), share


def drawn(data: st.DataObject, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Gradients with signals, noise, zeros and NaN."""
    count = data.draw(st.integers(1, 20))
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    zeros, signal = data.draw(st.floats(0, 1)), data.draw(st.floats(0, 3))
    grads = []
    for shape in shapes:
        one = torch.randn(count, *shape) + signal * torch.randn(shape).relu()
        one[torch.rand(one.shape) < zeros] = 0
        one[torch.rand(one.shape) < 0.01] = torch.nan
        grads.append(one)
    return grads


SHAPES = [(2, 5), (), (0, 2), (20,)]
approx: dict[str, Any] = {"rel": 1e-9, "abs": 1e-12, "nan_ok": True}


@settings(max_examples=50)
@given(st.data())
def test_a_threshold_is_that_of_the_definition(data: st.DataObject) -> None:
    grads = drawn(data, SHAPES)
    count = len(grads[0])
    options = data.draw(votings(count))
    moments = am.Moments([one[0] for one in grads], ("votes", "voters"))
    moments.add_stacked(grads)
    for found in (
        metrics.vote_threshold(grads, **options),
        metrics.vote_threshold(moments, **options),
    ):
        for one, threshold in zip(grads, found, strict=True):
            mask, kept, _, noise = exact(one, options)
            assert threshold.environments == count
            assert threshold.kept_fraction.item() == pytest.approx(kept, **approx)
            assert threshold.noise_share.item() == pytest.approx(noise, **approx)
            least = threshold.votes
            if least.dim():
                least = least[reference.voters(one, "abstain")]
            assert torch.equal((reference.votes(one).abs() >= least).flatten(), mask)


@settings(max_examples=30)
@given(st.data())
def test_a_monitor_shows_the_threshold_of_the_rule(data: st.DataObject) -> None:
    """Whether the rule of the optimizer has the level or the monitor of plain training."""
    params = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    grads = [one.nan_to_num(0.0) for one in drawn(data, SHAPES)]
    options = data.draw(votings(len(grads[0])))
    by_rule = data.draw(st.booleans())
    rule = am.AndMask(**options) if by_rule else am.rules.Mean()
    optimizer = am.optim.AndMaskSGD(params, lr=0.1, rule=rule)
    monitor = metrics.Monitor(optimizer, **({} if by_rule else options))
    environments(optimizer, params, grads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of levels that so few environments never reach
        optimizer.step()
    joint = torch.cat([one.reshape(len(one), -1) for one in grads if one.numel()], 1)
    masks, rows = [], []
    for one in grads:
        mask, *row = exact(one, options)
        masks.append(mask)
        rows.append(row)
    for column, metric in enumerate(("kept_fraction", "noise_kept_fraction", "noise_share")):
        expected = [row[column] for row in rows]
        assert monitor.series(metric)[0].tolist() == pytest.approx(expected, **approx), metric
    means = [one.double().mean(0).flatten() for one in grads]
    norms = [(mask * mean).norm().item() for mask, mean in zip(masks, means, strict=True)]
    assert monitor.series("masked_norm")[0].tolist() == pytest.approx(norms, rel=1e-4, abs=1e-7)
    total = torch.cat(masks)
    assert monitor.total("kept_fraction").item() == pytest.approx(total.double().mean().item())
    whole = (total * joint.double().mean(0)).norm().item()
    assert monitor.total("masked_norm").item() == pytest.approx(whole, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("zeros", ["count", "abstain"])
def test_masked_whole_is_above_one_and_has_no_share_of_noise(zeros: str) -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.zeros(200)) for _ in range(2)]
    optimizer = am.optim.AndMaskSGD(params, lr=0.1, fdr=0.01, zeros=zeros)
    monitor = metrics.Monitor(optimizer)
    noise = torch.randn(2, 16, 200)
    noise[1, :, :50] = 1  # a signal in the second
    environments(optimizer, params, list(noise))
    optimizer.step()
    first, second = monitor.series("threshold")[0].tolist()
    assert first == 17 / 16
    assert second < 1
    assert monitor.series("kept_fraction")[0, 0] == 0
    assert monitor.series("noise_share")[0].isnan().tolist() == [True, False]
    assert 0 < monitor.series("noise_share")[0, 1] <= 0.01
    assert monitor.total("threshold").item() == (first + second) / 2
    assert monitor.total("noise_share").isfinite().all()


def test_what_is_not_finite_is_not_hidden_where_zeros_abstain() -> None:
    params = [nn.Parameter(torch.zeros(5)) for _ in range(2)]
    optimizer = am.optim.AndMaskSGD(params, lr=0.1, tau=1.0, zeros="abstain")
    monitor = metrics.Monitor(optimizer)
    grads = torch.randn(2, 3, 5)
    grads[0, 1, 2] = torch.nan
    environments(optimizer, params, list(grads))
    optimizer.step()
    assert monitor.series("masked_norm")[0].isnan().tolist() == [True, False]


@pytest.mark.parametrize("count", [127, 128, 1024, 1500])
@pytest.mark.parametrize("zeros", ["count", "abstain"])
def test_many_environments(count: int, zeros: str) -> None:
    """Votes of several dtypes, and a table of chances that is made in parts."""
    torch.manual_seed(0)
    grads = torch.randn(count, 400)
    grads[torch.rand(count, 400) < 0.3] = 0
    grads[:, :40] = 1
    voters = reference.voters(grads, zeros)
    levels = [{"significance": 0.01}, {"tau": 0.1}, {"fdr": 0.01}]
    for options in levels[: 2 if count > 1024 else 3]:
        found = metrics.vote_threshold(grads, **options, zeros=zeros)
        least = found.votes[voters] if zeros == "abstain" else found.votes
        kept = (reference.votes(grads).abs() >= least).sum().item()
        assert kept >= 40
        assert found.kept_fraction.item() == kept / 400
        more = (voters + least + 1) // 2  # signs of one side that give so many votes, or more
        noise = (2 * binom.sf(more - 1, voters, 0.5)).clip(max=1).sum()
        assert found.noise_share.item() == pytest.approx(min(1, noise / kept), rel=1e-9)


def test_forms() -> None:
    grads = torch.randn(8, 30)
    one = metrics.vote_threshold(grads, 0.5)
    by_name = metrics.vote_threshold({"w": grads, "b": grads[:, :1]}, tau=0.5)
    assert list(by_name) == ["w", "b"]
    assert one.votes.item() == by_name["w"].votes.item() == 4
    assert one.votes.dtype == torch.int64
    assert one.noise_share.dtype == one.kept_fraction.dtype == torch.float64
    moments = am.Moments([grads[0], grads[0]], ("votes",))
    moments.add_stacked([None, grads])
    nothing, same = metrics.vote_threshold(moments, tau=0.5)
    assert nothing is None
    assert torch.equal(same.kept_fraction, one.kept_fraction)


def test_errors() -> None:
    grads = torch.randn(8, 30)
    with pytest.raises(ValueError, match=r"tau: expected exactly one of .* but got none of them"):
        metrics.vote_threshold(grads)
    with pytest.raises(ValueError, match=r"but got tau=0\.5, fdr=0\.1"):
        metrics.vote_threshold(grads, 0.5, fdr=0.1)
    with pytest.raises(ValueError, match="zeros: expected 'count' or 'abstain', but got 'no'"):
        metrics.vote_threshold(grads, 0.5, zeros="no")
    moments = am.Moments([grads[0]])
    moments.add_stacked([grads])
    with pytest.raises(ValueError, match="grads: expected moments with voters"):
        metrics.vote_threshold(moments, fdr=0.1, zeros="abstain")
    optimizer = am.optim.AndMaskSGD([nn.Parameter(grads[0])], lr=0.1, tau=1.0)
    with pytest.raises(ValueError, match=r"expected exactly one of .* but got tau=0.5, fdr=0.1"):
        metrics.Monitor(optimizer, tau=0.5, fdr=0.1)
    with pytest.raises(ValueError, match="but got none of them"):
        metrics.Monitor(optimizer, zeros="abstain")
    with pytest.raises(ValueError, match=r"significance: expected .* \(0, 1\), but got 0"):
        metrics.Monitor(optimizer, significance=0)


def test_rules_that_abstain_are_watched_with_their_own_threshold_or_another() -> None:
    """One monitor needs votes, another one voters; the update is the same bits."""
    results = []
    for watched in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.zeros(40))]
        optimizer = am.optim.AndMaskSGD(params, lr=0.1, fdr=0.2)
        if watched:
            own = metrics.Monitor(optimizer)
            other = metrics.Monitor(optimizer, tau=0.5, zeros="abstain")
        grads = torch.randn(12, 40).relu()
        environments(optimizer, params, [grads])
        optimizer.step()
        results.append(params[0].detach())
    assert torch.equal(*results)
    for monitor, options in (
        (own, {"fdr": 0.2}),
        (other, {"tau": 0.5, "zeros": "abstain"}),
    ):
        _, kept, _, noise = exact(grads, options)
        assert monitor.latest["kept_fraction/all"].item() == pytest.approx(kept)
        assert monitor.latest["noise_share/all"].item() == pytest.approx(noise)
