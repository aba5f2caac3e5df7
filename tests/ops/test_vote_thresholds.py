"""The thresholds of a test of votes: exact binomial tails, and the step-up of a whole tensor."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import binom, false_discovery_control
from torch import Tensor

import andmask_ext as am
from andmask_ext import reference

ops = torch.ops.andmask
CRITERIA = ("tau", "significance", "fdr")

levels = st.one_of(
    st.sampled_from([0.05, 0.005, 0.5, 0.25, 1e-6, 1 / 3]),
    st.integers(1, 12).map(lambda m: 2.0**-m),  # ties: unanimity of m + 1
    st.floats(1e-9, 0.999),
)
zeros = st.sampled_from(["count", "abstain"])


@st.composite
def tensors(draw: st.DrawFn, most: int = 70) -> Tensor:
    """Gradients of one tensor: fair signs, zeros, and coordinates on which many agree."""
    shape = (draw(st.integers(1, most)), draw(st.sampled_from([0, 1, 2, 7, 64, 300])))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    grads = rng.choice([-1.0, 1.0], shape)
    agreeing = rng.random(shape[1]) < draw(st.sampled_from([0.0, 0.02, 0.3, 1.0]))
    towards = np.where(rng.random(shape) < draw(st.floats(0.5, 1)), 1.0, -1.0)
    grads = np.where(agreeing, towards * rng.choice([-1.0, 1.0], shape[1]), grads)
    # Some coordinates have few voters, as units that are mostly off have.
    off = rng.random(shape[1]) * draw(st.sampled_from([0.0, 0.1, 1.5]))
    grads[rng.random(shape) < off] = draw(st.sampled_from([0.0, -0.0, np.nan]))
    return torch.from_numpy(grads).to(torch.get_default_device())


def found(
    grads: list[Tensor], criterion: str, level: float, zeros: str = "count"
) -> tuple[Tensor, Tensor, Tensor]:
    """Thresholds, kept and tested of the op."""
    moments = am.Moments([g[0] for g in grads], ("votes", "voters"))
    moments.add_stacked(grads)
    _, votes, _, _, voters = moments._lists(range(len(grads)))
    abstain = zeros == "abstain"
    return ops._vote_thresholds(
        votes, voters if abstain else [], moments.count, level, CRITERIA.index(criterion), abstain
    )


def at_coordinates(thresholds: Tensor, grads: Tensor, zeros: str) -> Tensor:
    """The threshold of each coordinate."""
    if zeros == "count":
        return thresholds.long().expand(grads[0].numel()).view(grads.shape[1:])
    return thresholds.long()[reference.voters(grads, zeros)]


@given(grads=tensors(), criterion=st.sampled_from(CRITERIA), level=levels, zeros=zeros)
def test_thresholds_are_those_of_the_definition(
    grads: Tensor, criterion: str, level: float, zeros: str
) -> None:
    thresholds, kept, tested = found([grads], criterion, level, zeros)
    expected = reference.vote_thresholds(grads, **{criterion: level}, zeros=zeros)
    mask = reference.votes(grads).abs() >= expected
    # Where nothing is kept, the definition has the level 0, which any threshold beyond fits.
    assert torch.equal(
        reference.votes(grads).abs() >= at_coordinates(thresholds[0], grads, zeros), mask
    )
    if mask.any() or criterion != "fdr":
        assert torch.equal(at_coordinates(thresholds[0], grads, zeros), expected)
    assert kept.item() == int(mask.sum())
    voters = reference.voters(grads, zeros)
    if criterion == "fdr" and zeros == "abstain":
        least = next(m for m in range(1000) if 2.0 ** (1 - m) <= level * (1 + 1e-9) and m)
        assert tested.item() == int((voters >= least).sum())
    else:
        assert tested.item() == grads[0].numel()


@given(grads=tensors(), q=levels)
def test_fdr_is_the_step_up_of_benjamini_and_hochberg(grads: Tensor, q: float) -> None:
    votes = reference.votes(grads).abs().flatten().cpu().numpy()
    assume(len(votes))
    d = len(grads)
    tails = np.minimum(1.0, 2 * binom.sf((votes + d - 1) // 2, d, 0.5))  # two-sided, exact
    tails = np.where(votes == 0, 1.0, tails)
    adjusted = false_discovery_control(tails, method="bh")
    assume(not (np.abs(adjusted - q) < 1e-7 * q).any())  # scipy's rounding would decide
    kept = found([grads], "fdr", q)[1].item()
    assert kept == int((adjusted <= q).sum())


@given(grads=tensors(), first=levels, second=levels, zeros=zeros,
       criterion=st.sampled_from(["significance", "fdr"]))  # fmt: skip
def test_a_higher_level_keeps_more(
    grads: Tensor, first: float, second: float, zeros: str, criterion: str
) -> None:
    low, high = (found([grads], criterion, x, zeros)[0] for x in sorted((first, second)))
    assert (low >= high).all()


@given(data=st.data(), level=levels, zeros=zeros, criterion=st.sampled_from(CRITERIA))
def test_tensors_of_a_call_do_not_mix(
    data: st.DataObject, level: float, zeros: str, criterion: str
) -> None:
    rows = data.draw(st.integers(1, 20))
    grads = [data.draw(tensors(20))[:rows] for _ in range(3)]
    rows = min(len(g) for g in grads)
    grads = [g[:rows] for g in grads]
    together = found(grads, criterion, level, zeros)
    alone = [found([g], criterion, level, zeros) for g in grads]
    for which, value in enumerate(together):
        assert torch.equal(value, torch.cat([one[which] for one in alone]))


@pytest.mark.parametrize("environments", [127, 128, 1000, 32767, 32768, 100_000])
def test_many_environments(environments: int) -> None:
    votes = torch.randint(-environments, environments + 1, (1000,), dtype=torch.int32)
    votes -= (votes + environments) % 2  # the parity of d
    for alpha in (0.05, 1e-3, 1e-12):
        t, kept, _ = ops._vote_thresholds([votes], [], environments, alpha, 1, False)
        least = int(t)
        tail = 2 * binom.sf(
            (np.array([least - 1, least]) + environments - 1) // 2, environments, 0.5
        )
        assert tail[1] <= alpha < tail[0]
        assert kept.item() == int((votes.abs() >= least).sum())
    t, kept, _ = ops._vote_thresholds([votes], [], environments, 0.01, 2, False)
    tail = 2 * binom.sf((votes.abs().numpy() + environments - 1) // 2, environments, 0.5)
    assert kept.item() == int((false_discovery_control(np.minimum(tail, 1)) <= 0.01).sum())


def test_a_thousand_environments_that_abstain() -> None:
    grads = torch.randn(1024, 200).sign() * (torch.rand(1024, 200) < torch.rand(200).clamp(0.05))
    grads[:, :20] = grads[:, :20].abs()
    thresholds, kept, tested = found([grads], "fdr", 0.01, "abstain")
    assert tested.item() == 200
    votes, voters = reference.votes(grads).abs(), grads.ne(0).sum(0)
    tails = 2 * binom.sf((votes.numpy() + voters.numpy() - 1) // 2, voters.numpy(), 0.5)
    mask = torch.from_numpy(false_discovery_control(np.minimum(tails, 1)) <= 0.01)
    assert kept.item() == int(mask.sum()) >= 15
    assert torch.equal(votes >= thresholds[0].long()[voters], mask)
    message = "at most 1024 environments for fdr with zeros that abstain, but got 1025"
    with pytest.raises(RuntimeError, match=message):
        found([torch.ones(1025, 3)], "fdr", 0.01, "abstain")
    assert found([torch.ones(1025, 3)], "significance", 0.01, "abstain")[1].item() == 3


def test_threads_do_not_matter() -> None:
    grads = [torch.randn(40, n) + (torch.rand(n) < 0.1) for n in (100_000, 3, 70_000)]
    before = torch.get_num_threads()
    results: list[Any] = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append([found(grads, "fdr", 0.01, z) for z in ("count", "abstain")])
    torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# ---- the level: what passes under the null ----


@pytest.mark.parametrize("zeros", ["count", "abstain"])
@pytest.mark.parametrize("environments", [5, 8, 32, 81])
@pytest.mark.parametrize("share_of_zeros", [0.0, 0.3])
def test_noise_passes_as_often_as_the_level_says(
    environments: int, zeros: str, share_of_zeros: float
) -> None:
    rng = torch.Generator().manual_seed(environments)
    columns, alpha = 200_000, 0.1
    grads = torch.randint(0, 2, (environments, columns), generator=rng) * 2.0 - 1
    grads *= torch.rand(environments, columns, generator=rng) >= share_of_zeros
    thresholds, kept, _ = found([grads], "significance", alpha, zeros)
    if zeros == "abstain":
        chances = torch.tensor([
            float(reference.sign_test_tail(int(t), m)) for m, t in enumerate(thresholds[0])
        ])  # fmt: skip
        passing = chances[grads.ne(0).sum(0)].double()
    else:
        passing = torch.tensor(float(reference.sign_test_tail(int(thresholds), environments)))
    assert (passing <= alpha * (1 + 1e-9)).all()
    mean = passing.mean().item() if zeros == "abstain" else passing.item()
    deviation = 5 * (mean * (1 - mean) / columns) ** 0.5
    if zeros == "count" and share_of_zeros:  # zeros against the vote: conservative
        assert kept.item() / columns <= mean + deviation
    else:
        assert abs(kept.item() / columns - mean) <= deviation


def test_the_share_of_noise_among_what_is_kept_is_bounded() -> None:
    """Over 300 tensors of half noise, half signals of which some are strong."""
    rng = torch.Generator().manual_seed(0)
    q, shares, powers = 0.1, [], []
    for _ in range(300):
        strength = torch.rand(200, generator=rng) * 0.5
        strength[:100] = 0
        grads = (torch.rand(32, 200, generator=rng) < 0.5 + strength) * 2.0 - 1
        t = int(found([grads], "fdr", q)[0])
        kept = reference.votes(grads).abs() >= t
        shares.append(kept[:100].sum().item() / max(1, kept.sum().item()))
        powers.append(kept[100:].double().mean().item())
    # Of the noise, half of all coordinates, at most q / 2 is expected; the test is discrete.
    error = np.std(shares) / len(shares) ** 0.5
    assert np.mean(shares) <= q / 2 + 4 * error
    assert np.mean(shares) >= q / 20
    assert np.mean(powers) > 0.4


def test_nothing_is_found_in_noise() -> None:
    """With noise alone, the chance that anything is kept is at most q."""
    rng = torch.Generator().manual_seed(1)
    q, trials = 0.2, 400
    hits = sum(
        found([torch.randn(20, 500, generator=rng)], "fdr", q)[1].item() > 0 for _ in range(trials)
    )
    assert hits <= trials * q + 4 * (trials * q * (1 - q)) ** 0.5
    assert hits > 0


# ---- mistakes ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": 1.5}, r"fdr in \(0, 1\), but got 1.5"),
        ({"level": float("nan")}, r"fdr in \(0, 1\), but got -?nan"),
        ({"criterion": 3}, "criterion 0 .* but got 3"),
        ({"count": 0}, r"count in \[1, 2\^31 - 1\], but got 0"),
        ({"count": 128}, r"votes\[0\] wide enough for 128 environments, but got Char"),
        ({"abstain": True}, r"voters of 1 tensors .* but got 0"),
        ({"votes": [torch.ones(3)]}, r"votes\[0\] of dtype int8, int16 or int32"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    given = {
        "votes": [torch.ones(3, dtype=torch.int8)], "voters": [], "count": 5, "level": 0.1,
        "criterion": 2, "abstain": False, **change,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=f"andmask::_vote_thresholds: expected .*{message}"):
        ops._vote_thresholds(*given.values())


def test_a_level_out_of_reach_is_said_once() -> None:
    grads = torch.ones(4, 5)
    for rule, message in (
        (am.AndMask(significance=0.0123), "significance: expected at least 8 environments for "
         "significance=0.0123, but got 4, .* 0.125, so unanimity is asked for"),
        (am.AndMask(fdr=0.0123), "fdr: expected at least 8 environments .* everything is masked"),
    ):  # fmt: skip
        with pytest.warns(UserWarning, match=message):
            out = rule(grads)
        assert out.eq(1 if rule.fdr is None else 0).all()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rule(grads)
