"""Figures of the histogram of votes, and of what a threshold keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from .._checks import check_bool
from .._vote_test import VoteTest, vote_test
from ..rules._threshold import vote_threshold
from . import palette
from ._axes import Array, as_array, axes_or_new, check_has, percent
from ._data import Curve, Votes
from .style import SMALL, WIDTH, style

__all__ = ["tau_curve", "vote_histogram"]

_DOTS = 33  # largest number of steps with a dot for each
_BARS = 64  # largest number of bars; more numbers of votes share bars


def vote_histogram(
    histogram: Votes,
    tau: float | None = None,
    *,
    fdr: float | None = None,
    significance: float | None = None,
    log: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw the distribution of agreement over coordinates, and that of pure noise.

    Bars are shares of coordinates, and the outline is noise. Signs of d environments add up to d,
    d - 2 and so on. These numbers of votes have bars. A coordinate with zero gradients can have a
    number in between, and counts for the bar below. With more than 64 numbers, neighbours share a
    bar.

    Args:
        histogram: the result of :func:`andmask_ext.metrics.vote_histogram`.
        tau: mark this threshold and the share that it keeps. The share is exact even if numbers
            share bars.
        fdr: mark the threshold of this false discovery rate, instead of ``tau``. It is that of all
            coordinates of the histogram together, where a rule takes each parameter by itself.
        significance: mark the threshold of this level of significance, instead of ``tau``.
        log: use a logarithmic scale for shares.
        ax: the axes to draw into; default: a new figure.

    Returns:
        The axes.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: more than one threshold is given, or lies outside its range, or there are not
            d + 1 counts.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from andmask_ext import plots
        >>> votes = SimpleNamespace(environments=2, counts=torch.tensor([3, 0, 1]),
        ...                         noise=torch.tensor([0.5, 0.0, 0.5]))
        >>> axes = plots.vote_histogram(votes, tau=1.0)
        >>> [float(bar.get_height()) for bar in axes.patches[:2]]
        [0.75, 0.25]
    """
    check_has("histogram", histogram, ("counts", "noise"), "metrics.vote_histogram(grads)")
    check_bool("log", log)
    levels = (tau, fdr, significance)
    test = None if levels == (None, None, None) else vote_test(*levels, "count")
    environments = histogram.environments
    counts, noise = as_array("counts", histogram.counts, 1), as_array("noise", histogram.noise, 1)
    if not len(counts) == len(noise) == environments + 1:
        raise ValueError(
            f"histogram: expected environments + 1 = {environments + 1} counts and noise shares, "
            f"but got {len(counts)} and {len(noise)}"
        )
    total = counts.sum()
    shares = counts / max(total, 1)
    starts, edges = _bars(environments, with_zero=shares[0] > 0)
    heights, null = np.add.reduceat(shares, starts), np.add.reduceat(noise, starts)
    merged = len(starts) > 1 and starts[-1] != environments
    centres = (edges[:-1] + edges[1:]) / 2
    with style():
        axes = axes_or_new(ax, (WIDTH, 3.4))
        width = np.diff(edges) * (1.0 if merged else 0.82)
        axes.bar(
            centres / environments,
            heights,
            width / environments,
            color=palette.SKY,
            edgecolor=palette.BLUE,
            linewidth=0.8,
            label="gradients" if total else "gradients: no coordinates",
        )
        axes.stairs(
            null,
            edges / environments,
            color=palette.BLACK,
            linestyle=(0, (4, 1.6)),
            linewidth=1.5,
            label="pure noise",
            baseline=None if log else 0,
        )
        room = 0.02 * (edges[-1] - edges[0])
        axes.set_xlim((edges[0] - room) / environments, (edges[-1] + room) / environments)
        plural = "s" if environments > 1 else ""
        axes.set_xlabel(f"agreement |votes| / d, of d = {environments} environment{plural}")
        axes.set_ylabel("share of coordinates")
        if len(starts) <= 8 and not merged:  # a tick for each bar
            shown = centres.clip(0) / environments
            axes.set_xticks(centres / environments, [f"{share:.2g}" for share in shown])
        else:
            axes.set_xticks(np.linspace(0, 1, 6), ["0", "0.2", "0.4", "0.6", "0.8", "1"])
        top = max(heights.max(), null.max())
        if log:
            floor = min(0.5 / total, heights[heights > 0].min() / 2) if total else 1e-6
            axes.set(yscale="log", ylim=(floor, top * (top / floor) ** 0.25))
        else:
            axes.set_ylim(0, 1.3 * top)
        half = len(heights) // 2
        right = heights[:half].sum() > heights[half:].sum()
        if test is not None:
            least = _least_votes(test, counts, noise)
            name = f"{test.name} = {test.level:g}: t = {least}"
            if test.name == "tau":
                name = f"τ = {test.level:g}"
            right = _mark_threshold(axes, name, least, environments, shares, noise)
        axes.legend(loc="upper right" if right else "upper left", borderaxespad=0.2)
    return axes


def _bars(environments: int, with_zero: bool) -> tuple[Array, Array]:
    """Return the first number of votes of each bar, and the edges of all bars in votes."""
    possible = np.arange(environments % 2, environments + 1, 2)
    least = -(-len(possible) // _BARS)
    # Bars are filled from unanimity downwards. The size is chosen so that the lowest is fullest.
    size = min(range(least, 3 * least // 2 + 1), key=lambda n: (-len(possible) % n / n, n))
    lowest = len(possible) % size
    starts = np.append(possible[:1] if lowest else [], possible[lowest::size]).astype(int)
    edges = np.append(starts - 1.0, environments + 1.0)
    if with_zero and environments % 2 and size == 1:  # odd d has no bar for 0 votes: add one
        return np.append(0, starts), np.append(-1.0, edges)
    starts[0] = 0
    return starts, edges


def _least_votes(test: VoteTest, counts: Array, noise: Array) -> int:
    """Return the smallest number of votes that a test keeps; d + 1 if it keeps nothing."""
    environments = len(counts) - 1
    if test.name == "tau":
        return vote_threshold(test.level, environments)
    tail, seen = (values[::-1].cumsum()[::-1] for values in (noise, counts))
    allowed = 1 + 1e-9  # levels are decimals
    if test.name == "significance":
        passes = tail <= max(test.level, tail[-1]) * allowed
    else:
        passes = (seen > 0) & (seen[0] * tail <= test.level * seen * allowed)
    passes[0] = False  # no vote is no evidence
    return int(passes.argmax()) if passes.any() else environments + 1


def _mark_threshold(
    axes: Axes, name: str, least: int, environments: int, shares: Array, noise: Array
) -> bool:
    """Draw a line left of what the threshold keeps, with the share. Return if the text is right.

    The line is at the border between bars, or in the middle of a bar that merges several numbers.
    """
    place = (least - (environments - least + 1) % 2) / environments
    axes.axvline(place, color=palette.VERMILION, linewidth=1.6, label="_threshold")
    left = place > 0.5
    axes.plot(
        place,
        0.985,
        ">",
        transform=axes.get_xaxis_transform(),
        color=palette.VERMILION,
        markersize=8,
        label="_kept side",
    )
    axes.annotate(
        f"{name} keeps {percent(shares[least:].sum())}\n(of noise {percent(noise[least:].sum())})",
        (place, 0.94),
        xycoords=axes.get_xaxis_transform(),
        xytext=(-5 if left else 5, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        va="top",
        fontsize=SMALL + 0.5,
        color=palette.VERMILION,
    )
    return not left


def tau_curve(curve: Curve, *, log: bool = False, ax: Axes | None = None) -> Axes:
    """Draw the share of coordinates that are kept as a function of the threshold.

    It is a step function, as nothing changes between two thresholds k / d.

    Args:
        curve: the result of :func:`andmask_ext.metrics.tau_curve`.
        log: use a logarithmic scale, as noise falls exponentially.
        ax: axes to draw into; default: a new figure.

    Returns:
        The axes.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the parts of the curve differ in length.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from andmask_ext import plots
        >>> curve = SimpleNamespace(
        ...     tau=torch.tensor([0.0, 0.5, 1.0]),
        ...     kept_fraction=torch.tensor([1.0, 0.7, 0.7]),
        ...     noise_kept_fraction=torch.tensor([1.0, 0.5, 0.5]),
        ... )
        >>> plots.tau_curve(curve).get_xlabel()
        'threshold τ of the AND-mask'
    """
    tau, kept, null = _parts(curve, "tau", "kept_fraction", "noise_kept_fraction")
    check_bool("log", log)
    with style():
        axes = axes_or_new(ax, (WIDTH, 2.6))
        for values, colour, dashes, label in (
            (kept, palette.BLUE, "-", "gradients"),
            (null, palette.BLACK, (0, (4, 1.6)), "pure noise"),
        ):
            shown = np.where(values > 0, values, np.nan) if log else values
            _steps(axes, tau, shown, color=colour, linestyle=dashes, label=label)
        if log:
            above = kept[kept > 0].min() if (kept > 0).any() else 1e-3
            axes.set(yscale="log", ylim=(max(above / 10, 1e-12), 2))
        else:
            axes.set_ylim(0, 1.05)
        axes.set_ylabel("share of\ncoordinates kept")
        axes.legend(loc="lower left" if log else "upper right")
    return axes


def masked_norm(curve: Curve, *, ax: Axes | None = None) -> Axes:
    """Draw the norm of the masked mean gradient as a function of the threshold.

    It is a step function. Values that are not finite are left out, and a note in the figure counts
    them.

    Args:
        curve: the result of :func:`andmask_ext.metrics.tau_curve`.
        ax: axes to draw into; default: a new figure.

    Returns:
        The axes.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the parts of the curve differ in length.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from andmask_ext import plots
        >>> curve = SimpleNamespace(tau=torch.tensor([0.0, 1.0]), norm=torch.tensor([3.0, 2.0]))
        >>> plots.masked_norm(curve).get_xlabel()
        'threshold τ of the AND-mask'
    """
    tau, norm = _parts(curve, "tau", "norm")
    with style():
        axes = axes_or_new(ax, (WIDTH, 2.6))
        finite = np.where(np.isfinite(norm), norm, np.nan)
        _steps(axes, tau, finite, color=palette.BLUE)
        top = np.nanmax(finite, initial=0.0)
        axes.set_ylim(0, 1.08 * top if top > 0 else 1)
        axes.set_ylabel("norm of\nmasked gradient")
        missing = int(np.isnan(finite).sum())
        if missing:
            axes.annotate(
                f"not finite at {missing} of {len(norm)} thresholds",
                (0.99, 0.95),
                xycoords="axes fraction",
                ha="right",
                va="top",
                fontsize=SMALL,
                color=palette.VERMILION,
            )
    return axes


def _parts(curve: Curve, *names: str) -> list[Array]:
    """Return parts of a curve, which must have one length."""
    check_has("curve", curve, names, "metrics.tau_curve(grads)")
    parts = [as_array(name, getattr(curve, name), 1) for name in names]
    if len({len(part) for part in parts}) > 1:
        raise ValueError(
            f"curve: expected {', '.join(names)} of one length, but got "
            f"{', '.join(str(len(part)) for part in parts)}"
        )
    return parts


def _steps(axes: Axes, tau: Array, values: Array, **look: Any) -> None:
    """Draw a step function of the threshold."""
    axes.step(
        tau, values, where="pre", linewidth=1.9, marker="o", markersize=4, **_ends(values), **look
    )
    axes.set(xlabel="threshold τ of the AND-mask", xlim=(-0.01, 1.01))
    axes.grid(alpha=0.25)


def _ends(values: Array) -> dict[str, Any]:
    """Return markers for the ends of steps: a step ends at tau = k / d, which belongs to it."""
    last = np.flatnonzero(np.append(np.diff(values) != 0, True))
    return {"markevery": last.tolist() if len(last) <= _DOTS else []}
