"""The figure of what environments agree on, by feature, pixel or token."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from .._checks import check_bool
from . import palette
from ._axes import DIVERGING, Array, as_array, axes_or_new, check_has
from ._data import ByInput
from .style import WIDTH, style

__all__ = ["input_agreement"]

_LISTED = 20  # tokens
_NAMED = 30  # features with a name for each
_CONFLICT = LinearSegmentedColormap.from_list(
    "own", ["#FFFFFF", "#F3C9A5", palette.VERMILION, "#6B2F00"]
).with_extremes(bad="#BBBBBB")
_SHARE = "share of coordinates kept"
_OWN = "own share of gradient"


def input_agreement(
    result: ByInput,
    *,
    own: bool = False,
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the share of coordinates that the AND-mask keeps, by input, beside that of noise.

    Features are bars. Pixels are an image, the mean over channels: blue is more than noise, white
    is noise, vermilion is less. Tokens are a list, of those the lowest below noise. Inputs that are
    NaN are grey or missing.

    Args:
        result: the result of :func:`andmask_ext.metrics.input_agreement`.
        own: draw instead the share of the gradient that is an environment's own. Inputs on which
            environments pull in different directions stand out.
        names: names of the features or tokens; default: numbers.
        ax: the axes to draw into; default: a new figure.

    Returns:
        The axes.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: inputs have more than three dimensions, none has a value, or there is not one
            name per input.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from andmask_ext import plots
        >>> result = SimpleNamespace(share=torch.tensor([0.6, 0.1]), noise=torch.tensor([0.2, 0.2]),
        ...                          own=torch.tensor([0.0, 0.9]), tau=0.8, kind="features")
        >>> plots.input_agreement(result, names=["age", "hospital"]).get_ylabel()
        'share of coordinates kept'
    """
    check_has(
        "result",
        result,
        ("share", "noise", "own", "tau", "kind"),
        "metrics.input_agreement(model, environments, loss_fn, tau=...)",
    )
    check_bool("own", own)
    dims = result.share.dim()
    if not 1 <= dims <= 3:
        raise ValueError(
            f"result: expected inputs of 1 to 3 dimensions, but got shape "
            f"{list(result.share.shape)}; draw a slice: dataclasses.replace(result, share=..., "
            "noise=..., own=...)"
        )
    share, noise, mine = (
        as_array(name, getattr(result, name), dims) for name in ("share", "noise", "own")
    )
    shown = mine if own else share
    if not np.isfinite(shown).any():
        raise ValueError("result: expected a value for at least one input, but all are NaN")
    if dims > 1 and shown.shape[0] == 1:
        share, noise, shown = share[0], noise[0], shown[0]
    if names is not None and (isinstance(names, str) or len(names) != shown.size):
        raise ValueError(f"names: expected {shown.size}, one for each input, but got {len(names)}")
    with style():
        if shown.ndim > 1:
            return _image(shown if own else share - noise, own, result.tau, ax)
        if result.kind == "tokens":
            return _list(shown, None if own else noise, names, result.tau, ax)
        return _bars(shown, None if own else noise, names, result.tau, ax)


def _image(values: Array, own: bool, tau: float, ax: Axes | None) -> Axes:
    if values.ndim == 3:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a pixel that is NaN in all channels
            values = np.nanmean(values, 0)
    axes = axes_or_new(ax, (4.6, 3.6))
    far = np.nanmax(np.abs(values)) or 1.0
    image = axes.imshow(
        np.ma.masked_invalid(values),
        cmap=_CONFLICT if own else DIVERGING,
        vmin=0 if own else -far,
        vmax=1 if own else far,
        aspect="equal" if max(values.shape) <= 4 * min(values.shape) else "auto",
    )
    axes.set(xlabel="column", ylabel="row")
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label(_OWN if own else f"share kept at τ = {tau:g}, minus noise")
    bar.outline.set_visible(False)
    return axes


def _bars(
    values: Array, noise: Array | None, names: Sequence[str] | None, tau: float, ax: Axes | None
) -> Axes:
    axes = axes_or_new(ax, (WIDTH, 2.8))
    count = len(values)
    edges = np.arange(count + 1) - 0.5
    colour = palette.SKY if noise is not None else palette.VERMILION
    label = f"gradients, τ = {tau:g}" if noise is not None else "gradients"
    axes.stairs(np.nan_to_num(values), edges, fill=True, color=colour, label=label)
    if noise is not None:
        axes.stairs(
            np.nan_to_num(noise),
            edges,
            color=palette.BLACK,
            linestyle=(0, (4, 1.6)),
            linewidth=1.3,
            label="pure noise",
            baseline=None,
        )
        axes.legend(loc="upper right")
    axes.set(xlim=(-0.5, count - 0.5), ylim=_limits(values, noise))
    axes.set_ylabel(_SHARE if noise is not None else _OWN)
    axes.set_xlabel("feature")
    if names is not None and count <= _NAMED:
        long = max(map(len, names)) > 3
        axes.set_xticks(range(count), names, rotation=45 if long else 0)
    return axes


def _list(
    values: Array, noise: Array | None, names: Sequence[str] | None, tau: float, ax: Axes | None
) -> Axes:
    """Draw the tokens that are the furthest below noise, or of the largest own share."""
    order = np.argsort(values - noise if noise is not None else -values, kind="stable")
    chosen = [place for place in order if np.isfinite(values[place])][:_LISTED]
    axes = axes_or_new(ax, (WIDTH * 0.7, 1.1 + 0.2 * max(len(chosen), 4)))
    rows = np.arange(len(chosen))
    colour = palette.SKY if noise is not None else palette.VERMILION
    label = f"gradients, τ = {tau:g}" if noise is not None else "gradients"
    axes.barh(rows, values[chosen], color=colour, label=label)
    if noise is not None:
        axes.plot(
            noise[chosen],
            rows,
            linestyle="",
            marker="|",
            markersize=11,
            markeredgewidth=1.6,
            color=palette.BLACK,
            label="pure noise",
        )
        axes.legend(loc="best")
    axes.set_yticks(rows, [names[place] if names is not None else str(place) for place in chosen])
    axes.invert_yaxis()
    axes.set_xlim(_limits(values[chosen], None if noise is None else noise[chosen]))
    axes.set(xlabel=_SHARE if noise is not None else _OWN, ylabel="token")
    return axes


def _limits(values: Array, noise: Array | None) -> tuple[float, float]:
    if noise is None:
        return 0.0, max(1.0, float(np.nanmax(values)))
    top = max(float(np.nanmax(values)), float(np.nanmax(noise)))
    return 0.0, 1.25 * top if top > 0 else 1.0
