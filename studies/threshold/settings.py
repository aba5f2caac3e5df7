"""The runs of each part of the study."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from ..label_noise.training import NoiseSettings
from ..spirals import Settings as SpiralsSettings
from ..study import Run, Settings
from .criteria import CriterionSettings

Threshold: TypeAlias = dict[str, Any]  # arguments of a rule: one of tau, fdr, significance

PARTS = ("spirals", "environments", "label-noise", "criteria")
ENVIRONMENTS = 32

# The spirals of the paper, in three sizes. Mechanism dimensions are standardised, as in its code.
PAPER = SpiralsSettings(standardize=True, together=True)
SIZES: dict[str, SpiralsSettings] = {
    "short": replace(PAPER, width=128, examples=640, epochs=80),  # 400 steps
    "narrow": replace(PAPER, width=128),  # 940 steps
    "paper": PAPER,
}
QUICK_SPIRALS = replace(PAPER, width=96, epochs=12, revolutions=1.0)

TAUS = (0.6, 0.7, 0.8, 1.0)
RATES = (0.001, 0.003, 0.005, 0.01, 0.05)
LEVELS = (1e-6, 1e-3, 0.05)  # with 32 environments tau is 0.84, 0.59 and 0.41
REVOLUTIONS = (1.0, 2.0, 3.0)
NUMBERS = (4, 8, 16, 32, 64, 128, 256)

DEFAULT_RATE = 0.005
STRICT: Threshold = {"significance": 1e-5}  # with 32 environments it is tau = 0.8
TWO: tuple[Threshold, ...] = ({"fdr": DEFAULT_RATE}, {"tau": 0.8})
QUICK_SPIRALS_TRIED: tuple[Threshold, ...] = (*TWO, {"significance": 1e-3})
ALL: tuple[Threshold, ...] = (
    *({"fdr": rate} for rate in RATES),
    *({"significance": level} for level in LEVELS),
    *({"tau": tau} for tau in TAUS),
)
# With one or two revolutions most settings do well: fewer are enough.
SOME: tuple[Threshold, ...] = (
    {"fdr": 0.001}, {"fdr": DEFAULT_RATE}, {"fdr": 0.05}, {"tau": 0.6}, {"tau": 0.8},
)  # fmt: skip

# Digits with wrong labels; every example is an environment.
DIGITS = NoiseSettings(labels="noisy", epochs=36)
QUICK_DIGITS = replace(DIGITS, size=8, epochs=24, examples=400, lr=1e-3)
BATCHES = (40, 80, 160, 320)
NOISY: tuple[Threshold, ...] = (
    {"tau": 0.1}, {"tau": 0.2},
    {"significance": 0.01}, {"significance": 0.05},
    {"fdr": DEFAULT_RATE}, {"fdr": 0.05}, {"fdr": 0.5},
)  # fmt: skip
QUICK_NOISY: tuple[Threshold, ...] = (
    {"tau": 0.2}, {"significance": 0.05}, {"fdr": DEFAULT_RATE},
)  # fmt: skip
ABSTAINING: tuple[Threshold, ...] = ({"significance": 0.05}, {"fdr": 0.05})
# What a user would try first; stopping early is plain Adam's best epoch.
SMOOTHING, SLOW = 0.1, 0.2

CRITERIA: tuple[tuple[str, float], ...] = (
    ("fdr of the model", DEFAULT_RATE),
    ("fdr of a row", DEFAULT_RATE),
    ("false count", 0.1),
    ("false count", 1.0),
    ("fdr of energy", DEFAULT_RATE),
    ("accumulated votes", DEFAULT_RATE),
)


def name(threshold: Threshold) -> str:
    """Name a threshold: ``fdr=0.005``."""
    return " ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in threshold.items()
    )


def spirals(quick: bool, seeds: Sequence[int]) -> list[Run[Settings]]:
    """Thresholds side by side, in three sizes, with one to three revolutions."""
    runs: list[Run[Settings]] = []
    if quick:
        for threshold in QUICK_SPIRALS_TRIED:
            runs += _runs("quick", replace(QUICK_SPIRALS, **threshold), threshold, seeds)
        return runs
    for size, base in SIZES.items():
        for revolutions in REVOLUTIONS:
            if size == "narrow" and revolutions != REVOLUTIONS[-1]:
                continue
            for threshold in ALL if revolutions == REVOLUTIONS[-1] else SOME:
                one = replace(base, revolutions=revolutions, **threshold)
                runs += _runs(size, one, threshold, seeds)
            if revolutions == REVOLUTIONS[-1]:
                runs += _variants(size, base, seeds)
    return runs


def _variants(size: str, base: SpiralsSettings, seeds: Sequence[int]) -> list[Run[Settings]]:
    """The geometric mean, and the mask without rescaling."""
    runs = []
    for threshold in TWO:
        for method, rescale in (("geometric-mean", True), ("and-mask", False)):
            one = replace(base, method=method, rescale=rescale, **threshold)
            runs += _runs(size, one, threshold, seeds)
    return runs


def environments(quick: bool, seeds: Sequence[int]) -> list[Run[Settings]]:
    """One rate, one level and one tau, over the number of environments."""
    base = QUICK_SPIRALS if quick else replace(SIZES["short"], revolutions=1.0)
    return [
        run
        for number in ((8, ENVIRONMENTS) if quick else NUMBERS)
        for threshold in (*TWO, STRICT)
        for run in _runs(
            "quick" if quick else "short",
            replace(base, environments=number, **threshold),
            threshold,
            seeds,
        )
    ]


def _runs(
    size: str, settings: SpiralsSettings, threshold: Threshold, seeds: Sequence[int]
) -> list[Run[Settings]]:
    words = ["spirals", size, f"revolutions={settings.revolutions:g}"]
    if settings.environments != ENVIRONMENTS:
        words.append(f"environments={settings.environments}")
    if settings.method != "and-mask":
        words.append(settings.method)
    if not settings.rescale:
        words.append("rescale=no")
    return [Run(" ".join([*words, name(threshold)]), settings, seed) for seed in seeds]


def label_noise(quick: bool, seeds: Sequence[int]) -> list[Run[Settings]]:
    """Thresholds and what a user would try first, over the size of the batch."""
    base = QUICK_DIGITS if quick else DIGITS
    runs: list[Run[Settings]] = []
    thresholds = QUICK_NOISY if quick else NOISY
    for batch in (40, 80) if quick else BATCHES:
        of_batch = replace(base, batch=batch)
        tried = [("Adam", of_batch)]
        if not quick:
            tried += [
                ("smoothing", replace(of_batch, smoothing=SMOOTHING)),
                ("slow", replace(of_batch, lr=SLOW * base.lr)),
            ]
        tried += [(name(threshold), replace(of_batch, **threshold)) for threshold in thresholds]
        if not quick:
            for threshold in ABSTAINING:
                abstain = {**threshold, "zeros": "abstain"}
                tried.append((name(abstain), replace(of_batch, **abstain)))
        runs += [
            Run(f"digits batch={batch} {method}", one, seed)
            for method, one in tried
            for seed in seeds
        ]
    return runs


def criteria(quick: bool, seeds: Sequence[int]) -> list[Run[Settings]]:
    """Every criterion on both tasks; those of the library are in the other parts."""
    tasks: dict[str, SpiralsSettings | NoiseSettings] = (
        {"spirals quick": QUICK_SPIRALS, "digits": replace(QUICK_DIGITS, batch=80)}
        if quick
        else {"spirals narrow": SIZES["narrow"], "digits": DIGITS}
    )
    chosen: Iterable[tuple[str, float]] = CRITERIA[:1] if quick else CRITERIA
    return [
        Run(f"{which} {criterion} {level:g}", CriterionSettings(criterion, level, task), seed)
        for criterion, level in chosen
        for which, task in tasks.items()
        for seed in seeds
    ]


PLANS = {
    "spirals": spirals,
    "environments": environments,
    "label-noise": label_noise,
    "criteria": criteria,
}
