"""The heat map of kept coordinates."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.colors import LogNorm

from andmask_ext import plots

from .pictures import Monitor, colour_at, draw


def mesh_of(axes):
    (mesh,) = axes.collections
    return mesh


def labels_of(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(("records", "parameters"), [(1, 1), (1, 7), (5, 1), (30, 12), (4, 200)])
def test_a_row_for_each_parameter_from_top_to_bottom(records, parameters, relative):
    monitor = Monitor.of(records, parameters)
    axes = plots.kept_fraction(monitor, relative=relative)
    draw(axes)
    shown = np.asarray(mesh_of(axes).get_array())
    expected = monitor.values["kept_fraction"].T / (0.25 if relative else 1)
    np.testing.assert_allclose(shown, expected, rtol=1e-6)
    heights = [axes.transData.transform((0, row))[1] for row in range(parameters)]
    assert heights == sorted(heights, reverse=True)
    for place, label in zip(axes.get_yticks(), labels_of(axes), strict=True):
        assert label == f"layer{round(place)}.weight"


def test_what_a_reader_sees_is_where_the_value_is():
    kept = torch.tensor([[0.9, 0.0], [0.0, 0.9]])
    axes = plots.kept_fraction(Monitor.of(2, 2, kept))
    first, second = axes.transData.transform((0, 0)), axes.transData.transform((10, 1))
    assert first[0] < second[0]
    assert first[1] > second[1], "the first parameter is on top"
    for step, row, value in ((0, 0, 0.9), (0, 1, 0.0), (10, 0, 0.0), (10, 1, 0.9)):
        bright = colour_at(axes, step, row).sum() > 300
        assert bright == (value > 0.5), (step, row)


def test_cells_reach_half_way_to_the_next_step():
    monitor = Monitor.of(3, 2)
    monitor.steps = [0, 10, 100]
    corners = mesh_of(plots.kept_fraction(monitor)).get_coordinates()[0, :, 0]
    np.testing.assert_allclose(corners, [-5, 5, 55, 145])


def test_names_of_many_parameters_do_not_run_into_each_other():
    axes = plots.kept_fraction(Monitor.of(3, 200))
    figure = draw(axes)
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert 20 <= len(boxes) <= 40
    assert all(below.y1 <= above.y0 for above, below in pairwise(boxes))
    assert min(label.get_fontsize() for label in axes.get_yticklabels()) >= 8
    assert figure.get_size_inches()[1] < 9


def test_long_names_keep_both_ends():
    monitor = Monitor.of(2, 2)
    monitor.names = ["encoder.layers.11.self_attention.projection.weight", "bias"]
    long, short = labels_of(plots.kept_fraction(monitor))
    assert len(long) == 30
    assert long.startswith("encoder.")
    assert long.endswith("projection.weight")
    assert short == "bias"


def test_colours_go_from_zero_to_the_largest_share():
    axes = plots.kept_fraction(Monitor.of(2, 2, torch.tensor([[0.1, 0.2], [0.3, 0.05]])))
    assert mesh_of(axes).get_clim() == (0, pytest.approx(0.3))
    axes = plots.kept_fraction(Monitor.of(2, 2, torch.zeros(2, 2)))
    assert mesh_of(axes).get_clim() == (0, 1)
    axes = plots.kept_fraction(Monitor.of(2, 2), limits=(0, 0.5))
    assert mesh_of(axes).get_clim() == (0, 0.5)


def test_the_colour_bar_has_a_label():
    for relative, word in ((False, "share of coordinates kept"), (True, "multiple of noise")):
        axes = plots.kept_fraction(Monitor.of(2, 2), relative=relative)
        (bar,) = [other for other in axes.figure.axes if other is not axes]
        assert word in bar.get_ylabel()


def test_relative_colours_are_white_at_noise_and_even_about_it():
    kept = torch.tensor([[1.0, 0.25], [0.0, float("nan")]])
    axes = plots.kept_fraction(Monitor.of(2, 2, kept), relative=True)
    mesh = mesh_of(axes)
    assert isinstance(mesh.norm, LogNorm)
    assert mesh.get_clim() == (pytest.approx(0.25), pytest.approx(4))
    assert colour_at(axes, 0, 1).min() > 250, "noise is white"
    red, _, blue = colour_at(axes, 0, 0)
    assert blue > red, "more than noise is blue"
    red, _, blue = colour_at(axes, 10, 0)
    assert red > blue, "nothing kept is at the vermilion end"
    assert axes.patch.get_hatch(), "not a number is hatched"
    assert axes.patch.get_facecolor()[:3] == (1, 1, 1)


def test_relative_to_no_noise_at_all():
    monitor = Monitor.of(2, 2, torch.tensor([[0.5, 0.0], [0.5, 0.0]]))
    monitor.values["noise_kept_fraction"].zero_()
    axes = plots.kept_fraction(monitor, relative=True)
    draw(axes)
    assert np.ma.getmaskarray(mesh_of(axes).get_array()).T.tolist() == [[False, True]] * 2


KEPT = torch.tensor([[0.8, 0.0], [0.4, 0.2]])  # nothing of the second parameter at first


def bar_of(axes):
    (bar,) = [other for other in axes.figure.axes if other is not axes]
    return bar


def test_thresholds_go_to_one_and_what_is_masked_whole_lies_beyond():
    axes = plots.kept_fraction(Monitor.of(2, 2, KEPT), "threshold")
    mesh = mesh_of(axes)
    shown = np.asarray(mesh.get_array())
    np.testing.assert_allclose(shown[0], [0.6, 0.8], rtol=1e-6)
    assert shown[1, 0] > 1
    assert shown[1, 1] == pytest.approx(0.9)
    assert mesh.get_clim() == (0, 1)
    red, green, blue = colour_at(axes, 0, 1)
    assert red > 180 > green > blue, "vermilion"
    assert "masked whole" in bar_of(axes).get_ylabel()
    axes = plots.kept_fraction(Monitor.of(2, 2, KEPT + 0.1), "threshold")
    assert bar_of(axes).get_ylabel() == "threshold t / d"


def test_a_high_threshold_does_not_look_masked_whole_if_limits_are_lower():
    axes = plots.kept_fraction(Monitor.of(2, 2, KEPT), "threshold", limits=(0, 0.5))
    assert mesh_of(axes).get_clim() == (0, 0.5)
    yellow, vermilion = colour_at(axes, 10, 1), colour_at(axes, 0, 1)
    assert yellow[1] > 200 > vermilion[1]


def test_the_share_of_noise_is_hatched_where_nothing_is_kept():
    axes = plots.kept_fraction(Monitor.of(2, 2, KEPT), "noise_share")
    mesh = mesh_of(axes)
    np.testing.assert_allclose(mesh.get_array()[0], [0.2, 0.1], rtol=1e-6)
    assert np.ma.getmaskarray(mesh.get_array()).tolist() == [[False, False], [True, False]]
    assert mesh.get_clim() == (0, pytest.approx(0.2))
    assert "noise" in bar_of(axes).get_ylabel()


def test_monitor_errors():
    with pytest.raises(ValueError, match=r"metric: expected one of kept_fraction, .* got 'norm'"):
        plots.kept_fraction(Monitor.of(2, 2), "norm")
    with pytest.raises(ValueError, match="relative: expected False for threshold"):
        plots.kept_fraction(Monitor.of(2, 2), "threshold", relative=True)
    with pytest.raises(ValueError, match="expected records of parameters, but got 0 records"):
        plots.kept_fraction(Monitor.of(0, 2))
    with pytest.raises(ValueError, match="but got 3 records of 0 parameters"):
        plots.kept_fraction(Monitor.of(3, 0))
    with pytest.raises(ValueError, match="limits: expected two rising numbers, but got 1 and 1"):
        plots.kept_fraction(Monitor.of(2, 2), limits=(1, 1))
    with pytest.raises(ValueError, match="limits: expected two positive rising numbers"):
        plots.kept_fraction(Monitor.of(2, 2), relative=True, limits=(0, 1))
    monitor = Monitor.of(3, 2)
    monitor.steps = [0, 1]
    with pytest.raises(ValueError, match=r"kept_fraction: expected shape .* = \[2, 2\], but got"):
        plots.kept_fraction(monitor)
