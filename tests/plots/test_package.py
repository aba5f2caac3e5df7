"""What holds for every figure, and for the package as an optional one."""

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

from andmask_ext import plots

from .pictures import ByInput, Correlations, Curve, Histogram, Monitor, draw

FIGURES = {
    "vote_histogram": lambda **o: plots.vote_histogram(Histogram.of_noise(16), 0.8, **o),
    "vote_histogram of one": lambda **o: plots.vote_histogram(Histogram.of_noise(1), 1.0, **o),
    "kept_fraction": lambda **o: plots.kept_fraction(Monitor.of(20, 12), **o),
    "kept_fraction, many": lambda **o: plots.kept_fraction(Monitor.of(20, 200), **o),
    "kept_fraction, one": lambda **o: plots.kept_fraction(Monitor.of(1, 1), relative=True, **o),
    "kept_fraction, threshold": lambda **o: plots.kept_fraction(
        Monitor.of(20, 3, torch.rand(20, 3).sub(0.3).relu()), "threshold", **o
    ),
    "kept_fraction, noise": lambda **o: plots.kept_fraction(Monitor.of(20, 3), "noise_share", **o),
    "vote_histogram, fdr": lambda **o: plots.vote_histogram(
        Histogram.of_noise(1024), fdr=1e-9, **o
    ),
    "tau_curve": lambda **o: plots.tau_curve(Curve.of(Histogram.of_noise(16)), **o),
    "masked_norm": lambda **o: plots.masked_norm(Curve.of(Histogram.of_noise(16)), **o),
    "gradient_cosines": lambda **o: plots.gradient_cosines(
        torch.eye(4), ["photo", "art painting", "cartoon", "sketch"], **o
    ),
    "gradient_correlation": lambda **o: plots.gradient_correlation(
        Correlations(torch.linspace(0, 1, 9), {"mechanism": torch.linspace(0.4, 1, 9)}), **o
    ),
    "input_agreement, features": lambda **o: plots.input_agreement(ByInput.of(12), **o),
    "input_agreement, pixels": lambda **o: plots.input_agreement(ByInput.of(3, 8, 8), **o),
    "input_agreement, own": lambda **o: plots.input_agreement(ByInput.of(8, 10), own=True, **o),
    "input_agreement, tokens": lambda **o: plots.input_agreement(
        ByInput.of(500, kind="tokens"), names=[f"token{number}" for number in range(500)], **o
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_new_figure_fits_a_readme_and_cuts_nothing_off(name):
    result = FIGURES[name]()
    assert len(plt.get_fignums()) == 1
    figure = draw(result)
    width, height = figure.get_size_inches()
    assert 3 < width <= 8.3
    assert 1.5 < height < 9
    box = figure.get_tightbbox()
    assert box.x0 > -0.01
    assert box.y0 > -0.01
    assert box.x1 < width + 0.01
    assert box.y1 < height + 0.01
    sizes = [
        text.get_fontsize()
        for text in figure.findobj(matplotlib.text.Text)
        if text.get_visible() and text.get_text()
    ]
    assert min(sizes) >= 7.5
    plt.close(figure)
    assert not plt.get_fignums()


@pytest.mark.parametrize("name", FIGURES)
def test_given_axes_are_drawn_into_and_returned(name):
    figure = plt.figure(figsize=(12, 4))
    axes = figure.subplots()
    assert FIGURES[name](ax=axes) is axes
    assert plt.get_fignums() == [figure.number]
    assert axes.has_data()
    assert axes.get_xlabel()
    draw(axes)


@pytest.mark.parametrize("name", FIGURES)
def test_axes_have_names(name):
    axes = FIGURES[name]()
    assert axes.get_xlabel()
    if not name.startswith("kept_fraction"):  # whose rows have names instead
        assert axes.get_ylabel()


def test_a_subfigure_and_a_mosaic_are_places_to_draw():
    figure = plt.figure(layout="constrained")
    left, right = figure.subfigures(1, 2)
    plots.gradient_cosines(torch.eye(3), ax=left.subplots())
    panels = right.subplots(2)
    curve = Curve.of(Histogram.of_noise(4))
    plots.tau_curve(curve, ax=panels[0])
    plots.masked_norm(curve, ax=panels[1])
    figure.canvas.draw()
    assert len(left.axes) == 2
    assert len(right.axes) == 2


def modules():
    entries = pkgutil.iter_modules(plots.__path__)
    return [importlib.import_module(f"andmask_ext.plots.{entry.name}") for entry in entries]


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.__name__)
def test_examples_print_what_they_say(module):
    assert doctest.testmod(module).failed == 0
    for name in getattr(module, "__all__", []):
        value = getattr(module, name)
        if inspect.isfunction(value) and value.__module__ == module.__name__:
            assert inspect.getdoc(value)


def test_every_public_function_has_an_example():
    for name in plots.__all__:
        if name not in ("palette", "style"):
            assert "Example:" in inspect.getdoc(getattr(plots, name)), name


def run(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_the_library_does_not_import_matplotlib():
    program = "import sys, andmask_ext; assert 'matplotlib' not in sys.modules"
    result = run(program)
    assert result.returncode == 0, result.stderr


def test_without_matplotlib_the_error_names_the_extra():
    result = run("import sys; sys.modules['matplotlib'] = None; from andmask_ext import plots")
    assert result.returncode == 1
    assert "ImportError: andmask_ext.plots needs matplotlib" in result.stderr
    assert "`pip install matplotlib`" in result.stderr


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        ("vote_histogram", r"histogram: expected metrics\.vote_histogram\(grads\), but got Tensor"),
        ("masked_norm", r"curve: expected metrics\.tau_curve\(grads\), but got Tensor"),
        ("tau_curve", r"curve: expected metrics\.tau_curve\(grads\), but got Tensor"),
        ("kept_fraction", r"monitor: expected a metrics\.Monitor, but got Tensor"),
        ("gradient_correlation", r"result: expected metrics\.gradient_correlation\(.* got Tensor"),
        ("input_agreement", r"result: expected metrics\.input_agreement\(.* got Tensor"),
    ],
)
def test_gradients_are_no_metrics(draw, message):
    with pytest.raises(TypeError, match=message):
        getattr(plots, draw)(torch.randn(3, 4))
