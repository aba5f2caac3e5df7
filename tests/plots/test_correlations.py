"""Cosines of gradients, and correlations with signals."""

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from andmask_ext import plots

from .pictures import Correlations, colour_at, draw


def cosines(environments):
    gradients = torch.nn.functional.normalize(torch.randn(environments, 20), dim=1)
    return gradients @ gradients.T


@pytest.mark.parametrize("environments", [1, 2, 12])
def test_values_are_written_into_the_cells(environments):
    matrix = cosines(environments)
    axes = plots.gradient_cosines(matrix)
    draw(axes)
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert len(written) == environments**2
    for (column, row), text in written.items():
        assert text.replace("\N{MINUS SIGN}", "-") == f"{matrix[row, column]:.2f}"


@pytest.mark.parametrize("environments", [13, 64, 1024])
def test_many_environments_are_not_written(environments):
    axes = plots.gradient_cosines(cosines(environments))
    draw(axes)
    assert not axes.texts
    assert len(axes.get_xticks()) <= 24


def test_written_values_fit_into_their_cells():
    axes = plots.gradient_cosines(-torch.ones(12, 12))
    draw(axes)
    cell = axes.transData.transform((1, 0))[0] - axes.transData.transform((0, 0))[0]
    assert max(text.get_window_extent().width for text in axes.texts) < cell


def test_colours_are_those_of_the_sign_and_zero_is_white():
    matrix = torch.tensor([[1.0, -0.8, 0.0], [-0.8, 1.0, float("nan")], [0.0, 0.3, 1.0]])
    axes = plots.gradient_cosines(matrix, ["A", "B", "C"])
    assert axes.images[0].get_clim() == (-1, 1)
    corner = 0.42  # of a cell, where nothing is written
    red, _, blue = colour_at(axes, 1 + corner, 0 + corner)
    assert red > blue + 50
    red, _, blue = colour_at(axes, 0 + corner, 0 + corner)
    assert blue > red + 50
    assert colour_at(axes, 2 + corner, 0 + corner).min() > 250
    assert colour_at(axes, 2 + corner, 1 + corner).tolist() == [0xBB] * 3
    assert colour_at(axes, 1 + corner, 2 + corner)[2] > colour_at(axes, 1 + corner, 2 + corner)[0]


def test_conflict_and_agreement_differ_without_colour():
    axes = plots.gradient_cosines(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    weights = np.array([0.299, 0.587, 0.114])
    conflict, agreement = (colour_at(axes, x, 0.4) @ weights for x in (1.4, 0.4))
    assert conflict - agreement > 40


def test_cosine_labels():
    axes = plots.gradient_cosines(cosines(3), ["photo", "art painting", "sketch"])
    draw(axes)
    assert [label.get_text() for label in axes.get_yticklabels()][1] == "art painting"
    assert axes.get_xticklabels()[0].get_rotation() == 45
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert not any(a.overlaps(b) for a, b in pairwise(boxes))


def test_cosine_errors():
    with pytest.raises(ValueError, match=r"matrix: expected shape \[d, d\].* got \[2, 3\]"):
        plots.gradient_cosines(torch.ones(2, 3))
    with pytest.raises(ValueError, match="matrix: expected shape"):
        plots.gradient_cosines(torch.ones(0, 0))
    with pytest.raises(ValueError, match="matrix: expected a tensor with 2 dimensions"):
        plots.gradient_cosines(torch.ones(2))
    with pytest.raises(ValueError, match="labels: expected 2, one for each environment"):
        plots.gradient_cosines(torch.eye(2), ["A"])
    with pytest.raises(TypeError, match="matrix: expected a Tensor, but got list"):
        plots.gradient_cosines([[1.0]])
    assert not plt.get_fignums()


def lines_of(axes):
    return [line for line in axes.lines if not line.get_label().startswith("_")]


def test_a_line_for_each_signal_that_differs_without_colour():
    tau = torch.linspace(0, 1, 5)
    signals = {name: torch.rand(5) for name in ("mechanism", "shortcut", "both", "a", "b", "c")}
    axes = plots.gradient_correlation(Correlations(tau, signals))
    draw(axes)
    lines = lines_of(axes)
    assert [line.get_label() for line in lines] == list(signals)
    for line, values in zip(lines, signals.values(), strict=True):
        np.testing.assert_allclose(line.get_xdata(), tau)
        np.testing.assert_allclose(line.get_ydata(), values, rtol=1e-6)
    assert len({line.get_marker() for line in lines}) == 6
    assert len({str(line._unscaled_dash_pattern) for line in lines}) == 6
    assert len({line.get_color() for line in lines}) == 6
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(signals)


def test_where_nothing_is_kept_there_is_a_gap():
    values = torch.tensor([0.5, 0.7, float("nan")])
    axes = plots.gradient_correlation(Correlations(torch.tensor([0, 0.5, 1]), {"a": values}))
    draw(axes)
    assert np.isnan(lines_of(axes)[0].get_ydata()).tolist() == [False, False, True]
    nothing = Correlations(torch.tensor([0, 0.5, 1]), {"a": values * float("nan")})
    draw(plots.gradient_correlation(nothing))


@pytest.mark.parametrize("lowest", [-1.0, 0.0])
def test_all_correlations_are_inside_the_axes(lowest):
    values = torch.tensor([1.0, lowest])
    axes = plots.gradient_correlation(Correlations(torch.tensor([0.0, 1.0]), {"a": values}))
    assert axes.get_ylim()[0] < lowest
    assert axes.get_ylim()[1] > 1


def test_one_threshold_is_a_marker():
    axes = plots.gradient_correlation(Correlations(torch.tensor([1.0]), {"a": torch.ones(1)}))
    red, _, blue = colour_at(axes, 1, 1)
    assert blue > red + 100, "a line of one point would not be seen"


def test_correlation_errors():
    tau = torch.tensor([0.0, 1.0])
    with pytest.raises(ValueError, match="expected at least one signal"):
        plots.gradient_correlation(Correlations(tau, {}))
    with pytest.raises(ValueError, match="expected 2 of 'a', one for each tau, but got 3"):
        plots.gradient_correlation(Correlations(tau, {"a": torch.ones(3)}))
    with pytest.raises(TypeError, match="a: expected a Tensor, but got list"):
        plots.gradient_correlation(Correlations(tau, {"a": [1, 2]}))
