"""The command ``label-noise``: which runs there are, and what they come to."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..records import RunFiles
from ..study import Finished, Outcome, Report, Run, Study
from ..summary import Summary
from .data import DATA
from .networks import NORMS
from .results import notes, present_label_noise, present_random_labels
from .training import NoiseSettings, train

PARTS = ("random-labels", "label-noise")
TAUS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)  # the paper's
QUICK_TAUS = (0.0, 0.3)  # fewer images are memorised more easily, and want a stricter vote
NOISY_TAUS = (0.1, 0.2, 0.4)

FEW = {"random-labels": 2, "batch": 1}  # of the default seeds, where seeds differ little

NOISE = 0.25

T = TypeVar("T")

# What the options are unless said otherwise: sized for two cores, for a test, and the paper's.
FULL: dict[str, Any] = {"width": 8, "size": 16, "epochs": 36, "lr": 5e-4}
QUICK: dict[str, Any] = {"width": 8, "size": 12, "epochs": 30, "examples": 400, "lr": 1e-3}
CIFAR10: dict[str, Any] = {"width": 64, "size": 32, "epochs": 80, "lr": 5e-4}


class LabelNoise(Study[NoiseSettings]):
    """Random labels, and labels of which a quarter are wrong."""

    name = "label-noise"
    title = "Random and noisy labels"
    about = (
        "Train a small residual network with every example an environment. Part random-labels: "
        "does it still learn true labels while the mask keeps it from memorising random ones? Part "
        "label-noise: a quarter of the labels are wrong; are they memorised, and does the accuracy "
        "on test images fall again? (Random labels take two of the default seeds, batch norm one.)"
    )
    reference = (
        "Parascandolo et al., Learning explanations that are hard to vary, ICLR 2021, section 4.2"
    )
    revision = 2
    packages = (*Study.packages, "scikit-learn")
    seeds = (0, 1, 2)

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the study's own options to the common ones."""
        which = parser.add_argument_group("this study")
        which.add_argument(
            "--part",
            nargs="+",
            choices=PARTS,
            default=list(PARTS),
            metavar="PART",
            help=f"{' or '.join(PARTS)} (default: both)",
        )
        which.add_argument(
            "--tau",
            nargs="+",
            type=float,
            help=f"thresholds (default: random-labels {_words(TAUS)}, label-noise "
            f"{_words(NOISY_TAUS)} beside Adam)",
        )
        which.add_argument(
            "--norm",
            nargs="+",
            choices=NORMS,
            metavar="NORM",
            help=f"of part label-noise: {' or '.join(NORMS)} (default: both)",
        )
        which.add_argument(
            "--noise",
            type=float,
            help=f"of part label-noise: share of wrong labels (default: {NOISE})",
        )
        which.add_argument(
            "--rescale",
            action="store_true",
            help="let the mask make up for the coordinates that it drops",
        )
        which.add_argument(
            "--data", choices=DATA, default="digits", help="digits come with scikit-learn (default)"
        )
        which.add_argument(
            "--data-dir", metavar="FOLDER", default="", help="holds cifar-10-batches-py"
        )
        which.add_argument(
            "--examples", type=int, metavar="N", help="the first N training images (default: all)"
        )
        which.add_argument(
            "--batch",
            type=int,
            default=80,
            metavar="N",
            help="images, and so environments, in a step (default: 80)",
        )
        sizes = ("width", "of the network"), ("size", "side of the images"), ("epochs", "of a run")
        for name, what in sizes:
            which.add_argument(
                f"--{name}",
                type=int,
                metavar="N",
                help=f"{what} (default: {FULL[name]}; cifar10: {CIFAR10[name]})",
            )
        which.add_argument("--lr", type=float, help=f"learning rate (default: {FULL['lr']:g})")

    def plan(self, options: argparse.Namespace) -> list[Run[NoiseSettings]]:
        """Turn options into runs."""
        if "label-noise" not in options.part:
            for name in ("norm", "noise"):
                if (value := getattr(options, name)) is not None:
                    shown = " ".join(value) if name == "norm" else value
                    raise ValueError(f"{name}: expected none without part label-noise, got {shown}")
        if options.data_dir and options.data == "digits":
            raise ValueError(f"data-dir: expected none with data digits, got {options.data_dir}")
        common = CIFAR10 if options.data == "cifar10" else FULL
        common = dict(common, **(QUICK if options.quick else {}))
        for name in ("width", "size", "epochs", "examples", "lr"):
            if getattr(options, name) is not None:
                common[name] = getattr(options, name)
        for name in ("data", "rescale", "batch"):
            common[name] = getattr(options, name)
        common["noise"] = NOISE if options.noise is None else options.noise
        common["folder"] = options.data_dir
        few = {
            part: options.seeds if options.seeds_given else options.seeds[:count]
            for part, count in FEW.items()
        }
        runs: list[Run[NoiseSettings]] = []

        def add(seeds: Sequence[int], **chosen: Any) -> None:
            one = NoiseSettings(**common, **chosen)
            label = f"{one.labels} {one.norm} {one.method}"
            runs.extend(Run(label, one, seed) for seed in seeds)

        if "random-labels" in options.part:
            for tau in _each(options.tau or (QUICK_TAUS if options.quick else TAUS)):
                for labels in ("true", "random"):
                    add(few["random-labels"], labels=labels, tau=tau)
        if "label-noise" in options.part:
            taus = _each(options.tau or (QUICK_TAUS[1:] if options.quick else NOISY_TAUS))
            for norm in _each(options.norm or (("group",) if options.quick else NORMS)):
                for method in (None, *taus):
                    add(
                        few["batch"] if norm == "batch" else options.seeds,
                        labels="noisy",
                        tau=method,
                        norm=norm,
                    )
        return runs

    def prepare(self, options: argparse.Namespace) -> bool:
        """Load the data once before anything is trained."""
        first = self.plan(options)[0]
        first.settings.load(first.seed)
        return True

    def execute(
        self, settings: NoiseSettings, seed: int, files: RunFiles, report: Report
    ) -> Outcome:
        """Train one network."""
        return train(settings, seed, files, report)

    def summary_name(self, options: argparse.Namespace) -> str:
        """Return the study's name, or that of its only part."""
        return self.name if len(set(options.part)) == 2 else f"{options.part[0]}-only"

    def present(
        self, finished: Sequence[Finished[NoiseSettings]], folder: Path, options: argparse.Namespace
    ) -> Summary:
        """Say what the runs come to, and draw it."""
        summary = Summary(notes=notes(finished[0].run.settings, options.quick))
        random = [one for one in finished if one.run.settings.labels != "noisy"]
        noisy = [one for one in finished if one.run.settings.labels == "noisy"]
        start = self.summary_name(options)  # a part alone leaves the figures of the whole alone
        if random:
            present_random_labels(random, folder / f"{start}-random.png", summary)
        if noisy:
            present_label_noise(noisy, folder / f"{start}-wrong.png", summary)
        return summary


def _words(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


def _each(values: Sequence[T]) -> list[T]:
    return list(dict.fromkeys(values))


main = LabelNoise().main
