"""Level sets of quadratic losses."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from andmask_ext import metrics, plots

from .pictures import draw


def positive_definite(count, condition=1.0):
    factors = torch.randn(count, 2, 2).double()
    return factors @ factors.mT + torch.eye(2) / condition


def outline(axes, label):
    artists = [*axes.lines, *axes.patches]
    (artist,) = [artist for artist in artists if artist.get_label() == label]
    points = artist.get_xydata() if artist in axes.lines else artist.get_xy()
    return torch.from_numpy(np.array(points))


def hessian_of(points, epsilon):
    """Return the matrix whose level set goes through the points, by least squares."""
    x, y = points.unbind(1)
    columns = torch.stack((x * x / 2, x * y, y * y / 2), 1)
    xx, xy, yy = torch.linalg.lstsq(columns, torch.full_like(x, epsilon)[:, None]).solution[:, 0]
    fitted = torch.stack((torch.stack((xx, xy)), torch.stack((xy, yy))))
    torch.testing.assert_close((points @ fitted * points).sum(1) / 2, torch.full_like(x, epsilon))
    return fitted


@pytest.mark.parametrize("epsilon", [1e-6, 1.0, 30.0])
def test_outlines_are_where_losses_are_epsilon(epsilon):
    hessians = positive_definite(2)
    axes = plots.ellipses(hessians, epsilon, labels=["day", "night"])
    draw(axes)
    assert axes.get_aspect() == 1
    for name, hessian in zip(("day", "night"), hessians, strict=True):
        torch.testing.assert_close(
            hessian_of(outline(axes, f"environment {name}"), epsilon), hessian
        )
    torch.testing.assert_close(
        hessian_of(outline(axes, "arithmetic mean (OR)"), epsilon), hessians.mean(0)
    )


def test_the_geometric_mean_of_matrices_that_do_not_commute():
    first, second = positive_definite(2)
    axes = plots.ellipses(torch.stack((first, second)))
    mean = hessian_of(outline(axes, "geometric mean (AND)"), 1.0)
    # The one positive definite matrix that leads from one to the other.
    torch.testing.assert_close(mean @ torch.linalg.inv(first) @ mean, second)


def test_the_geometric_mean_of_diagonals_is_that_of_each_entry():
    axes = plots.ellipses(torch.diag_embed(torch.tensor([[9.0, 1.0], [4.0, 25.0]])))
    mean = hessian_of(outline(axes, "geometric mean (AND)"), 1.0)
    torch.testing.assert_close(mean, torch.tensor([[6.0, 0.0], [0.0, 5.0]]).double())
    assert axes.get_title().endswith(f"= {6.5 * 13 / 30:.3g}")


def test_the_area_of_the_geometric_mean_is_the_larger_one():
    axes = plots.ellipses(positive_definite(2, condition=100))
    labels = ("arithmetic mean (OR)", "geometric mean (AND)")
    small, large = (hessian_of(outline(axes, label), 1.0).det() for label in labels)
    assert small > large
    order = [patch.get_label() for patch in axes.patches]
    assert order == ["geometric mean (AND)", "arithmetic mean (OR)"], "the smaller lies on top"


def test_one_environment_is_its_own_mean():
    axes = plots.ellipses(positive_definite(1))
    draw(axes)
    assert axes.get_title().endswith("= 1")
    labels = ("geometric mean (AND)", "arithmetic mean (OR)", "environment A")
    geometric, arithmetic, own = (hessian_of(outline(axes, label), 1.0) for label in labels)
    torch.testing.assert_close(geometric, own)
    torch.testing.assert_close(arithmetic, own)


@pytest.mark.parametrize("ratio", [1e3, 1e12])
def test_extreme_ratios_are_written_short(ratio):
    axes = plots.ellipses(torch.diag_embed(torch.tensor([[ratio, 1.0], [1.0, ratio]]).double()))
    draw(axes)
    assert axes.get_title().endswith("= 251" if ratio == 1e3 else "= 10^11.4")


def test_means_come_from_metrics_and_many_environments_share_a_label(monkeypatch):
    def hessian_means(hessians):
        return SimpleNamespace(arithmetic=hessians.mean(0), geometric=2 * torch.eye(2).double())

    monkeypatch.setattr(metrics, "hessian_means", hessian_means, raising=False)
    axes = plots.ellipses(positive_definite(30))
    draw(axes)
    mean = hessian_of(outline(axes, "geometric mean (AND)"), 1.0)
    torch.testing.assert_close(mean, 2 * torch.eye(2).double())
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["geometric mean (AND)", "arithmetic mean (OR)", "30 environments"]


def test_outlines_differ_without_colour():
    axes = plots.ellipses(positive_definite(2))
    lines = [line for line in axes.lines if line.get_label().startswith("environment")]
    assert len({str(line._unscaled_dash_pattern) for line in lines}) == 2
    assert [bool(patch.get_hatch()) for patch in axes.patches] == [False, True]


def test_ellipse_errors():
    flat = torch.stack((torch.eye(2), torch.diag(torch.tensor([1.0, 0.0]))))
    with pytest.raises(ValueError, match="but that of environment 1 has eigenvalue 0"):
        plots.ellipses(flat)
    with pytest.raises(ValueError, match="hessians: expected finite symmetric matrices"):
        plots.ellipses(torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]))
    with pytest.raises(ValueError, match="hessians: expected finite symmetric matrices"):
        plots.ellipses(torch.full((1, 2, 2), float("nan")))
    with pytest.raises(ValueError, match=r"hessians: expected shape \[d >= 1, 2, 2\]"):
        plots.ellipses(torch.eye(3)[None])
    with pytest.raises(TypeError, match="hessians: expected a Tensor, but got list"):
        plots.ellipses([[1.0]])
    with pytest.raises(ValueError, match="epsilon: expected a positive finite number, but got 0"):
        plots.ellipses(torch.eye(2)[None], 0)
    with pytest.raises(ValueError, match="labels: expected 1"):
        plots.ellipses(torch.eye(2)[None], labels=["A", "B"])
