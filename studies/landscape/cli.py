"""``python -m studies landscape``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..records import RunFiles
from ..study import Finished, Outcome, Report, Run, Settings, Study
from ..summary import Summary
from . import figures, parts
from .results import Results, summarise

EPSILONS, QUICK_EPSILONS = (0.001, 0.003, 0.01, 0.03, 0.1), (0.01,)
PATCH_EPSILONS, QUICK_PATCH_EPSILONS = (0.001, 0.003, 0.01), (0.003,)
PATCH_STEPS, QUICK_PATCH_STEPS = (10, 30, 100), (10, 30)


@dataclass(frozen=True)
class PartSettings(Settings):
    """One part of the study.

    Args:
        part: descents, minima, quadratics or patchwork.
        rule: of descents.
        starts: of descents.
        descent: steps of each.
        samples: how many of these are scored.
        epsilons: levels of scores.
        steps: of the search for the patchwork's score.
    """

    part: str
    rule: str = ""
    starts: int = 0
    descent: int = 0
    samples: int = 0
    epsilons: tuple[float, ...] = ()
    steps: tuple[int, ...] = ()


class Landscape(Study[PartSettings]):
    """Two environments and two parameters, so that one can see it all."""

    name = "landscape"
    title = "loss surfaces, where rules lead on them, and the patchwork solution"
    about = (
        "Descend from random starts on the losses of two environments that share one minimum and "
        "have another only after pooling; score both minima; compare the paper's bound with exact "
        "scores of quadratics; and score the paper's patchwork example by search."
    )
    reference = "sections 2.1 and 2.2, figures 1 and 3, appendix A.1"
    unit = "score"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add how many starts there are."""
        parser.add_argument(
            "--starts", type=int, help="of each rule and seed (default: 500; --quick: 100)"
        )
        parser.add_argument(
            "--samples",
            type=int,
            help="how many of the starts are scored for the invariant learning consistency "
            "(default: 8; --quick: 1)",
        )

    def plan(self, options: argparse.Namespace) -> list[Run[PartSettings]]:
        """Return descents of each rule, scores of the minima, quadratics and the patchwork."""
        quick = options.quick
        starts = (100 if quick else 500) if options.starts is None else options.starts
        samples = (1 if quick else 8) if options.samples is None else options.samples
        for name, value in (("starts", starts), ("samples", samples)):
            if not 1 <= value <= parts.SEEDS_APART:
                raise ValueError(f"{name}: expected 1 to {parts.SEEDS_APART}, got {value}")
        if samples > starts:
            raise ValueError(f"samples: expected at most the {starts} starts, got {samples}")
        chosen = [
            PartSettings("descents", rule, starts, 250 if quick else 400, samples)
            for rule in parts.RULES
        ]
        chosen += [
            PartSettings("minima", epsilons=QUICK_EPSILONS if quick else EPSILONS),
            PartSettings(
                "patchwork",
                epsilons=QUICK_PATCH_EPSILONS if quick else PATCH_EPSILONS,
                steps=QUICK_PATCH_STEPS if quick else PATCH_STEPS,
            ),
        ]
        runs = [
            Run(f"{one.part} {one.rule}".strip().replace(",", ""), one, seed)
            for one in chosen
            for seed in options.seeds
        ]
        return [*runs, Run("quadratics", PartSettings("quadratics"), options.seeds[0])]

    def execute(
        self, settings: PartSettings, seed: int, files: RunFiles, report: Report
    ) -> Outcome:
        """Do one part."""
        if settings.part == "descents":
            found = parts.descents(
                settings.rule, settings.starts, settings.descent, settings.samples, seed, report
            )
        elif settings.part == "minima":
            found = parts.minima(settings.epsilons, seed, report)
        elif settings.part == "patchwork":
            found = parts.patches(settings.epsilons, settings.steps, seed, report)
        else:
            found = parts.quadratics()
        return Outcome(found)

    def present(
        self,
        finished: Sequence[Finished[PartSettings]],
        folder: Path,
        options: argparse.Namespace,
    ) -> Summary:
        """Set minima, rules, bounds and searches beside each other, and draw them."""
        results = Results([(one.run.settings, one.record) for one in finished])
        summary = summarise(results)
        summary.pictures += [
            figures.draw_surfaces(folder),
            figures.draw_ends(results, folder),
            figures.draw_ellipses(results, folder),
            figures.draw_patchwork(results, folder),
        ]
        return summary


main = Landscape().main
