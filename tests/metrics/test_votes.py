"""Metrics of votes against their definitions, and the pure-noise null against exact fractions."""

from __future__ import annotations

import math
import warnings
import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import andmask_ext as am
from andmask_ext import _notices, metrics, reference
from tests.strategies import stacked, taus, tie_taus

from .forms import FORMS, in_order, parameters

forms = pytest.mark.parametrize("form", FORMS)


def votes_of(grads: Tensor) -> Tensor:
    return reference.votes(grads).abs()


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sign_agreement(form: str, dtype: torch.dtype) -> None:
    many = parameters(dtype=dtype)
    result = metrics.sign_agreement(FORMS[form](many))
    assert isinstance(result, dict) == (form == "dict")
    for one, grads in zip(in_order(result), many, strict=True):
        assert one.dtype == dtype
        assert one.shape == grads.shape[1:]
        torch.testing.assert_close(one, (votes_of(grads) / len(grads)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sign_agreement_of_narrow_types(dtype: torch.dtype) -> None:
    grads = torch.randn(300, 4).to(dtype)
    result = metrics.sign_agreement(grads)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, (votes_of(grads) / 300).float())


def test_a_tensor_gives_a_tensor_and_untouched_parameters_none() -> None:
    assert metrics.sign_agreement(torch.randn(3, 4)).shape == (4,)
    moments = am.Moments([torch.zeros(2), torch.zeros(3)])
    moments.add([None, torch.tensor([1.0, -1.0, 0.0])])
    untouched, touched = metrics.sign_agreement(moments)
    assert untouched is None
    assert touched.tolist() == [1.0, 1.0, 0.0]
    assert metrics.kept_fraction(moments, 1.0, per_parameter=True)[0] is None
    assert metrics.kept_fraction(moments, 1.0).item() == pytest.approx(2 / 3)


@given(stacked(np.float32), st.data())
def test_kept_fraction_is_the_mean_of_the_mask(values: np.ndarray, data: st.DataObject) -> None:
    grads = torch.from_numpy(values)
    tau = data.draw(st.one_of(taus, tie_taus(len(grads))))
    expected = reference.agreement_mask(grads, tau).mean()
    assert metrics.kept_fraction(grads, tau).item() == pytest.approx(expected.item(), abs=1e-15)


@forms
def test_kept_fraction_of_many_parameters(form: str) -> None:
    many = parameters()
    kept = [reference.agreement_mask(grads, 0.5) for grads in many]
    result = metrics.kept_fraction(FORMS[form](many), 0.5)
    assert result.dim() == 0
    assert result.item() == pytest.approx(torch.cat([k.flatten() for k in kept]).mean().item())
    each = metrics.kept_fraction(FORMS[form](many), 0.5, per_parameter=True)
    assert [one.item() for one in in_order(each)] == pytest.approx([k.mean().item() for k in kept])


@given(stacked(np.float64, finite=True), st.data())
def test_the_tau_curve_is_what_each_tau_keeps(values: np.ndarray, data: st.DataObject) -> None:
    grads = torch.from_numpy(values)
    curve = metrics.tau_curve(grads)
    assert curve.tau.tolist() == [k / len(grads) for k in range(len(grads) + 1)]
    k = data.draw(st.integers(0, len(grads)))
    between = k / len(grads) - data.draw(st.floats(0, 0.999)) / len(grads) + 1e-7
    for tau in {k / len(grads), min(max(between, 0.0), k / len(grads))}:
        masked = reference.masked_mean(grads, tau)
        assert curve.kept_fraction[k].item() == pytest.approx(
            reference.agreement_mask(grads, tau).mean().item(), abs=1e-15
        )
        assert curve.norm[k].item() == pytest.approx(masked.norm().item(), rel=1e-9)
        assert curve.noise_kept_fraction[k].item() == pytest.approx(
            metrics.noise_kept_probability(len(grads), tau), rel=1e-12
        )


@forms
def test_the_histogram_of_many_parameters(form: str) -> None:
    many = parameters()
    histogram = metrics.vote_histogram(FORMS[form](many))
    votes = torch.cat([votes_of(grads).flatten() for grads in many])
    squares = torch.cat([grads.double().mean(0).flatten() for grads in many]).square()
    assert histogram.environments == 6
    assert histogram.counts.tolist() == [int((votes == k).sum()) for k in range(7)]
    for k in range(7):
        assert histogram.squares[k].item() == pytest.approx(
            squares[votes == k].sum().item(), rel=1e-5
        )
    assert histogram.share.sum().item() == pytest.approx(1.0)
    assert histogram.kept_fraction(0.5).item() == pytest.approx((votes >= 3).double().mean().item())
    assert histogram.noise.tolist() == metrics.noise_votes(6).tolist()


def test_what_is_not_finite_shows_in_every_norm_of_the_curve() -> None:
    grads = torch.tensor([[1.0, 1.0, 2.0], [1.0, -1.0, 2.0]])
    for bad in (torch.nan, torch.inf):
        there = grads.clone()
        there[0, 1] = bad  # the votes disagree, or one is missing: masked at tau = 1
        curve = metrics.tau_curve(there)
        assert not torch.isfinite(curve.norm).any()
    assert torch.isfinite(metrics.tau_curve(grads).norm).all()


# ---- the null ----


@pytest.mark.parametrize("environments", [1, 2, 3, 8, 16, 31, 80, 257])
def test_noise_votes_against_exact_fractions(environments: int) -> None:
    exact = [Fraction(0)] * (environments + 1)
    for plus in range(environments + 1):
        exact[abs(2 * plus - environments)] += Fraction(
            math.comb(environments, plus), 2**environments
        )
    assert metrics.noise_votes(environments).tolist() == pytest.approx(
        [float(one) for one in exact], rel=1e-12, abs=0
    )
    for k in range(environments + 1):
        assert metrics.noise_kept_probability(environments, k / environments) == pytest.approx(
            float(sum(exact[k:])), rel=1e-12
        )


@pytest.mark.parametrize(
    ("environments", "tau", "share"),
    [(80, 0.05, 0.738), (80, 0.1, 0.434), (80, 0.2, 0.093), (80, 0.4, 4.5e-4),
     (16, 0.2, 0.454), (16, 0.4, 0.077), (16, 0.8, 5.2e-4), (16, 1.0, 3.1e-5)],
)  # fmt: skip
def test_noise_kept_probability_at_known_places(
    environments: int, tau: float, share: float
) -> None:
    assert metrics.noise_kept_probability(environments, tau) == pytest.approx(share, rel=0.02)


def test_the_null_of_very_many_environments_is_normal() -> None:
    for environments in (10_000, 1_000_001):
        for deviations in (0.5, 2.0, 5.0):
            votes = math.floor(deviations * math.sqrt(environments))
            votes -= (votes + environments) % 2
            share = metrics.noise_kept_probability(environments, votes / environments)
            normal = math.erfc((votes - 1) / math.sqrt(2 * environments))  # between two values
            assert share == pytest.approx(normal, rel=1e-2)


def test_noise_looks_like_the_null() -> None:
    grads = torch.randn(12, 200_000)
    histogram = metrics.vote_histogram(grads)
    assert (histogram.share - histogram.noise).abs().max() < 5e-3
    expected = metrics.noise_kept_probability(12, 0.5)
    assert metrics.kept_fraction(grads, 0.5).item() == pytest.approx(expected, rel=0.05)


def test_the_null_that_is_returned_may_be_changed() -> None:
    metrics.noise_votes(5).zero_()
    metrics.vote_histogram(torch.randn(5, 3)).noise.zero_()
    assert metrics.noise_kept_probability(5, 0.0) == pytest.approx(1.0)


# ---- errors ----


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        (3.0, TypeError, "grads: expected stacked gradients .* but got float"),
        ("ab", TypeError, "grads: expected stacked gradients .* but got str"),
        ([], ValueError, "grads: expected gradients of at least 1 parameter, but got none"),
        ({}, ValueError, "grads: expected gradients of at least 1 parameter, but got none"),
        ([torch.ones(2, 1), 3], TypeError, r"grads\[1\]: expected a Tensor, but got int"),
        ({"w": torch.ones(2, dtype=torch.int64)}, TypeError, r"grads\['w'\]: expected dtype"),
        ([torch.ones(2, 1), torch.ones(3, 1)], ValueError,
         r"grads\[1\]: expected 2 environments \(dim 0\), as grads\[0\] has, but got 3"),
        ({"w": torch.ones(2, 1), "b": torch.ones(())}, ValueError, r"grads\['b'\]: expected shape"),
        (torch.ones(0, 3), ValueError, "grads: expected at least 1 environment"),
        (am.Moments([torch.ones(2)]), ValueError, "grads: expected moments of at least 1"),
    ],
)  # fmt: skip
def test_what_is_not_gradients(grads: object, error: type[Exception], message: str) -> None:
    for metric in (metrics.sign_agreement, metrics.vote_histogram, metrics.tau_curve):
        with pytest.raises(error, match=message):
            metric(grads)
    with pytest.raises(error, match=message):
        metrics.kept_fraction(grads, 0.5)


def test_moments_without_votes() -> None:
    moments = am.Moments([torch.ones(2)], kinds=())
    moments.add([torch.ones(2)])
    with pytest.raises(ValueError, match="grads: expected moments with votes, but got Moments"):
        metrics.sign_agreement(moments)


def test_other_errors() -> None:
    grads = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"tau: expected a number in \[0, 1\], but got 2"):
        metrics.kept_fraction(grads, 2.0)
    with pytest.raises(TypeError, match="per_parameter: expected a bool, but got int"):
        metrics.kept_fraction(grads, 0.5, per_parameter=1)
    with pytest.raises(ValueError, match="environments: expected at least 1, but got 0"):
        metrics.noise_kept_probability(0, 0.5)
    with pytest.raises(TypeError, match="environments: expected an int, but got float"):
        metrics.noise_votes(2.0)
    with pytest.raises(ValueError, match="tau: expected"):
        metrics.noise_kept_probability(4, -0.5)
    with pytest.raises(ValueError, match="tau: expected"):
        metrics.vote_histogram(grads).kept_fraction(1.5)


# ---- the null of gradients with zeros ----


@given(stacked(np.float32), st.data())
def test_noise_of_gradients_is_the_mean_over_their_voters(
    values: np.ndarray, data: st.DataObject
) -> None:
    grads = torch.from_numpy(values)
    tau = data.draw(st.one_of(taus, tie_taus(len(grads))))
    threshold = reference.vote_threshold(tau, len(grads))
    voters = ((grads > 0).sum(0) + (grads < 0).sum(0)).tolist()
    levels = []
    for count in voters:
        kept = [p for p in range(count + 1) if abs(2 * p - count) >= threshold]
        levels.append(float(sum(Fraction(math.comb(count, p), 2**count) for p in kept)))
    result = metrics.noise_kept_fraction(grads, tau)
    assert result.dim() == 0
    assert result.item() == pytest.approx(sum(levels) / len(levels), rel=1e-9, abs=1e-15)


def test_noise_of_gradients_without_zeros_is_binomial() -> None:
    many = {"a": torch.rand(16, 3) + 1, "b": -torch.rand(16, 2, 2) - 1}
    for tau in (0.0, 0.4, 1.0):
        expected = metrics.noise_kept_probability(16, tau)
        assert metrics.noise_kept_fraction(many, tau).item() == pytest.approx(expected)


def test_noise_of_gradients_of_examples_through_a_relu() -> None:
    """What random signs keep is met by the level of the zeros, and far below the binomial one."""
    active = (torch.rand(64, 4000) < 0.4).float()
    grads = active * torch.randn(64, 4000)
    kept = metrics.kept_fraction(grads, 0.2).item()
    level = metrics.noise_kept_fraction(grads, 0.2).item()
    assert level == pytest.approx(kept, rel=0.25)
    assert level < metrics.noise_kept_probability(64, 0.2) / 4


def test_what_has_no_noise_level() -> None:
    with pytest.raises(TypeError, match="grads: expected the stacked gradients of all"):
        metrics.noise_kept_fraction(am.Moments([torch.ones(2)]), 0.5)
    with pytest.raises(TypeError, match=r"grads: .* got an int.* use noise_kept_probability"):
        metrics.noise_kept_fraction(16, 0.5)
    with pytest.raises(TypeError, match="environments: expected an int, but got float"):
        metrics.noise_kept_probability(0.4, 0.5)
    assert torch.isnan(metrics.noise_kept_fraction(torch.zeros(3, 0), 0.5))


def test_a_histogram_is_printed_in_one_line() -> None:
    histogram = metrics.vote_histogram(torch.randn(3, 7))
    assert repr(histogram) == "VoteHistogram(3 environments, 7 coordinates)"


def test_an_agreement_is_no_gradients() -> None:
    agreement = am.Agreement(torch.nn.Linear(2, 1), am.AndMask(1.0))
    with pytest.raises(TypeError, match=r"but got Agreement; its moments are in \.moments"):
        metrics.kept_fraction(agreement, 0.5)


def test_the_null_does_not_depend_on_where_it_was_first_asked_for() -> None:
    with torch.device("meta"):
        assert metrics.noise_kept_probability(37, 0.5) > 0
    assert metrics.noise_kept_probability(37, 0.5) > 0
    assert metrics.tau_curve(torch.randn(37, 5)).noise_kept_fraction.device.type == "cpu"


def test_a_list_of_vectors_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_notices, "_given", weakref.WeakKeyDictionary())
    with pytest.warns(UserWarning, match=r"one element; torch\.stack a list"):
        metrics.kept_fraction([torch.randn(5), torch.randn(5)], 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.kept_fraction({"a": torch.randn(5), "b": torch.randn(5)}, 0.5)
        metrics.kept_fraction([torch.randn(5)], 0.5)
        metrics.kept_fraction([torch.randn(5, 2), torch.randn(5)], 0.5)
