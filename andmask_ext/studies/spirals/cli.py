"""``python -m andmask_ext spirals``: train, keep records, draw."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm import tqdm

from ..records import RunFiles
from . import figures
from .options import build_parser, plan, unique
from .settings import Settings
from .training import History, train

# Raise this when data or training change, so that older records are not taken for new ones.
REVISION = 1
SECONDS_BETWEEN_LINES = 5.0


def main(arguments: Sequence[str], prog: str = "python -m andmask_ext spirals") -> int:
    """Run the study.

    Args:
        arguments: the command line after ``spirals``.
        prog: how the command was called.

    Returns:
        The exit status: 0, or 130 when interrupted. Wrong arguments exit with 2.
    """
    parser = build_parser(prog)
    options = parser.parse_args(arguments)
    try:
        todo = list(plan(options))
        options.output.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"output: expected a folder that can be written, got {error}")
    torch.set_num_threads(options.threads)
    try:
        if options.draw_data:
            path = options.output / "data.png"
            figures.draw_data(unique(s.data_config() for s, _ in todo), todo[0][1], path)
            print(f"figure  {path}")
            return 0
        runs = [
            execute(settings, seed, options, f"[{number}/{len(todo)}]")
            for number, (settings, seed) in enumerate(todo, start=1)
        ]
        print(summary(runs))
        for path in draw(runs, options.output):
            print(f"figure  {path}")
    except KeyboardInterrupt:
        print(
            f"\ninterrupted: finished runs and a checkpoint are in {options.output}; "
            "the same command goes on from there",
            file=sys.stderr,
        )
        return 130
    return 0


def label(settings: Settings) -> str:
    """Name a run's place in the grid, for people."""
    rule = f"and-mask tau={settings.tau:g}" if settings.method == "and-mask" else "mean"
    return f"{rule} revolutions={settings.revolutions:g}"


def execute(settings: Settings, seed: int, options: argparse.Namespace, place: str) -> figures.Run:
    """Do one run, or go on with it, or read that it was done.

    Args:
        settings: its settings.
        seed: its seed.
        options: gives output folder and threads.
        place: shown at the start of its lines, such as ``[2/6]``.

    Returns:
        The finished run.
    """
    identity = {
        "study": "spirals",
        "revision": REVISION,
        "settings": settings.identity(),
        "seed": seed,
        "threads": options.threads,
        "versions": {name: version(name) for name in ("andmask_ext", "torch", "numpy")},
    }
    name = f"{label(settings)} seed={seed}".replace(" ", "_").replace("=", "")
    files = RunFiles(options.output, name, identity)
    title = f"{place} {label(settings)} seed={seed}"
    record = files.read_record()
    if record is None:
        with Progress(title, settings.epochs) as progress:
            record = train(settings, seed, files, progress)
    else:
        print(f"{title}  done before")
    final = record["final"]
    print(
        f"{title}  train {100 * final['train_accuracy']:.1f} %  "
        f"test {100 * final['test_accuracy']:.1f} %  {record['seconds']:.0f} s"
    )
    vote = record["largest_shortcut_vote"]
    if settings.method == "and-mask" and vote >= settings.tau * settings.environments - 1e-6:
        print(
            f"{title}  note: by chance the environments agree, with {vote} net votes of "
            f"{settings.environments}, on the sign of a shortcut dimension; the mask lets it pass"
        )
    return figures.Run(settings, seed, record, files.read_weights())


@dataclass
class Progress:
    """Progress of one run: a bar in a terminal, a line now and then elsewhere."""

    title: str
    epochs: int

    def __enter__(self) -> Progress:
        self.first: int | None = None
        self.started = self.told = time.perf_counter()
        self.bar = (
            tqdm(total=self.epochs, desc=self.title, unit="epoch", leave=False)
            if sys.stderr.isatty()
            else None
        )
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, epoch: int, history: History) -> None:
        """Tell that an epoch is finished."""
        now = time.perf_counter()
        if self.first is None:
            self.first = epoch - 1
            if self.first:
                self.say(f"goes on after epoch {self.first}")
        scores = (
            f"train {100 * history.train_accuracy[-1]:.1f} %  "
            f"test {100 * history.test_accuracy[-1]:.1f} %"
        )
        if self.bar is not None:
            self.bar.set_postfix_str(scores, refresh=False)
            self.bar.update(epoch - self.bar.n)
        elif now - self.told >= SECONDS_BETWEEN_LINES and epoch < self.epochs:
            self.told = now
            left = (now - self.started) / (epoch - self.first) * (self.epochs - epoch)
            self.say(f"epoch {epoch}/{self.epochs}  {scores}  {left:.0f} s left")

    def say(self, text: str) -> None:
        """Print a line about the run, above its bar if it has one."""
        line = f"{self.title}  {text}"
        if self.bar is None:
            print(line, flush=True)
        else:
            self.bar.write(line)


def summary(runs: Sequence[figures.Run]) -> str:
    """Write a table of final accuracies, mean and standard deviation over seeds.

    Args:
        runs: finished runs.

    Returns:
        The table, one row for each combination of method, tau and revolutions.
    """
    rows = [("method", "seeds", "train %", "test %", "s per run")]
    for settings in unique(run.settings for run in runs):
        own = [run.record for run in runs if run.settings == settings]
        train_, test = (
            _spread([100 * record["final"][which] for record in own])
            for which in ("train_accuracy", "test_accuracy")
        )
        seconds = statistics.mean(record["seconds"] for record in own)
        rows.append((label(settings), str(len(own)), train_, test, f"{seconds:.0f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        row[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return "\n".join(["", lines[0], "-" * len(lines[0]), *lines[1:], ""])


def _spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f}"


def draw(runs: Sequence[figures.Run], folder: Path) -> list[Path]:
    """Draw what the runs show: a map with several tau, else curves for each number of revolutions.

    Args:
        runs: finished runs.
        folder: where the figures go.

    Returns:
        The files written.
    """
    if len({run.settings.tau for run in runs if run.settings.method == "and-mask"}) > 1:
        figures.draw_map(runs, folder / "map.png")
        return [folder / "map.png"]
    paths = []
    for revolutions in unique(run.settings.revolutions for run in runs):
        paths.append(folder / f"revolutions{revolutions:g}.png")
        figures.draw_curves([r for r in runs if r.settings.revolutions == revolutions], paths[-1])
    return paths
