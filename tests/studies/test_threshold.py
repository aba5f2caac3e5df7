"""``python -m studies threshold``: criteria against their definition, records, the command."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from dataclasses import replace

import andmask_ext as am
from studies.label_noise.training import NoiseSettings
from studies.masks import passed
from studies.records import RunFiles
from studies.spirals import Settings as SpiralsSettings
from studies.spirals.training import train
from studies.threshold.criteria import CRITERIA, Accumulated, discoveries, null, tail
from studies.threshold.settings import PAPER, PARTS, PLANS

from .common import assert_picture, read_records, read_summary, run

TINY = replace(PAPER, width=8, examples=64, batch=32, epochs=3, environments=8, revolutions=1.0)


def moments_of(*grads):
    params = [torch.zeros(grad.shape[1:]) for grad in grads]
    moments = am.Moments(params)
    moments.add_stacked([*grads])
    return moments


def drawn(shape=(16, 20, 30), shift=0.3):
    torch.manual_seed(0)
    grads = torch.randn(shape)
    grads[:, :3] += 4 * shift
    return grads


# ---- the null, and criteria ----


@pytest.mark.parametrize("environments", [1, 2, 7, 32, 1500])
def test_the_null_is_that_of_fair_coins(environments):
    chance = null(environments)
    assert len(chance) == environments + 1
    assert chance[0] == 1
    assert chance[-1] == pytest.approx(2.0 ** (1 - environments), rel=1e-12)
    assert (np.diff(chance) <= 0).all()
    if environments <= 7:
        votes = [abs(2 * bin(b).count("1") - environments) for b in range(2**environments)]
        assert chance == pytest.approx([np.mean(np.array(votes) >= k) for k in range(len(chance))])


@pytest.mark.parametrize("level", [0.005, 0.1, 0.5])
def test_the_rate_of_the_model_is_the_librarys_for_one_tensor(level):
    grads = drawn()
    moments = moments_of(grads)
    kept = am.AndMask(fdr=level)(grads) != 0
    assert 0 < kept.sum() < kept.numel()
    for name in ("fdr of the model", "fdr of a row"):
        one = grads if name == "fdr of the model" else grads[:, :1]  # a single row
        (mask,) = CRITERIA[name](level).masks(moments_of(one))
        assert torch.equal(mask, am.AndMask(fdr=level)(one) != 0)
    assert moments.count == 16


def test_rows_have_thresholds_of_their_own():
    (mask,) = CRITERIA["fdr of a row"](0.05).masks(moments_of(drawn()))
    assert mask[:3].double().mean() > 0.5
    assert mask[3:].double().mean() < 0.05


def test_a_count_bounds_the_noise_that_is_expected():
    grads = drawn()
    (mask,) = CRITERIA["false count"](2.0).masks(moments_of(grads))
    least = int(grads.sign().sum(0).abs()[mask].min())
    assert 600 * null(16)[least] <= 2 < 600 * null(16)[least - 2]  # votes are even


def test_energy_counts_coordinates_by_their_squares():
    grads = drawn()
    (mask,) = CRITERIA["fdr of energy"](0.05).masks(moments_of(grads))
    votes, squares = grads.sign().sum(0).abs(), grads.mean(0).square()
    passes = [
        k
        for k in range(17)
        if (votes >= k).any() and null(16)[k] * squares.sum() <= 0.05 * squares[votes >= k].sum()
    ]
    assert torch.equal(mask, votes >= passes[0])


def test_accumulated_votes_are_those_of_the_first_step_at_first_and_resume():
    steps = [moments_of(torch.randn(64, 500) + 0.5) for _ in range(3)]
    whole, resumed = Accumulated(0.05), Accumulated(0.05)
    expected = [whole.masks(one)[0] for one in steps]
    votes = steps[0].votes[0].abs()
    chance = torch.erfc(votes / 64**0.5 / 2**0.5)
    order = chance.sort().values
    ranks = torch.arange(1, 501)
    reference = chance <= order[500 * order <= 0.05 * ranks].max()
    assert (expected[0] != reference).double().mean() < 0.05  # bins round
    for one in steps[:2]:
        resumed.masks(one)
    again = Accumulated(0.05)
    again.load_state_dict(resumed.state_dict())
    assert torch.equal(again.masks(steps[2])[0], expected[2])


def test_nothing_passes_a_level_that_no_tensor_reaches():
    assert discoveries(tail(torch.zeros(9, dtype=torch.int8), 4), 9, 0.01) == 5


# ---- what a mask lets pass, for the records ----


def test_passed_is_the_share_kept_and_the_least_vote():
    grads = drawn()
    rule = am.AndMask(fdr=0.05)
    share, least = passed(rule, moments_of(grads))
    kept = rule(grads) != 0
    assert share == kept.double().mean()
    assert least == grads.sign().sum(0).abs()[kept].min() / 16
    assert math.isnan(passed(am.AndMask(1.0), moments_of(torch.randn(40, 3)))[1])


# ---- runs ----


def go(folder, settings, mask=None):
    return train(settings, 0, RunFiles(folder, "run", settings.identity()), mask=mask)


def test_one_backward_pass_trains_as_one_for_each_environment(tmp_path):
    settings = replace(TINY, tau=0.5)
    together = go(tmp_path / "a", settings).weights
    apart = go(tmp_path / "b", replace(settings, together=False)).weights
    for name, weight in together.items():
        torch.testing.assert_close(weight, apart[name], rtol=1e-2, atol=1e-4)


def test_a_mask_of_the_study_trains_as_the_librarys_rule(tmp_path):
    rule = go(tmp_path / "a", replace(TINY, fdr=0.3))
    mask = CRITERIA["fdr of a row"]  # of TINY only the last weight is a single row
    other = go(tmp_path / "b", TINY, mask(0.3))
    assert len(rule.results["history"]["kept"]) == len(other.results["history"]["kept"]) == 3
    assert 0 < rule.results["history"]["kept"][-1] < 1


def test_identities_of_old_records_are_kept():
    assert not {"fdr", "significance", "zeros", "together"} & set(SpiralsSettings().identity())
    assert SpiralsSettings().identity()["tau"] == 0.8
    assert "tau" not in SpiralsSettings(fdr=0.01).identity()
    new = {"fdr", "significance", "zeros", "smoothing"}
    assert not new & set(NoiseSettings(tau=0.2).identity())
    assert new & set(NoiseSettings(fdr=0.2).identity()) == {"fdr"}


@pytest.mark.parametrize("settings", [SpiralsSettings, NoiseSettings])
def test_wrong_thresholds_are_refused(settings):
    with pytest.raises(ValueError, match=r"fdr: expected a number in \(0, 1\)"):
        settings(fdr=1.0)
    with pytest.raises(ValueError, match="expected one of them"):
        settings(fdr=0.1, significance=0.1)
    with pytest.raises(ValueError, match="zeros: expected one of count, abstain"):
        settings(fdr=0.1, zeros="none")


def test_no_two_runs_of_the_plan_are_the_same():
    for quick in (False, True):
        for part in PARTS:
            runs = PLANS[part](quick, [0, 1])
            assert len({(one.label, one.seed) for one in runs}) == len(runs)
            assert len({(str(one.settings.identity()), one.seed) for one in runs}) == len(runs)


def test_quick_draws_every_part(tmp_path):
    run("threshold", "--quick", "--output", tmp_path)
    summary = read_summary(tmp_path, "threshold")
    assert len(summary["claims"]) == 8
    found = {claim["text"].split(",")[0]: claim["holds"] for claim in summary["claims"]}
    assert found["from 32 environments on"]
    assert len(read_records(tmp_path)) == summary["runs"] == 17
    for name in ("spirals", "environments", "digits", "criteria"):
        assert_picture(tmp_path / f"threshold-{name}.png", 400)
