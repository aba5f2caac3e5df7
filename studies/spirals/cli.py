"""``python -m studies spirals``: the study, in three parts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..records import RunFiles
from ..study import Finished, Outcome, Report, Run, Study
from ..summary import Summary
from . import figures, options
from .compare import Compare
from .environments import Environments
from .parts import Part
from .search import Search
from .settings import Settings
from .training import train

PARTS: dict[str, Part] = {
    "compare": Compare(),
    "search": Search(),
    "environments": Environments(),
}


class Spirals(Study[Settings]):
    """Synthetic memorization."""

    name = "spirals"
    title = "Spirals with shortcuts"
    about = (
        "Train a network on spirals with shortcuts, by the AND-mask, in the ordinary way and by "
        "other methods. Several values for --method, --tau, --revolutions and --seeds mean every "
        "combination of them; with several --tau the figure is a map."
    )
    reference = "Parascandolo et al., ICLR 2021, section 4.1 and appendix"
    revision = 2
    seeds = (0, 1, 2)

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the study's options."""
        options.add_options(parser, list(PARTS))

    def plan(self, chosen: argparse.Namespace) -> Sequence[Run[Settings]]:
        """Turn options into runs."""
        if chosen.trials is not None and (chosen.part != "search" or chosen.trials < 1):
            raise ValueError(
                "trials: expected at least 1, and --part search, "
                f"got {chosen.trials} and {chosen.part}"
            )
        return PARTS[chosen.part].plan(chosen)

    def prepare(self, chosen: argparse.Namespace) -> bool:
        """Draw the data set, if that is all."""
        if chosen.draw_data:
            runs = self.plan(chosen)
            configs = list(dict.fromkeys(run.settings.data_config() for run in runs))
            path = figures.draw_data(configs, runs[0].seed, chosen.output / "data.png")
            print(f"figure  {path}")
        return not chosen.draw_data

    def execute(self, settings: Settings, seed: int, files: RunFiles, report: Report) -> Outcome:
        """Train one network."""
        return train(settings, seed, files, report)

    def follow_up(
        self, finished: Sequence[Finished[Settings]], chosen: argparse.Namespace
    ) -> Sequence[Run[Settings]]:
        """Return the best of a search again."""
        return PARTS[chosen.part].follow_up(finished, chosen)

    def present(
        self, finished: Sequence[Finished[Settings]], folder: Path, chosen: argparse.Namespace
    ) -> Summary:
        """Say what the runs come to."""
        return PARTS[chosen.part].present(finished, folder, self.summary_name(chosen))

    def summary_name(self, chosen: argparse.Namespace) -> str:
        """Return ``spirals``, and what makes it another question."""
        words = [self.name]
        if chosen.part != "compare":
            words.append(chosen.part)
        elif chosen.tau and len(set(chosen.tau)) > 1:
            words.append("map")
        if chosen.setting != "paper":
            words.append(chosen.setting)
        return "-".join(words)

    def describe(self, finished: Finished[Settings]) -> str:
        """Say how a run ended."""
        final = finished.record["final"]
        return (
            f"train {100 * final['train_accuracy']:.1f} %  "
            f"test {100 * final['test_accuracy']:.1f} %"
        )


main = Spirals().main
