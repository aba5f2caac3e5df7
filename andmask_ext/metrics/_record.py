"""One record of a :class:`Monitor`: the metrics of each parameter and of all together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._pending import Group
from .._vote_test import VoteTest
from ..moments import Moments
from ..rules import AndMask
from ..rules._kept import kept_by, noise_share, test_of
from ._inputs import vote_histograms, without_none
from ._signal import squared_norms_of, sums_of_squared_norms

METRICS = (
    "sign_agreement",
    "kept_fraction",
    "noise_kept_fraction",
    "threshold",
    "noise_share",
    "norm",
    "masked_norm",
    "coherence",
)
_AVERAGE = VoteTest(0, 0.0, False)  # keeps all

# Sums over coordinates. Metrics are ratios of them, also for all parameters together.
_SUMS = (
    "coordinates",
    "agreement",
    "kept",
    "noise",  # coordinates that the mask would keep of noise
    "threshold",  # agreement that is asked for at each coordinate
    "squared_mean",
    "squared_masked_mean",
    "norm_of_sum",  # squared, as the next one
    "sum_of_norms",
)


def make_record(
    groups: Sequence[Group], test: VoteTest | None, coherence: bool
) -> dict[str, Tensor]:
    """Return each metric as float64 ``[parameters + 1]``. The last value is for all parameters.

    Args:
        groups: parameters, moments and rule of each param group.
        test: what is kept; None: that of each group's rule.
        coherence: whether to compute the coherence, which needs norms or squares.
    """
    measured = [
        _measure(moments, test or test_of(rule) or _AVERAGE, coherence) if moments._touched else {}
        for _, moments, rule in groups
    ]
    sums = _with_totals(groups, measured)
    return {
        "sign_agreement": sums["agreement"] / sums["coordinates"],
        "kept_fraction": sums["kept"] / sums["coordinates"],
        "noise_kept_fraction": sums["noise"] / sums["coordinates"],
        "threshold": sums["threshold"] / sums["coordinates"],
        "noise_share": noise_share(sums["noise"], sums["kept"]),
        "norm": sums["squared_mean"].sqrt(),
        "masked_norm": sums["squared_masked_mean"].sqrt(),
        "coherence": sums["norm_of_sum"] / sums["sum_of_norms"],
    }


def _measure(moments: Moments, test: VoteTest, coherence: bool) -> dict[str, Tensor]:
    """Return sums over the coordinates of each touched parameter, if they are known."""
    count = moments.count
    totals = without_none(moments.sum)
    sums: dict[str, Tensor] = {}
    if "votes" in moments.kinds:
        counts, squares = vote_histograms(totals, without_none(moments.votes), count)
        steps = torch.arange(count + 1, device=counts.device)
        norm_of_sum = squares.sum(1)
        found = kept_by(test, moments)
        sums["coordinates"] = counts.sum(1).double()
        sums["agreement"] = counts.double() @ (steps.double() / count)
        sums["kept"] = found.kept.double()
        sums["noise"] = found.noise
        sums["threshold"] = sums["coordinates"] * found.thresholds[:, -1] / count
        if test.abstain:
            sums["squared_masked_mean"] = _squared_masked_means(moments, test)
        else:  # the mask multiplies, so values that are not finite show even if masked
            masked = squares * (steps >= found.thresholds)
            sums["squared_masked_mean"] = masked.sum(1) / count**2
    else:
        norm_of_sum = _stack(squared_norms_of(totals), totals[0].device)
    sums["squared_mean"] = norm_of_sum / count**2
    if coherence:
        sum_of_norms = sums_of_squared_norms(moments, norm_of_sum.unbind())
        if sum_of_norms is not None:  # None: a state without norms was loaded
            sums["norm_of_sum"] = norm_of_sum
            sums["sum_of_norms"] = _stack(sum_of_norms, norm_of_sum.device)
    return sums


def _squared_masked_means(moments: Moments, test: VoteTest) -> Tensor:
    """Return the squared norm of the masked mean gradient of each touched parameter."""
    arguments = [test.level, float(test.criterion), float(test.abstain)]
    norm = torch.ops.andmask._squared_norm.default
    norms = [
        norm(*moments._lists([index]), moments.count, AndMask.name, arguments, False)
        for index in moments._touched
    ]
    return _stack(norms, norms[0].device)


def _with_totals(
    groups: Sequence[Group], measured: Sequence[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the sums of each parameter (NaN if unknown), and of all parameters with sums."""
    devices = [sums["squared_mean"].device for sums in measured if sums]
    device = devices[0] if devices else groups[0][0][0].device
    nothing = torch.full((1,), torch.nan, dtype=torch.float64, device=device)
    joined = {}
    for name in _SUMS:
        parts = []
        total = torch.zeros(1, dtype=torch.float64, device=device)
        for (params, moments, _), sums in zip(groups, measured, strict=True):
            if name not in sums:
                parts += [nothing] * len(params)
                continue
            values = sums[name].to(device)
            total += values.sum()
            if len(moments._touched) == len(params):
                parts.append(values)
                continue
            by_index = dict(zip(moments._touched, values.split(1), strict=True))
            parts += [by_index.get(index, nothing) for index in range(len(params))]
        missing = any(sums and name not in sums for sums in measured)
        if not any(name in sums for sums in measured) or (missing and name == "sum_of_norms"):
            total = nothing
        joined[name] = torch.cat([*parts, total])
    return joined


def _stack(values: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.stack([value.to(device) for value in values])
