"""The command ``threshold``: which runs there are, and what they come to."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..label_noise.training import NoiseSettings
from ..label_noise.training import train as train_digits
from ..records import RunFiles
from ..spirals import Settings as SpiralsSettings
from ..spirals.training import train as train_spirals
from ..study import Finished, Outcome, Report, Run, Settings, Study
from ..summary import Summary
from . import results
from .criteria import CriterionSettings
from .settings import PARTS, PLANS


class Thresholds(Study[Settings]):
    """Thresholds that set themselves, beside fixed ones."""

    name = "threshold"
    title = "A threshold that sets itself"
    about = (
        "Set the threshold of the AND-mask by a false discovery rate or by a level of "
        "significance, beside a fixed tau: on spirals with shortcuts (few strong environments, "
        "which come again at every step) and on wrong labels (each example is an environment, and "
        "drawn afresh). Part environments: 4 to 256 of them. Part criteria: others, on both tasks."
    )
    reference = (
        "Benjamini and Hochberg, Controlling the false discovery rate, 1995; Parascandolo et al., "
        "ICLR 2021, sections 4.1 and 4.2, for the tasks"
    )
    packages = (*Study.packages, "scikit-learn")
    seeds = (0, 1, 2)

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the choice of parts."""
        parser.add_argument(
            "--part",
            nargs="+",
            choices=PARTS,
            default=list(PARTS),
            metavar="PART",
            help=f"some of {', '.join(PARTS)} (default: all)",
        )
        parser.add_argument(
            "--size",
            nargs="+",
            metavar="SIZE",
            choices=("short", "narrow", "paper"),
            help="of part spirals: short (400 steps), narrow (half the width) or paper (default: "
            "all)",
        )

    def plan(self, options: argparse.Namespace) -> Sequence[Run[Settings]]:
        """Turn options into runs; what several parts ask for is run once."""
        if options.size and (options.quick or "spirals" not in options.part):
            raise ValueError(
                f"size: expected none without part spirals or with --quick, got {options.size}"
            )
        runs: dict[tuple[str, int], Run[Settings]] = {}
        for part in dict.fromkeys(options.part):
            for run in PLANS[part](options.quick, options.seeds):
                if part == "spirals" and options.size and run.label.split()[1] not in options.size:
                    continue
                runs.setdefault((run.label, run.seed), run)
        return list(runs.values())

    def execute(self, settings: Settings, seed: int, files: RunFiles, report: Report) -> Outcome:
        """Train one network."""
        mask = None
        if isinstance(settings, CriterionSettings):
            mask, settings = settings.mask(), settings.task
        if isinstance(settings, SpiralsSettings):
            outcome = train_spirals(settings, seed, files, report, mask)
            return Outcome(outcome.results)
        assert isinstance(settings, NoiseSettings)
        return train_digits(settings, seed, files, report, mask)

    def summary_name(self, options: argparse.Namespace) -> str:
        """Return the study's name, and that of its parts if they are not all."""
        parts = [part for part in PARTS if part in options.part]
        return self.name if len(parts) == len(PARTS) else "-".join([self.name, *parts])

    def present(
        self, finished: Sequence[Finished[Settings]], folder: Path, options: argparse.Namespace
    ) -> Summary:
        """Say what the runs come to, and draw it."""
        return results.present(finished, folder, self.summary_name(options), options.quick)


main = Thresholds().main
