"""The histogram of votes, and the curve over tau."""

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.patches import StepPatch

from andmask_ext import plots, reference
from andmask_ext.rules._threshold import vote_threshold

from .pictures import Curve, Histogram, draw, noise_votes, texts


def heights(axes):
    return np.array([bar.get_height() for bar in axes.containers[0]])


def spans(axes):
    return [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.containers[0]]


def outline(axes):
    (patch,) = [patch for patch in axes.patches if isinstance(patch, StepPatch)]
    return patch.get_data()


@pytest.mark.parametrize("zeros", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("environments", [1, 2, 3, 16, 81, 1024])
def test_bars_and_noise_are_shares_of_all_coordinates(environments, zeros):
    axes = plots.vote_histogram(Histogram.of_noise(environments, 500, zeros))
    draw(axes)
    assert heights(axes).sum() == pytest.approx(1)
    assert outline(axes).values.sum() == pytest.approx(1)
    assert len(outline(axes).values) == len(heights(axes)) <= 64


@settings(max_examples=25)
@given(st.data())
def test_no_coordinate_is_lost_whatever_the_counts(data):
    environments = data.draw(st.integers(1, 300))
    places = st.lists(st.integers(0, environments), min_size=1, max_size=20)
    counts = torch.bincount(torch.tensor(data.draw(places)), minlength=environments + 1)
    axes = plots.vote_histogram(Histogram(environments, counts))
    assert heights(axes).sum() == pytest.approx(1)
    assert outline(axes).values.sum() == pytest.approx(1)
    assert np.all(np.diff(outline(axes).edges) > 0)
    plt.close(axes.figure)


@pytest.mark.parametrize("environments", [1, 2, 5, 16, 80])
def test_a_bar_for_every_number_of_votes_that_signs_can_have_and_none_between(environments):
    histogram = Histogram.of_noise(environments)
    axes = plots.vote_histogram(histogram)
    parity = environments % 2
    np.testing.assert_allclose(heights(axes), histogram.counts[parity::2] / 2000)
    np.testing.assert_allclose(outline(axes).values, noise_votes(environments)[parity::2])
    middles = [(left + right) / 2 for left, right in spans(axes)]
    np.testing.assert_allclose(middles, np.arange(parity, environments + 1, 2) / environments)


@pytest.mark.parametrize("zeros", [0.0, 0.5])
@pytest.mark.parametrize("environments", [1, 2, 3, 5, 8])
def test_few_bars_have_a_tick_each_with_their_agreement(environments, zeros):
    axes = plots.vote_histogram(Histogram.of_noise(environments, 500, zeros))
    middles = [sum(span) / 2 for span in spans(axes)]
    np.testing.assert_allclose(axes.get_xticks(), middles)
    possible = [k / environments for k in range(environments % 2, environments + 1, 2)]
    if zeros and environments % 2:
        possible = [0.0, *possible]
    assert [text.get_text() for text in axes.get_xticklabels()] == [f"{k:.2g}" for k in possible]


def test_a_zero_gradient_does_not_make_a_coordinate_more_unanimous():
    counts = torch.tensor([0, 0, 0, 3, 1])  # 3 votes of 4: one environment says nothing
    np.testing.assert_allclose(heights(plots.vote_histogram(Histogram(4, counts))), [0, 0.75, 0.25])


def test_no_votes_at_all_of_an_odd_number_of_environments_have_a_bar():
    axes = plots.vote_histogram(Histogram(3, torch.tensor([6, 0, 0, 4])))
    np.testing.assert_allclose(heights(axes), [0.6, 0, 0.4])
    np.testing.assert_allclose(outline(axes).values, [0, 0.75, 0.25])


def test_many_environments_share_bars_without_gaps():
    axes = plots.vote_histogram(Histogram.of_noise(1024, 300))
    spans_ = spans(axes)
    assert 16 <= len(spans_) <= 64
    assert all(left[1] == pytest.approx(right[0]) for left, right in pairwise(spans_))
    assert spans_[-1][1] == pytest.approx(1 + 1 / 1024)
    falling = np.diff(outline(axes).values)
    assert (falling <= 0).all(), "noise falls from bar to bar: none is of another width"


@pytest.mark.parametrize("environments", [1, 2, 5, 16, 80])
@pytest.mark.parametrize("tau", [0.0, 0.4, 0.8, 1.0])
def test_the_threshold_stands_left_of_what_it_keeps_and_says_how_much(environments, tau):
    histogram = Histogram.of_noise(environments)
    axes = plots.vote_histogram(histogram, tau=tau)
    least = vote_threshold(tau, environments)
    (line,) = [line for line in axes.lines if line.get_label() == "_threshold"]
    place = line.get_xdata()[0]
    right = sum(
        height for height, span in zip(heights(axes), spans(axes), strict=True) if span[0] > place
    )
    kept = histogram.counts[least:].sum() / 2000
    assert right == pytest.approx(float(kept))
    assert not any(left < place < right for left, right in spans(axes))
    assert f"τ = {tau:g} keeps" in texts(axes)
    if kept > 0.1 and kept < 0.999:
        assert f"keeps {100 * kept:.1f} %" in texts(axes)


@settings(max_examples=40)
@given(st.data())
def test_the_threshold_of_a_level_is_that_of_the_reference(data):
    environments = data.draw(st.integers(1, 24))
    votes = data.draw(st.lists(st.integers(0, environments), min_size=1, max_size=30))
    level = data.draw(st.sampled_from([0.05, 0.25, 0.005, 2.0**-7, 0.9]))
    test = {data.draw(st.sampled_from(["fdr", "significance"])): level}
    grads = torch.zeros(environments, len(votes))
    for column, number in enumerate(votes):
        grads[:number, column] = 1
    least = int(reference.vote_thresholds(grads, **test)[0])
    counts = torch.bincount(torch.tensor(votes), minlength=environments + 1)
    axes = plots.vote_histogram(Histogram(environments, counts), **test)
    assert f"= {level:g}: t = {least} keeps" in texts(axes)
    (line,) = [line for line in axes.lines if line.get_label() == "_threshold"]
    assert axes.get_xlim()[0] < line.get_xdata()[0] < axes.get_xlim()[1]
    plt.close(axes.figure)


def test_the_kept_share_counts_zeros_exactly_and_names_that_of_noise():
    histogram = Histogram(4, torch.tensor([0, 0, 600, 200, 200]))
    shown = texts(plots.vote_histogram(histogram, tau=0.75))
    assert shown == "τ = 0.75 keeps 40.0 %\n(of noise 12.5 %)"
    shown = texts(plots.vote_histogram(Histogram.of_noise(80), tau=1.0))
    assert shown == "τ = 1 keeps 0 %\n(of noise < 0.001 %)"


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("environments", [1, 2, 16, 1024])
def test_no_coordinates(environments, log):
    empty = torch.zeros(environments + 1, dtype=torch.int64)
    axes = plots.vote_histogram(Histogram(environments, empty), tau=0.5, log=log)
    draw(axes)
    assert heights(axes).sum() == 0
    assert "no coordinates" in axes.get_legend().get_texts()[1].get_text()


@pytest.mark.parametrize("environments", [2, 16, 1024])
def test_a_single_coordinate_is_seen_on_the_logarithmic_axis(environments):
    counts = Histogram.of_noise(environments, 5000).counts
    counts[-1] += 1
    axes = plots.vote_histogram(Histogram(environments, counts), log=True)
    draw(axes)
    assert axes.get_yscale() == "log"
    assert axes.get_ylim()[0] < 1 / 5001 < axes.get_ylim()[1]


def test_histogram_errors():
    histogram = Histogram.of_noise(4)
    with pytest.raises(ValueError, match=r"tau: expected a number in \[0, 1\], but got 1.5"):
        plots.vote_histogram(histogram, tau=1.5)
    with pytest.raises(ValueError, match=r"expected exactly one of tau .* got tau=0.5, fdr=0.1"):
        plots.vote_histogram(histogram, 0.5, fdr=0.1)
    with pytest.raises(ValueError, match=r"fdr: expected a Python number in \(0, 1\), but got 1"):
        plots.vote_histogram(histogram, fdr=1)
    with pytest.raises(TypeError, match="ax: expected matplotlib Axes, but got str"):
        plots.vote_histogram(histogram, ax="left")
    with pytest.raises(TypeError, match="log: expected a bool"):
        plots.vote_histogram(histogram, log="y")
    histogram.counts = histogram.counts[:-1]
    with pytest.raises(ValueError, match=r"environments \+ 1 = 5 counts .* but got 4 and 5"):
        plots.vote_histogram(histogram)
    histogram.counts = [1, 2]
    with pytest.raises(TypeError, match="counts: expected a Tensor, but got list"):
        plots.vote_histogram(histogram)
    assert not plt.get_fignums(), "a figure was opened before arguments were checked"


def read_off(line, tau):
    """Return what a reader reads off a drawn step at ``tau``."""
    assert line.get_drawstyle() == "steps-pre"
    return line.get_ydata()[np.searchsorted(line.get_xdata(), tau - 1e-9)]


@pytest.mark.parametrize("environments", [1, 2, 7, 16])
def test_the_steps_are_those_of_the_mask(environments):
    histogram = Histogram.of_noise(environments)
    curve = Curve.of(histogram)
    shares, norms = plots.tau_curve(curve), plots.masked_norm(curve)
    taus = np.linspace(0, 1, 101).tolist() + [k / environments for k in range(environments + 1)]
    for tau in taus:
        least = vote_threshold(tau, environments)
        kept = float(histogram.counts[least:].sum() / 2000)
        assert read_off(shares.lines[0], tau) == pytest.approx(kept)
        assert read_off(shares.lines[1], tau) == pytest.approx(float(histogram.noise[least:].sum()))
        assert read_off(norms.lines[0], tau) == pytest.approx(3 * kept**0.5)


def test_dots_are_where_steps_end():
    shares = plots.tau_curve(Curve.of(Histogram.of_noise(4)))
    line = shares.lines[1]
    assert line.get_xdata()[line.get_markevery()].tolist() == [0, 0.5, 1]


def test_norms_that_are_not_finite_are_left_out_and_told():
    curve = Curve.of(Histogram.of_noise(8))
    curve.norm[:3] = torch.tensor([float("inf"), float("nan"), 1e300]).double()
    curve.norm[2] = 1e300
    norms = plots.masked_norm(curve)
    draw(norms)
    assert "not finite at 2 of 9 thresholds" in texts(norms)
    assert norms.get_ylim()[1] > 1e300
    curve.norm[:] = float("inf")
    norms = plots.masked_norm(curve)
    draw(norms)
    assert "not finite at 9 of 9 thresholds" in texts(norms)
    assert norms.get_ylim() == (0, 1)


@pytest.mark.parametrize("environments", [1, 1024])
def test_a_logarithmic_curve_shows_all_that_is_kept(environments):
    counts = torch.zeros(environments + 1, dtype=torch.int64)
    counts[0], counts[-1] = 999, 1
    shares = plots.tau_curve(Curve.of(Histogram(environments, counts)), log=True)
    draw(shares)
    assert shares.get_yscale() == "log"
    assert shares.get_ylim()[0] < 1e-3
    nothing = Curve.of(Histogram(environments, torch.zeros_like(counts)))
    draw(plots.tau_curve(nothing, log=True))


def test_curve_errors():
    curve = Curve.of(Histogram.of_noise(4))
    with pytest.raises(TypeError, match="ax: expected matplotlib Axes, but got list"):
        plots.tau_curve(curve, ax=[plt.subplots()[1]])
    curve.norm, curve.kept_fraction = curve.norm[1:], curve.kept_fraction[2:]
    with pytest.raises(ValueError, match="tau, norm of one length, but got 5, 4"):
        plots.masked_norm(curve)
    with pytest.raises(ValueError, match="of one length, but got 5, 3, 5"):
        plots.tau_curve(curve)
