"""Figures are drawn without a screen, settings stay as they were, and no figure is left open."""

import pytest

try:
    import matplotlib
    from matplotlib import pyplot
except ImportError:  # the extra is not installed: there is nothing to test
    collect_ignore_glob = ["test_*.py"]
else:
    matplotlib.use("agg")


@pytest.fixture(autouse=True)
def _settings_stay():
    before = dict(matplotlib.rcParams)
    yield
    after = dict(matplotlib.rcParams)
    pyplot.close("all")
    assert after == before
