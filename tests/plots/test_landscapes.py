"""Loss landscapes, and paths on them."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.contour import QuadContourSet

import andmask_ext
from andmask_ext import plots
from andmask_ext.metrics import landscapes
from andmask_ext.plots._surfaces import lines_of, surfaces_of

from .pictures import colour_at, draw, texts

EXAMPLE = landscapes.two_minima()


def first(theta):
    return theta[0] + 3


def second(theta):
    return 4 * (theta[1] + 3)


def contours(axes):
    return [artist for artist in axes.collections if isinstance(artist, QuadContourSet)]


def lines_with(axes, **properties):
    return [
        line
        for line in axes.lines
        if all(getattr(line, f"get_{name}")() == value for name, value in properties.items())
    ]


def test_a_panel_for_each_environment_and_mean():
    panels = plots.loss_landscapes(EXAMPLE.losses, labels=["day", "night"])
    draw(panels)
    assert [axes.get_title() for axes in panels] == [
        "environment day",
        "environment night",
        "arithmetic mean (OR)",
        "geometric mean (AND)",
    ]
    for axes in panels:
        filled, drawn = contours(axes)
        assert filled.filled
        assert not drawn.filled
        assert len(drawn.levels) > 3
    (bar,) = [axes for axes in panels[0].figure.axes if axes not in panels]
    assert bar.get_ylabel() == "loss"
    assert panels[0].get_ylabel() == r"$\theta_2$"
    assert panels[0].get_xlabel() == r"$\theta_1$"


def test_means_over_the_grid():
    x, y = lines_of((-3, 3, -2, 2), 5)
    a, b, arithmetic, geometric = surfaces_of(
        [first, second], "AB", ("arithmetic", "geometric"), x, y
    )
    np.testing.assert_allclose(a[0], x + 3)
    np.testing.assert_allclose(b[:, 0], 4 * (y + 3))
    np.testing.assert_allclose(arithmetic, (a + b) / 2)
    np.testing.assert_allclose(geometric, np.sqrt(a * b))
    assert (geometric <= arithmetic + 1e-12).all()


def test_low_is_dark_and_where_it_belongs():
    across, up, *_ = plots.loss_landscapes([first, second], shared=False, resolution=41)
    assert colour_at(across, -2.8, 0).sum() < colour_at(across, 2, 0).sum() - 100
    assert colour_at(across, -2.8, -2).tolist() == colour_at(across, -2.8, 2).tolist()
    assert colour_at(up, 0, -2.8).sum() < colour_at(up, 0, 2).sum() - 100


def test_shared_levels_and_own_levels():
    panels = plots.loss_landscapes([first, second], resolution=31)
    levels = [contours(axes)[0].levels for axes in panels]
    assert all(np.array_equal(levels[0], other) for other in levels)
    assert levels[0][0] == 0
    assert np.all(np.diff(np.diff(levels[0])) > 0), "closer at low losses"
    panels = plots.loss_landscapes([first, second], resolution=31, shared=False)
    assert contours(panels[1])[0].levels[-1] > 3 * contours(panels[0])[0].levels[-1]
    assert len(panels[0].figure.axes) == 4, "no colour bar that would hold for one panel only"


@pytest.mark.parametrize("environments", [1, 3, 27])
def test_many_environments_wrap_into_rows(environments):
    panels = plots.loss_landscapes([first] * environments, resolution=5, labels=None)
    figure = panels[0].figure
    assert len(panels) == environments + 2
    assert len(figure.axes) == environments + 3
    assert panels[0].get_title() == ("environment 0" if environments > 26 else "environment A")
    assert figure.get_size_inches()[0] <= 8.3


def test_points_are_marked_in_every_panel_and_named():
    points = {"consistent": (1.0, 2.0), "other": torch.tensor([-1.0, 0.5])}
    panels = plots.loss_landscapes([first, second], points=points, resolution=15)
    figure = draw(panels)
    for axes in panels:
        assert [tuple(line.get_xydata()[0]) for line in axes.lines] == [(1, 2), (-1, 0.5)]
        assert len({line.get_marker() for line in axes.lines}) == 2
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["consistent", "other"]


def test_paths_are_drawn_as_they_are_and_differ_without_colour():
    paths = {"one": torch.rand(7, 2, 2), "two": torch.rand(9, 1, 2)}
    panels = plots.loss_landscapes([first, second], means=(), paths=paths, resolution=15)
    draw(panels)
    for axes in panels:
        long = [line for line in axes.lines if len(line.get_xdata()) > 1]
        expected = [paths["one"][:, 0], paths["one"][:, 1], paths["two"][:, 0]]
        for line, path in zip(long, expected, strict=True):
            np.testing.assert_allclose(line.get_xydata(), path)
        assert str(long[0]._unscaled_dash_pattern) == str(long[1]._unscaled_dash_pattern)
        assert str(long[0]._unscaled_dash_pattern) != str(long[2]._unscaled_dash_pattern)
        starts = lines_with(axes, marker="o", color="white")
        np.testing.assert_allclose(
            [line.get_xydata()[0] for line in starts], [path[0] for path in expected]
        )


def test_a_path_ends_where_it_stops_being_finite():
    path = torch.zeros(5, 2, 2)
    path[2:, 0] = float("inf")
    path[:, 1] = float("nan")
    (axes,) = plots.loss_landscapes([first], means=(), paths={"a": path}, resolution=15)
    draw(axes)
    assert [len(line.get_xdata()) for line in axes.lines] == [2, 1, 1]


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-300, 1e200])
def test_a_constant_loss(value):
    means = ("arithmetic",)
    draw(plots.loss_landscapes([lambda x: 0 * x.sum() + value], means=means, resolution=15))


def test_losses_that_are_not_finite_are_grey_and_told():
    def half(theta):
        return torch.where(theta[0] > 0, theta[0], float("nan"))

    panels = plots.loss_landscapes([half, lambda x: x.sum() * float("inf")], means=())
    assert colour_at(panels[0], -1.5, 0.1).tolist() == [0xBB] * 3
    assert colour_at(panels[0], 2.9, 0.1).tolist() != [0xBB] * 3
    assert texts(panels[1]) == "not finite"
    draw(plots.loss_landscapes([lambda x: x.sum() * float("nan")]))


def test_trajectories_are_those_of_descend():
    starts = torch.tensor([[2.6, -0.8], [-2.0, -1.0]]).double()
    panels = plots.trajectories(EXAMPLE.losses, starts, tau=1.0, lr=0.1, steps=50)
    figure = draw(panels)
    assert [axes.get_title() for axes in panels][-1] == "arithmetic mean (OR)"
    expected = [
        path
        for rule in (andmask_ext.AndMask(1.0), andmask_ext.rules.Mean())
        for path in plots.descend(EXAMPLE.losses, starts, rule, 0.1, 50).unbind(1)
    ]
    for axes in panels:
        long = [line for line in axes.lines if len(line.get_xdata()) > 1]
        for line, path in zip(long, expected, strict=True):
            np.testing.assert_allclose(line.get_xydata(), path)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["AND-mask, τ = 1", "mean gradient"]


def test_ends_in_the_same_place_are_both_seen():
    (axes,) = plots.loss_landscapes(
        [first], means=(), paths={"a": torch.zeros(3, 1, 2), "b": torch.zeros(3, 1, 2)}
    )
    ends = [
        line for line in axes.lines if len(line.get_xdata()) == 1 and line.get_color() != "white"
    ]
    assert [line.get_marker() for line in ends] == ["o", "s"]
    assert ends[0].get_markersize() > ends[1].get_markersize() + 2


def test_given_axes_are_used_and_their_figure_gets_the_bar():
    figure, grid = plt.subplots(1, 3)
    panels = plots.trajectories(EXAMPLE.losses, torch.zeros(1, 2), steps=2, ax=grid)
    assert panels == list(grid)
    assert plt.get_fignums() == [figure.number]
    assert len(figure.axes) == 4
    assert grid[-1].get_legend() is not None
    draw(panels)


def test_axes_of_two_figures_have_no_common_bar():
    axes = [plt.figure().add_subplot() for _ in range(2)]
    panels = plots.loss_landscapes([first, second], means=(), ax=axes, resolution=15)
    assert [len(one.figure.axes) for one in panels] == [1, 1]


def test_landscape_errors():
    losses = [first, second]
    with pytest.raises(ValueError, match=r"geometric mean, but that of environment B falls to -4"):
        plots.loss_landscapes([first, lambda x: x[0] - 1])
    with pytest.raises(ValueError, match="bounds: expected lowest before highest"):
        plots.loss_landscapes(losses, (1, 1, 0, 1))
    with pytest.raises(ValueError, match="bounds: expected 4 finite numbers"):
        plots.loss_landscapes(losses, (0, 1, 0, float("nan")))
    with pytest.raises(ValueError, match='means: expected a sequence of "arithmetic"'):
        plots.loss_landscapes(losses, means=("harmonic",))
    with pytest.raises(ValueError, match="means: expected a sequence"):
        plots.loss_landscapes(losses, means="arithmetic")
    with pytest.raises(ValueError, match="resolution: expected at least 2, but got 1"):
        plots.loss_landscapes(losses, resolution=1)
    with pytest.raises(ValueError, match="labels: expected 2, one for each environment"):
        plots.loss_landscapes(losses, labels="AB")
    with pytest.raises(ValueError, match="ax: expected 4 axes, one for each panel, but got 1"):
        plots.loss_landscapes(losses, ax=plt.figure().add_subplot())
    with pytest.raises(ValueError, match="points: expected 2 numbers for 'a'"):
        plots.loss_landscapes(losses, points={"a": (1.0, 2.0, 3.0)})
    with pytest.raises(ValueError, match=r"paths: expected shape \[steps \+ 1, n, 2\] for 'a'"):
        plots.loss_landscapes(losses, paths={"a": torch.zeros(3, 1, 3)})
    with pytest.raises(ValueError, match=r"tau: expected a number in \[0, 1\]"):
        plots.trajectories(losses, torch.zeros(1, 2), tau=2.0)
