"""Every rule in one table: how to draw it, its twin in ``reference``, and how close it must come.

The last column bounds the distance from the reference before the result is rounded to its dtype:
``eps`` is that of the sums' type, ``g`` the gradients in float64. It is infinite where the rule
jumps and rounding may decide, and where its inner quantities leave the range of the type.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import andmask_ext as am
from andmask_ext import reference

from .. import strategies

Bound = Callable[[am.rules.Rule, Tensor, float], Tensor]
inf = float("inf")


def votings(environments: int) -> st.SearchStrategy[dict[str, Any]]:
    """What decides which coordinates are kept: a level by its name, and what zeros are."""
    taus = st.one_of(strategies.taus, strategies.tie_taus(environments))
    chances = st.one_of(
        st.sampled_from([0.05, 0.5, 0.25, 1e-6]),
        st.integers(1, 12).map(lambda m: 2.0**-m),  # ties: unanimity of m + 1
        st.floats(1e-9, 0.999),
    )
    return st.one_of(
        taus.map(lambda tau: {"tau": tau}),
        st.builds(
            lambda name, level, zeros: {name: level, "zeros": zeros},
            st.sampled_from(["fdr", "significance"]),
            chances,
            st.sampled_from(["count", "abstain"]),
        ),
        taus.map(lambda tau: {"tau": tau, "zeros": "abstain"}),
    )


def options_of(rule: am.rules.Rule) -> dict[str, Any]:
    """The arguments of a rule that say its test, for the reference."""
    names = ("tau", "fdr", "significance", "zeros")
    given = {name: getattr(rule, name, None) for name in names}
    return {name: value for name, value in given.items() if value is not None}


# ---- bounds ----


def of_mean(rule: am.rules.Rule, g: Tensor, eps: float) -> Tensor:
    return (len(g) + 8) * eps * g.abs().mean(0)


def of_sum(rule: am.rules.Rule, g: Tensor, eps: float) -> Tensor:
    return (len(g) + 8) * eps * g.abs().sum(0)


def of_median(rule: am.rules.Rule, g: Tensor, eps: float) -> Tensor:
    ranked = g.sort(0).values
    middle = ranked[(len(g) - 1) // 2 : len(g) // 2 + 1]
    return 4 * eps * middle.abs().mean(0)


def of_trimmed_mean(rule: am.rules.Rule, g: Tensor, eps: float) -> Tensor:
    assert isinstance(rule, am.rules.TrimmedMean)
    return 50 * eps * g.sort(0).values[rule.b : len(g) - rule.b].abs().mean(0)


def of_winsorized_mean(rule: am.rules.Rule, g: Tensor, eps: float) -> Tensor:
    """Where a percentile lies between two values is known to float64's precision."""
    return 50 * eps * g.abs().mean(0) + 8 * len(g) * 2.3e-16 * g.abs().amax(0)


def of_groups(rule: am.rules.Rule, g: Tensor, eps: float) -> Tensor:
    means = torch.stack([of_mean(rule, part, eps) for part in g.tensor_split(3)])
    return 2 * means.amax(0)


def of_logs(rule: am.rules.Rule, g: Tensor, eps: float) -> Tensor:
    logs = (g.abs() + 1e-10).log()
    size = logs.mean(0).exp()
    unsure = g.sum(0).abs() <= 2 * of_sum(rule, g, eps)  # of the sign
    return size * torch.where(unsure, 2.0, eps * ((len(g) + 8) * logs.abs().mean(0) + 8))


def of_fed_ilc(rule: am.rules.Rule, g: Tensor, eps: float) -> Tensor:
    bound = torch.zeros(g.shape[1:], dtype=torch.float64)
    for side in (g, -g):
        logs = torch.where(side > 0, side, 1.0).log()
        count = (side > 0).sum(0).clamp(min=1)
        bound += (logs.sum(0) / count).exp() * eps * (8 + 8 * logs.abs().sum(0) / count)
    return bound


def smooth_mask_of(rule: am.rules.SandMask, g: Tensor) -> Tensor:
    options = options_of(rule)
    return reference.smooth_mask(g, options.pop("tau", None), rule.k, **options)


def of_sand_mask(rule: am.rules.Rule, g: Tensor, eps: float) -> Tensor:
    assert isinstance(rule, am.rules.SandMask)
    if len(g) == 1:
        error = torch.zeros(g.shape[1:], dtype=torch.float64)
    else:
        variance = (g - g.mean(0)).square().sum(0) / (len(g) - 1)
        bar: float | Tensor = rule.tau or 0.0
        if rule.tau is None:
            kept_from = reference.vote_thresholds(g, **options_of(rule))
            bar = (kept_from - 1) / reference.voters(g, rule.zeros).clamp(min=1)
        x = rule.k * (reference.agreement(g, rule.zeros) - bar) / variance
        rounding = 8 * (len(g) + 8) * eps * (1 + eps * g.square().mean(0) / variance)
        error = (x.abs() * rounding / x.clamp(-300, 300).cosh().square()).clamp(max=1)
        error = error.nan_to_num(nan=1e-16).where(x.abs() < 300, 1e-16)
        largest = torch.finfo(torch.float32 if eps > 1e-10 else torch.float64).max
        error[g.abs().amax(0) > largest**0.5 / 100] = inf
    mask = smooth_mask_of(rule, g)
    bound = error * g.mean(0).abs() + mask * of_mean(rule, g, eps)
    if rule.rescale and mask.numel():
        bound = bound + mask * g.mean(0).abs() * error.mean() * factor_of(rule, g)
    return bound


def of_sign_dropout(rule: am.rules.Rule, g: Tensor, eps: float) -> Tensor:
    return 8 * eps * g.abs().sum(0)


def of_agreement_random(rule: am.rules.Rule, g: Tensor, eps: float) -> Tensor:
    total = g.abs().sum(0)
    kept = reference.agreement_mask(g, 1.0) == 1
    size = total[kept].mean() if kept.any() else torch.zeros(())
    return 8 * eps * (total + 6 * size)


# ---- the table ----


@dataclass(frozen=True)
class Row:
    draw: Callable[[int], st.SearchStrategy[am.rules.Rule]]  # for so many environments
    twin: Callable[..., Tensor]
    bound: Bound
    streamable: bool
    masks: bool = False  # has `rescale`
    random: bool = False
    least: int = 1  # environments
    odd: bool = True  # rule(-grads) == -rule(grads)


def sand_mask(voting: dict[str, Any], k: float, rescale: bool) -> am.rules.SandMask:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tau = 1
        return am.rules.SandMask(k=k, rescale=rescale, **voting)


def sand_masks(environments: int) -> st.SearchStrategy[am.rules.Rule]:
    k = st.sampled_from([0.1, 1.0, 10.0])
    return st.builds(sand_mask, votings(environments), k, st.booleans())


def voting(rule: Callable[..., am.rules.Rule]) -> Callable[[int], st.SearchStrategy[am.rules.Rule]]:
    return lambda environments: votings(environments).map(lambda test: rule(**test))


def with_rescale(
    rule: Callable[..., am.rules.Rule],
) -> Callable[[int], st.SearchStrategy[am.rules.Rule]]:
    return lambda environments: st.builds(
        lambda test, rescale: rule(rescale=rescale, **test), votings(environments), st.booleans()
    )


def plain(rule: type[am.rules.Rule]) -> Callable[[int], st.SearchStrategy[am.rules.Rule]]:
    return lambda environments: st.builds(rule)


def trimmed_means(environments: int) -> st.SearchStrategy[am.rules.Rule]:
    return st.builds(am.rules.TrimmedMean, st.integers(0, (environments - 1) // 2))


def winsorized_means(environments: int) -> st.SearchStrategy[am.rules.Rule]:
    c = st.one_of(st.sampled_from([0.0, 10.0, 25.0, 50.0]), st.floats(0, 50))
    return st.builds(am.rules.WinsorizedMean, c)


# fmt: off
TABLE: dict[type[am.rules.Rule], Row] = {
    am.rules.Mean: Row(plain(am.rules.Mean), reference.mean, of_mean, True),
    am.AndMask: Row(with_rescale(am.AndMask), reference.and_mask, of_mean, True, masks=True),
    am.rules.GeometricMean: Row(
        with_rescale(am.rules.GeometricMean), reference.geometric_mean, of_logs, True, masks=True),
    am.rules.SandMask: Row(sand_masks, reference.sand_mask, of_sand_mask, True, masks=True),
    am.rules.MaskedAverage: Row(
        voting(am.rules.MaskedAverage), reference.masked_average, of_mean, True),
    am.rules.AgreementSum: Row(plain(am.rules.AgreementSum), reference.agreement_sum, of_sum, True),
    am.rules.Median: Row(plain(am.rules.Median), reference.median, of_median, False),
    am.rules.MedianOfThree: Row(
        plain(am.rules.MedianOfThree), reference.median_of_three, of_groups, False, least=3),
    am.rules.TrimmedMean: Row(trimmed_means, reference.trimmed_mean, of_trimmed_mean, False),
    am.rules.WinsorizedMean: Row(
        winsorized_means, reference.winsorized_mean, of_winsorized_mean, False),
    am.rules.FedILC: Row(voting(am.rules.FedILC), reference.fed_ilc, of_fed_ilc, False),
    am.rules.SignDropout: Row(
        plain(am.rules.SignDropout), reference.sign_dropout, of_sign_dropout, False, random=True,
        odd=False),
    am.rules.AgreementRandom: Row(
        plain(am.rules.AgreementRandom), reference.agreement_random, of_agreement_random, False,
        random=True, odd=False),
}
# fmt: on


def examples() -> list[am.rules.Rule]:
    """One rule of each class, with arguments that fit five environments or more."""
    return [
        am.rules.Mean(),
        am.AndMask(0.6, True),
        am.rules.GeometricMean(0.6, True),
        am.rules.SandMask(0.3, 2.0),
        am.rules.MaskedAverage(0.6),
        am.rules.AgreementSum(),
        am.rules.Median(),
        am.rules.MedianOfThree(),
        am.rules.TrimmedMean(2),
        am.rules.WinsorizedMean(20.0),
        am.rules.FedILC(0.4),
        am.AndMask(fdr=0.2),
        am.AndMask(significance=0.3, rescale=True, zeros="abstain"),
        am.rules.GeometricMean(significance=0.2, zeros="abstain"),
        am.rules.SignDropout(),
        am.rules.AgreementRandom(),
    ]


def reference_of(rule: am.rules.Rule, grads: Tensor, seed: int = 0) -> Tensor:
    """What the reference makes of ``grads``, with the noise that the rule draws after ``seed``."""
    row = TABLE[type(rule)]
    test = options_of(rule)
    arguments: list[object] = list(rule.arguments)
    if test:
        arguments = [test.pop("tau", None)]
        if isinstance(rule, am.rules.SandMask):
            arguments.append(rule.k)
    if row.masks:
        arguments.append(rule.rescale)
    if row.random:
        torch.manual_seed(seed)
        arguments.append(rule._noise(grads))
    return row.twin(grads, *arguments, **test)


def factor_of(rule: am.rules.Rule, grads: Tensor) -> float:
    """What ``rescale`` multiplies with; 1 without it."""
    if not rule.rescale or not grads[0].numel():
        return 1.0
    if isinstance(rule, am.rules.SandMask):
        finite = grads.double().where(grads.isfinite().all(0), 0.0)
        mask = smooth_mask_of(rule, finite)
    else:
        mask = reference.agreement_mask(grads, **options_of(rule))
    return 1 / (1e-10 + float(mask.mean()))


def assert_matches_reference(rule: am.rules.Rule, grads: Tensor, seed: int = 0) -> Tensor:
    """Call the rule and compare with its twin; return what it gave."""
    row = TABLE[type(rule)]
    torch.manual_seed(seed)
    out = rule(grads)
    assert out.dtype == grads.dtype
    assert out.shape == grads.shape[1:]
    assert out.device == grads.device
    assert out.is_contiguous()
    expected = reference_of(rule, grads, seed)
    g = grads.double()
    hidden = ~g.isfinite().all(0)
    assert not out[hidden].isfinite().any(), "a non-finite value was hidden"

    info = torch.finfo(grads.dtype)
    wide = torch.finfo(torch.float64 if grads.dtype == torch.float64 else torch.float32)
    clean = g.where(~hidden, 0.0)
    bound = row.bound(rule, clean, wide.eps)
    factor = factor_of(rule, grads)
    bound = bound * factor
    # Out of range of the sums, or of the result: infinity (NaN under a mask) is right.
    overflows = ~(clean.abs().sum(0) < wide.max * 0.99) | ~(expected.abs() < info.max * 0.999)
    overflows |= ~(bound < inf)
    tiny = 8 * max(info.smallest_normal * info.eps, wide.smallest_normal * wide.eps * factor)
    check = ~hidden & ~overflows
    error = (out.double() - expected).abs()[check]
    limit = (bound + info.eps * expected.abs() + tiny)[check]
    assert (error <= limit).all(), (error - limit).max()
    return out
