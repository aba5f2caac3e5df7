"""What finished runs come to: claims, tables and figures of each part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..figures import Array
from ..study import Finished
from ..summary import Claim, Picture, Summary, Table, spread
from .figures import draw_label_noise, draw_random_labels
from .training import NoiseSettings

MEMORISED = 0.9  # accuracy from which on labels count as learned
STOPPED = 0.3  # accuracy up to which random labels count as not memorised
PAPER = 0.2  # the threshold of the paper's experiment with noisy labels
SMALL = 0.4  # thresholds up to here are small
NEAR_CHANCE = 1.5  # times chance
STEADY = 0.02  # accuracy lost after the peak that still counts as none
LEARNED = 0.5  # test accuracy that a network has at its peak if it has learned anything
WINDOW = 3  # epochs that peaks and ends are means of, as single epochs are noisy
CLASSES = 10  # of both data sets
NORMS = {"group": "group norm", "batch": "batch norm"}

Done = Sequence[Finished[NoiseSettings]]


def series(done: Done, name: str) -> Array:
    """Return a quantity ``[seeds, epochs]`` of runs that differ in their seeds."""
    return np.array([one.record["history"][name] for one in done], dtype=float)


def smoothed(values: Array) -> Array:
    """Return the mean of each epoch and those before it, as many as a peak is the mean of."""
    window = min(WINDOW, values.shape[1])
    windows: Array = np.lib.stride_tricks.sliding_window_view(values, window, axis=1)
    return np.asarray(windows.mean(-1))


def fall(values: Array) -> Array:
    """Return how far each seed's accuracy lies below its peak at the end, both over some epochs."""
    smooth = smoothed(values)
    return np.asarray(smooth.max(1) - smooth[:, -1])


def notes(settings: NoiseSettings, quick: bool) -> list[str]:
    """Return what a reader must know."""
    found = []
    if settings.data == "digits":
        found.append(
            "Data: scikit-learn's digits, in place of the paper's CIFAR-10: 1440 to train on (or "
            f"fewer: --examples) and 357 to test on, scaled to sides of {settings.size}; a "
            f"network of width {settings.width} in place of 64. Sized for two cores."
        )
    if quick:
        found.append(
            "The short version has few images, which are memorised more easily; its threshold and "
            "learning rate were chosen on seed 0 so that the effect shows in seconds."
        )
    found.append(
        "Batch norm: with Adam over the batch, as usual; with the mask every image is an "
        "environment, and the statistics are over its positions only. Both are tested with running "
        "statistics."
    )
    return found


def present_random_labels(done: Done, picture: Path, summary: Summary) -> None:
    """Add what runs with true and with random labels come to."""
    taus = sorted({one.run.settings.tau or 0.0 for one in done})
    groups = {
        labels: {
            tau: [
                one
                for one in done
                if (one.run.settings.labels, one.run.settings.tau) == (labels, tau)
            ]
            for tau in taus
        }
        for labels in ("true", "random")
    }
    train = {
        labels: {tau: series(runs, "train") for tau, runs in of.items()}
        for labels, of in groups.items()
    }
    final = {
        labels: {tau: float(values[:, -1].mean()) for tau, values in of.items()}
        for labels, of in train.items()
    }
    if 0.0 in taus:
        plain = final["random"][0.0]
        summary.claims.append(
            Claim(
                "without a mask (tau=0) the network memorises random labels",
                plain >= MEMORISED,
                f"{plain:.1%} of them after the last epoch",
            )
        )
    small = [tau for tau in taus if 0 < tau <= SMALL]
    good = [
        tau for tau in small if final["random"][tau] <= STOPPED and final["true"][tau] >= MEMORISED
    ]
    if small:
        summary.claims.append(
            Claim(
                f"some small threshold (up to {SMALL:g}) stops the memorisation of random labels "
                f"(at most {STOPPED:.0%}) while true ones are learned (at least {MEMORISED:.0%})",
                bool(good),
                "; ".join(
                    f"tau={tau:g}: {final['random'][tau]:.1%} of random labels, "
                    f"{final['true'][tau]:.1%} of true ones"
                    for tau in small
                ),
            )
        )
    rows = []
    for tau in taus:
        true, random = groups["true"][tau], groups["random"][tau]
        rows.append((
            f"{tau:g}",
            *(_percent(series(runs, name)[:, -1]) for runs, name in (
                (true, "train"), (true, "test"), (random, "train"),
                (true, "kept"), (random, "kept"),
            )),
        ))  # fmt: skip
    summary.tables.append(
        Table(
            "true and random labels, after the last epoch, % (± over seeds)",
            (
                "tau",
                "true: training",
                "true: test",
                "random: training",
                "true: kept",
                "random: kept",
            ),
            rows,
        )
    )
    summary.pictures.append(
        Picture(
            draw_random_labels(train, 1 / CLASSES, picture),
            "Training accuracy with true labels (left) and with random ones (middle) for each "
            "threshold, and after the last epoch (right). Dotted: guessing.",
        )
    )


def present_label_noise(done: Done, picture: Path, summary: Summary) -> None:
    """Add what runs with noisy labels come to."""
    grid: dict[str, dict[str, list[Finished[NoiseSettings]]]] = {}
    for one in done:
        settings = one.run.settings
        methods = grid.setdefault(NORMS[settings.norm], {})
        methods.setdefault(settings.method, []).append(one)
    taus = sorted({one.run.settings.tau for one in done if one.run.settings.tau})
    tau = PAPER if PAPER in taus or not taus else taus[0]
    rows = []
    for norm, methods in grid.items():
        for method, runs in methods.items():
            test = series(runs, "test")
            rows.append(
                (
                    norm,
                    method,
                    _percent(series(runs, "mislabeled")[:, -1]),
                    _percent(series(runs, "recovered")[:, -1]),
                    _percent(smoothed(test).max(1)),
                    _percent(smoothed(test)[:, -1]),
                    _percent(series(runs, "kept")[:, -1]),
                )
            )
        summary.claims += _claims(norm, methods, tau)
    summary.tables.append(
        Table(
            "wrong labels, % (± over seeds)",
            (
                "norm",
                "method",
                "wrong labels reproduced",
                "their true ones found",
                "test: peak",
                "test: end",
                "kept",
            ),
            rows,
        )
    )
    summary.pictures.append(
        Picture(
            draw_label_noise(
                {
                    norm: {
                        method: (series(runs, "mislabeled"), series(runs, "test"))
                        for method, runs in methods.items()
                    }
                    for norm, methods in grid.items()
                },
                1 / CLASSES,
                picture,
            ),
            "Left: share of the mislabeled images on which the network says the wrong label that "
            "it was given; dotted: guessing. Right: accuracy on test images, from 50 % on. Lines: "
            "mean, bands: all seeds.",
        )
    )


def _claims(
    norm: str, methods: dict[str, list[Finished[NoiseSettings]]], tau: float
) -> list[Claim]:
    """Return what the paper says of both methods, and whether it is so."""
    plain, masked = methods.get("Adam"), methods.get(NoiseSettings(tau=tau).method)
    claims = []
    if plain:
        memorised = series(plain, "mislabeled")[:, -1]
        lost = fall(series(plain, "test"))
        claims += [
            Claim(
                f"{norm}: Adam memorises wrong labels",
                bool(memorised.min() >= MEMORISED),
                f"{_percent(memorised)} % of them after the last epoch",
            ),
            Claim(
                f"{norm}: Adam's test accuracy falls after its peak",
                bool(lost.mean() > STEADY),
                f"by {_percent(lost)} points",
            ),
        ]
    if masked:
        memorised = smoothed(series(masked, "mislabeled")).max(1)
        lost = fall(series(masked, "test"))
        peak = smoothed(series(masked, "test")).max(1).min()
        learned = peak >= LEARNED
        reason = "" if learned else f"; it has not learned: test accuracy {peak:.1%} at its peak"
        claims += [
            Claim(
                f"{norm}: with tau={tau:g} wrong labels are reproduced no more often than by "
                f"chance, or hardly (up to {NEAR_CHANCE:g} times)",
                bool(learned and memorised.max() <= NEAR_CHANCE / CLASSES),
                f"at most {_percent(memorised)} % of them over any {WINDOW} epochs{reason}",
            ),
            Claim(
                f"{norm}: with tau={tau:g} test accuracy falls after its peak with no seed (up to "
                f"{100 * STEADY:g} points)",
                bool(learned and lost.max() <= STEADY),
                f"by {_percent(lost)} points{reason}",
            ),
        ]
    if plain and masked:
        ends = [smoothed(series(runs, "test"))[:, -1] for runs in (masked, plain)]
        claims.append(
            Claim(
                f"{norm}: with tau={tau:g} test accuracy ends above Adam's",
                bool(ends[0].min() > ends[1].max()),
                f"{_percent(ends[0])} % and {_percent(ends[1])} %",
            )
        )
    return claims


def _percent(shares: Array) -> str:
    return spread((100 * shares).tolist(), digits=1)
