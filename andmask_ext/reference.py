"""Specification of every op in plain PyTorch and float64.

Tests compare the native ops with these functions, which return float64. No other module of the
package imports this one. If the package used its own specification, the tests would prove nothing.

Reference:
    Parascandolo et al., *Learning explanations that are hard to vary*, ICLR 2021, section 2.3.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "accumulate_convolution",
    "accumulate_outer",
    "agreement",
    "agreement_mask",
    "agreement_random",
    "agreement_sum",
    "and_mask",
    "clip_scale",
    "convolution_gradients",
    "fed_ilc",
    "geometric_mean",
    "gradient_agreement_filtering",
    "masked_average",
    "masked_mean",
    "mean",
    "median",
    "median_of_three",
    "moments",
    "outer_gradients",
    "sand_mask",
    "sign_dropout",
    "sign_test_tail",
    "smooth_mask",
    "total_norm",
    "trimmed_mean",
    "vote_histogram",
    "vote_threshold",
    "vote_thresholds",
    "voters",
    "votes",
    "winsorized_mean",
]


def votes(grads: Tensor) -> Tensor:
    """Sum the signs of the environments: int64 ``[*shape]``. Zeros and NaN cast no vote."""
    return (grads > 0).sum(0) - (grads < 0).sum(0)


def vote_threshold(tau: float, environments: int) -> int:
    """Return the smallest ``|votes|`` that keeps a coordinate.

    ``tau * environments`` is rounded up. The tolerance of 1e-6 allows for the rounding of
    ``tau = k / d``, so k votes of d are kept for every k.
    """
    return max(0, math.ceil(tau * environments - 1e-6))


def voters(grads: Tensor, zeros: str = "count") -> Tensor:
    """Count who votes: all environments, or with ``"abstain"`` the signs that are not zero."""
    if zeros == "count":
        return torch.full_like(votes(grads), grads.shape[0])
    return (grads > 0).sum(0) + (grads < 0).sum(0)


@functools.cache
def sign_test_tail(votes: int, voters: int) -> Fraction:
    """Return the chance that ``|V| >= votes``, where V sums so many fair signs."""
    ways = sum(math.comb(voters, b) for b in range(voters + 1) if abs(2 * b - voters) >= votes)
    return Fraction(ways, 2**voters)


def vote_thresholds(
    grads: Tensor,
    tau: float | None = None,
    *,
    fdr: float | None = None,
    significance: float | None = None,
    zeros: str = "count",
) -> Tensor:
    """Return the smallest ``|votes|`` that keeps each coordinate: int64 ``[*shape]``.

    A level may be missed by 1e-9 of it, as it often is a decimal that is not a float64.
    """
    count = grads.shape[0]
    given, m = votes(grads).abs().flatten().tolist(), voters(grads, zeros).flatten().tolist()
    if fdr is not None:
        level = _step_up(given, m, fdr)
    elif significance is not None:
        level = max(Fraction(significance), sign_test_tail(count, count))
    else:
        assert tau is not None
        of_tau = [vote_threshold(tau, max(voters, 1)) for voters in m]
        return torch.tensor(of_tau, dtype=torch.int64).view(grads.shape[1:])
    allowed = level * (1 + Fraction(1, 10**9))
    of_level = [
        next((k for k in range(1, voters + 1) if sign_test_tail(k, voters) <= allowed), voters + 1)
        for voters in m
    ]
    return torch.tensor(of_level, dtype=torch.int64).view(grads.shape[1:])


def _step_up(votes: Sequence[int], voters: Sequence[int], fdr: float) -> Fraction:
    """Return the level of Benjamini and Hochberg's step-up among tests that could reach it."""
    q = Fraction(fdr) * (1 + Fraction(1, 10**9))
    tested = [(k, m) for k, m in zip(votes, voters, strict=True) if sign_test_tail(m, m) <= q]
    tails = sorted(sign_test_tail(k, m) for k, m in tested)
    kept = max((i for i, p in enumerate(tails, start=1) if len(tails) * p <= q * i), default=0)
    return Fraction(fdr) * Fraction(kept, max(1, len(tails)))


def agreement_mask(
    grads: Tensor, tau: float | None = None, rescale: bool = False, **test: Any
) -> Tensor:
    """Return 1 where the environments agree, else 0; divided by its mean if ``rescale``."""
    if tau is None and test.keys() <= {"zeros"}:
        tau = 1.0
    mask = (votes(grads).abs() >= vote_thresholds(grads, tau, **test)).double()
    if rescale and mask.numel() > 0:
        mask = mask / (1e-10 + mask.mean())
    return mask


def masked_mean(
    grads: Tensor, tau: float | None = None, rescale: bool = False, **test: Any
) -> Tensor:
    """Multiply the mean over environments by the mask. NaN and infinities are not hidden."""
    return agreement_mask(grads, tau, rescale, **test) * grads.double().mean(0)


def vote_histogram(grads: Tensor) -> tuple[Tensor, Tensor]:
    """Count coordinates by ``|votes|``, and sum the squares of their sums: ``[d + 1]`` each."""
    agreement = votes(grads).abs().flatten()
    squares = grads.double().sum(0).square().flatten()
    bins = grads.shape[0] + 1
    counts = torch.bincount(agreement, minlength=bins)
    return counts, squares.new_zeros(bins).index_add_(0, agreement, squares)


def total_norm(updates: Sequence[Tensor]) -> Tensor:
    """Return the norm of all updates together, as if they were one vector."""
    norm: Tensor = torch.cat([update.double().flatten() for update in updates]).norm()
    return norm


def clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """Return what ``torch.nn.utils.clip_grad_norm_`` multiplies gradients of this norm by."""
    return (max_norm / (norm + 1e-6)).clamp(max=1)


# ---- the rules, under their names in the native library ----


def nan_if_not_finite(grads: Tensor) -> Tensor:
    """Return 0, or NaN where any environment is not finite. Rules add it, to hide no NaN."""
    return (grads.double() * 0).sum(0)


def mean(grads: Tensor) -> Tensor:
    """Average over environments."""
    return grads.double().mean(0)


def and_mask(grads: Tensor, tau: float | None = None, rescale: bool = False, **test: Any) -> Tensor:
    """Return :func:`masked_mean`."""
    return masked_mean(grads, tau, rescale, **test)


def geometric_mean(
    grads: Tensor, tau: float | None = None, rescale: bool = False, **test: Any
) -> Tensor:
    """Multiply mask, sign of the mean, and geometric mean of the magnitudes."""
    grads = grads.double()
    magnitude = (grads.abs() + 1e-10).log().mean(0).exp()
    return agreement_mask(grads, tau, rescale, **test) * grads.sum(0).sign() * magnitude


def agreement(grads: Tensor, zeros: str = "count") -> Tensor:
    """Return the share of the voters by which the majority wins; 0 if nobody votes."""
    return votes(grads).abs().double() / voters(grads, zeros).clamp(min=1)


def smooth_mask(grads: Tensor, tau: float | None, k: float, **test: Any) -> Tensor:
    """Return ``tanh(k * (agreement - tau) / variance)``, at least 0; NaN becomes 1e-17.

    With ``fdr`` or ``significance``, tau is the last agreement that is not kept, and the mask is 0
    where the AND-mask's is.
    """
    zeros = test.get("zeros", "count")
    bar, kept = torch.tensor(0.0 if tau is None else tau, dtype=torch.float64), torch.tensor(True)
    if tau is None:
        least = vote_thresholds(grads, **test)
        bar = (least - 1) / voters(grads, zeros).clamp(min=1).double()
        kept = votes(grads).abs() >= least
    grads = grads.double()
    environments = grads.shape[0]
    squares = (grads - grads.mean(0)).square().sum(0)
    variance = squares / (environments - 1) if environments > 1 else torch.tensor(1e-17)
    mask = (k * (agreement(grads, zeros) - bar) / variance).tanh().clamp(min=0)
    return mask.nan_to_num(nan=1e-17) * kept


def sand_mask(
    grads: Tensor, tau: float | None = None, k: float = 10.0, rescale: bool = False, **test: Any
) -> Tensor:
    """Multiply the mean by the smooth mask. With ``rescale``, divide the mask by its mean."""
    mask = smooth_mask(grads, tau, k, **test)
    if rescale and mask.numel() > 0:
        mask = mask / (1e-10 + mask.mean())
    return mask * grads.double().mean(0)


def masked_average(grads: Tensor, tau: float | None = None, **test: Any) -> Tensor:
    """Multiply the mean by the agreement where the AND-mask is 0."""
    kept = agreement_mask(grads, tau, **test) == 1
    share = agreement(grads, test.get("zeros", "count"))
    return torch.where(kept, 1.0, share) * grads.double().mean(0)


def agreement_sum(grads: Tensor) -> Tensor:
    """Sum where all environments agree."""
    return agreement_mask(grads, 1.0) * grads.double().sum(0)


def agreement_random(grads: Tensor, noise: Tensor) -> Tensor:
    """Sum where all environments agree. Elsewhere: noise times the mean magnitude of the sums."""
    total = grads.double().sum(0)
    kept = agreement_mask(grads, 1.0) == 1
    size = total[kept].abs().mean() if kept.any() else 0.0
    return torch.where(kept, total, noise.double() * size) + nan_if_not_finite(grads)


def sign_dropout(grads: Tensor, noise: Tensor) -> Tensor:
    """Sum the gradients of one sign: positive if their share is above the noise, else negative."""
    grads, noise = grads.double(), noise.double()
    positive = (1 + grads.sum(0) / grads.abs().sum(0)) / 2
    kept = (positive > noise) * (grads > 0) + (positive < noise) * (grads < 0)
    return (grads * kept).sum(0) + nan_if_not_finite(grads)


def median(grads: Tensor) -> Tensor:
    """Return the middle value, or the mean of the two middle values."""
    ranked = grads.double().sort(0).values
    last = grads.shape[0] - 1
    return (ranked[last // 2] + ranked[last - last // 2]) / 2 + nan_if_not_finite(grads)


def trimmed_mean(grads: Tensor, b: float) -> Tensor:
    """Average all but the b largest and the b smallest."""
    ranked = grads.double().sort(0).values
    return ranked[int(b) : grads.shape[0] - int(b)].mean(0) + nan_if_not_finite(grads)


def winsorized_mean(grads: Tensor, c: float) -> Tensor:
    """Clip to the percentiles c and 100 - c, with linear interpolation, and average."""
    ranked = grads.double().sort(0).values
    last = grads.shape[0] - 1
    position = c / 100 * last
    rank, fraction = int(position), position % 1
    upper = min(rank + 1, last)
    low = ranked[rank] * (1 - fraction) + ranked[upper] * fraction
    high = ranked[last - rank] * (1 - fraction) + ranked[last - upper] * fraction
    clipped = torch.minimum(torch.maximum(ranked, low), high)
    return clipped.mean(0) + nan_if_not_finite(grads)


def median_of_three(grads: Tensor) -> Tensor:
    """Take the median of the means of three groups."""
    return median(torch.stack([group.double().mean(0) for group in grads.tensor_split(3)]))


def fed_ilc(grads: Tensor, tau: float | None = None, **test: Any) -> Tensor:
    """Mask the difference of the geometric means of both signs, weighted by their counts."""
    grads = grads.double()
    sides = []
    for side in (grads, -grads):
        count = (side > 0).sum(0).double()
        logs = torch.where(side > 0, side, 1.0).log().sum(0)
        sides.append(count / grads.shape[0] * (logs / count.clamp(min=1)).exp())
    return agreement_mask(grads, tau, **test) * (sides[0] - sides[1]) + nan_if_not_finite(grads)


def gradient_agreement_filtering(grads: Tensor, limit: float, halve: bool = False) -> Tensor:
    """Average the whole gradients, in their order, that stay near the average; 0 if none does."""
    average, count = grads[0].double(), 1
    for grad in grads[1:].double():
        size = average.norm() * grad.norm()
        cosine = (average * grad).sum() / size if size != 0 else 0.0
        if not 1 - cosine > limit + 1e-9:  # as NaN is not
            share = 2 if halve else count + 1
            average, count = average + (grad - average) / share, count + 1
    return average if count > 1 else torch.zeros_like(average)


# ---- moments ----


class Moments(NamedTuple):
    """The sums over environments that rules are computed from."""

    sum: Tensor
    votes: Tensor
    squares: Tensor
    logs: Tensor
    voters: Tensor


def moments(grads: Tensor, weights: Sequence[float] = ()) -> Moments:
    """Return the moments of stacked gradients. Weights multiply gradients but not votes."""
    factors = grads.new_tensor(weights or [1.0], dtype=torch.float64).expand(grads.shape[0])
    weighted = grads.double() * factors.view(-1, *[1] * (grads.dim() - 1))
    deviations = weighted - weighted.mean(0)
    logs = (weighted.abs() + 1e-10).log()
    squares = deviations.square().sum(0)
    return Moments(weighted.sum(0), votes(grads), squares, logs.sum(0), voters(grads, "abstain"))


def environments(order: Tensor | None, offsets: Tensor | None, examples: int) -> Iterator[Tensor]:
    """Yield the examples of each environment. By default each example is an environment."""
    order = torch.arange(examples) if order is None else order
    offsets = torch.arange(examples + 1) if offsets is None else offsets
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        yield order[begin:end]


def outer_gradients(
    activations: Tensor,
    grad_outputs: Tensor,
    order: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Stack the weight gradients of a linear layer: ``[environments, outputs, inputs]``."""
    a, d = activations.double(), grad_outputs.double()
    return torch.stack(
        [
            torch.einsum("bno,bni->oi", d[examples], a[examples])
            for examples in environments(order, offsets, a.shape[0])
        ]
    )


def convolution_gradients(
    activations: Tensor,
    grad_outputs: Tensor,
    order: Tensor | None,
    offsets: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """Stack the weight gradients of a convolution: ``[environments, outputs, channels, *kernel]``.

    The gradient at an element of the kernel is the product of the output gradients and the part of
    the padded input that meets this element.
    """
    a, d = activations.double(), grad_outputs.double()
    for size in padding:  # pads the first spatial dim with zeros, and moves it to the end
        zeros = a.new_zeros(*a.shape[:2], size, *a.shape[3:])
        a = torch.cat([zeros, a, zeros], 2).movedim(2, -1)
    a = a.unflatten(1, (groups, -1))
    d = d.unflatten(1, (groups, -1)).flatten(3)
    grads = a.new_zeros(a.shape[0], groups, d.shape[2], a.shape[2], *kernel)
    for tap in itertools.product(*map(range, kernel)):
        seen = tuple(
            slice(
                tap[dim] * dilation[dim],
                tap[dim] * dilation[dim] + stride[dim] * (size - 1) + 1,
                stride[dim],
            )
            for dim, size in enumerate(grad_outputs.shape[2:])
        )
        grads[(..., *tap)] = torch.einsum("bgol,bgcl->bgoc", d, a[(..., *seen)].flatten(3))
    grads = grads.flatten(1, 2)
    members = environments(order, offsets, a.shape[0])
    return torch.stack([grads[examples].sum(0) for examples in members])


def accumulate_outer(*args: Any, weights: Sequence[float] = ()) -> Moments:
    """Return the moments of :func:`outer_gradients`."""
    return moments(outer_gradients(*args), weights)


def accumulate_convolution(*args: Any, weights: Sequence[float] = ()) -> Moments:
    """Return the moments of :func:`convolution_gradients`."""
    return moments(convolution_gradients(*args), weights)
