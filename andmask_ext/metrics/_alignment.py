"""Cosines of pairs of environments, and correlations of a gradient with signals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_bool, check_tau
from .._norms import scalar_products
from ..agreement import Agreement
from ..rules._threshold import vote_threshold
from ._inputs import Entries, Gradients, Stacked, entries_of, stacked_of, without_none

__all__ = ["GradientCorrelation", "gradient_correlation", "gradient_cosines"]


def gradient_cosines(grads: Stacked | Agreement) -> Tensor:
    r"""Return the cosine of the angle between the gradients of each pair of environments.

    The gradient of an environment is that of all parameters together. Scalar products are added up
    parameter by parameter, so no copy of all gradients is made.

    Args:
        grads: gradients of d environments: a tensor ``[d, *shape]``, or a dict or list of them. Or
            an :class:`andmask_ext.Agreement` after ``with agreement(gram=True)``, which needs only
            one backward pass and holds the gradients of at most one parameter.

    Returns:
        Cosines, float64 ``[d, d]``, symmetric with ones on the diagonal. As in
        :func:`torch.nn.functional.cosine_similarity`, they are zero for an environment whose
        gradient is zero. They are NaN for one whose gradient is not finite.

    Raises:
        TypeError: ``grads`` has the wrong form or dtype, or is :class:`andmask_ext.Moments`, which
            do not keep single environments.
        ValueError: there is no environment.
        RuntimeError: the last context of the agreement did not have ``gram=True``.

    Shape:
        - grads: :math:`(d, *)`
        - output: :math:`(d, d)`

    Example:
        >>> import torch, andmask_ext as am
        >>> am.metrics.gradient_cosines(torch.tensor([[3.0, 0.0], [4.0, 3.0], [-1.0, 0.0]]))
        tensor([[ 1.0000,  0.8000, -1.0000],
                [ 0.8000,  1.0000, -0.8000],
                [-1.0000, -0.8000,  1.0000]], dtype=torch.float64)
    """
    if isinstance(grads, Agreement):
        products = list(grads.gram.values())
        if not products:
            raise RuntimeError(
                "gradient_cosines: expected a backward pass that reaches a parameter of the "
                "agreement, but none was reached"
            )
    else:
        products = [scalar_products(param_grads) for param_grads in stacked_of(grads)]
    device = products[0].device
    total = products[0].clone()
    for product in products[1:]:
        total += product.to(device)
    total = (total + total.t()) / 2  # a matrix product may not be symmetric to the last bit
    norms = total.diagonal().sqrt()
    sizes = norms[:, None] * norms
    cosines = torch.where(sizes == 0, 0.0, total / sizes).clamp(-1, 1)
    exact = torch.where(norms > 0, 1.0, norms * 0)  # 0 for a zero norm, NaN for NaN
    finite = torch.where(torch.isfinite(norms), exact, torch.nan)
    cosines.diagonal().copy_(finite)
    return cosines


@dataclass(frozen=True, eq=False)
class GradientCorrelation:
    """Correlations of the update with signals, as functions of the threshold.

    Attributes:
        tau: the thresholds, float64 ``[t]``.
        correlations: the correlations with each signal by its name, float64 ``[t]``. NaN if fewer
            than two coordinates are left, or if the update or the signal is constant on them.
        coordinates: the number of coordinates used for each signal by its name, int64 ``[t]``.
    """

    tau: Tensor
    correlations: dict[str, Tensor]
    coordinates: dict[str, Tensor]


def gradient_correlation(
    grads: Gradients,
    signals: Mapping[str, Gradients],
    taus: Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    *,
    mask_signals: bool = True,
    xor: bool = False,
) -> GradientCorrelation:
    r"""Correlate the masked mean gradient with gradients on data that keep only one signal.

    This is the paper's analysis of the synthetic task. It compares the gradient on the unchanged
    data with gradients on permuted data. If the shortcut inputs are permuted over examples, only
    the *mechanism* is left. If the mechanism inputs are permuted, only the *shortcut* is left. As
    tau grows, the correlation with the shortcut should vanish, and that with the mechanism should
    remain.

    Pearson's correlation is taken over the coordinates of all parameters. Coordinates where either
    gradient is zero, such as masked ones, are excluded.

    Args:
        grads: gradients of d environments on the unchanged data: a tensor ``[d, *shape]``, a dict
            or list of them, or :class:`andmask_ext.Moments` with votes.
        signals: a dict from the name of a signal to gradients of the same parameters on permuted
            data.
        taus: thresholds in [0, 1].
        mask_signals: mask the mean gradient of each signal by the votes of its environments. False:
            use its plain mean.
        xor: as a control, keep only the coordinates that the AND-mask masks.

    Returns:
        The correlations and the numbers of coordinates, for each threshold.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a signal has different parameters, a threshold lies outside [0, 1], or there is
            no threshold.

    Example:
        >>> import torch, andmask_ext as am
        >>> mechanism = torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0]).expand(2, 5)
        >>> shortcut = torch.tensor([[0.0, 0.0, 0.0, 5.0, -4.0], [0.0, 0.0, 0.0, -3.0, 6.0]])
        >>> result = am.metrics.gradient_correlation(
        ...     mechanism + shortcut, {"mechanism": mechanism, "shortcut": shortcut}, [0.0, 1.0])
        >>> [round(value, 6) for value in result.correlations["mechanism"].tolist()]
        [1.0, 1.0]
        >>> result.coordinates["shortcut"]
        tensor([2, 0])

    Reference:
        Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 4.1
        (gradient correlations).
    """
    check_bool("mask_signals", mask_signals)
    check_bool("xor", xor)
    if not isinstance(signals, Mapping):
        raise TypeError(
            f"signals: expected a dict from names to gradients, but got {type(signals).__name__}"
        )
    if not isinstance(taus, Sequence):
        raise TypeError(f"taus: expected a sequence of numbers, but got {type(taus).__name__}")
    thresholds = list(taus)
    if not thresholds:
        raise ValueError("taus: expected at least one number, but got none")
    for tau in thresholds:
        check_tau(tau)
    entries = entries_of(grads)
    whole = _means_and_votes(entries)
    correlations, coordinates = {}, {}
    for name, signal in signals.items():
        signal_entries = entries_of(signal, f"signals[{name!r}]")
        if signal_entries.keys != entries.keys:
            raise ValueError(
                f"signals[{name!r}]: expected gradients for the parameters of grads, in their "
                f"order ({entries.keys}), but got {signal_entries.keys}"
            )
        signal_means = _means_and_votes(signal_entries)
        shapes, expected = ([m.shape for m in means.means] for means in (signal_means, whole))
        if shapes != expected:
            raise ValueError(
                f"signals[{name!r}]: expected gradients for parameters of shapes "
                f"{[tuple(s) for s in expected]}, as grads, but got {[tuple(s) for s in shapes]}"
            )
        results = [
            _pearson(
                whole.masked(tau, xor),
                signal_means.masked(tau, xor) if mask_signals else signal_means.means,
            )
            for tau in thresholds
        ]
        correlations[name] = torch.stack([correlation for correlation, _ in results])
        coordinates[name] = torch.stack([count for _, count in results])
    return GradientCorrelation(
        torch.tensor(thresholds, dtype=torch.float64, device=whole.means[0].device),
        correlations,
        coordinates,
    )


@dataclass(frozen=True)
class _Means:
    environments: int
    means: list[Tensor]
    votes: list[Tensor]

    def masked(self, tau: float, xor: bool) -> list[Tensor]:
        """Return the masked means. The mask multiplies, so NaN is not hidden."""
        threshold = vote_threshold(tau, self.environments)
        return [
            mean * ((votes.abs() >= threshold) != xor)
            for mean, votes in zip(self.means, self.votes, strict=True)
        ]


def _means_and_votes(entries: Entries) -> _Means:
    moments = entries.with_kinds("votes")
    means = [total.double() / entries.environments for total in without_none(moments.sum)]
    return _Means(entries.environments, means, without_none(moments.votes))


def _pearson(first: list[Tensor], second: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the correlation over coordinates where neither is zero, and their number."""
    device = first[0].device
    x, y = (torch.cat([part.flatten().to(device) for part in side]) for side in (first, second))
    both = (x != 0) & (y != 0)
    count = both.sum()
    x, y = (torch.where(both, side - (side * both).sum() / count, 0.0) for side in (x, y))
    correlation = (x * y).sum() / (x.square().sum().sqrt() * y.square().sum().sqrt())
    enough = (count >= 2) & (x != 0).any() & (y != 0).any()
    return torch.where(enough, correlation.clamp(-1, 1), torch.nan), count
