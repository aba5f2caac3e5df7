"""The command-line program that every study is: options, runs, progress, resuming, a summary.

A study says which runs there are (:meth:`Study.plan`), does one (:meth:`Study.execute`), and says
what they come to (:meth:`Study.present`). The rest stands here.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, ClassVar, Generic, TypeVar

import torch

import andmask_ext as am

from .progress import Progress
from .records import RunFiles
from .summary import Summary

Report = Callable[[int, int, str], None]
Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """What decides a run but its seed: a base for frozen dataclasses of numbers and words."""

    def identity(self) -> dict[str, Any]:
        """Return what decides the outcome, as JSON can hold it."""
        return asdict(self)


S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Run(Generic[S]):
    """One run to be done; the label distinguishes it for people and in its file's name."""

    label: str
    settings: S
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What a run found: its record, of which ``final`` is printed, and weights to keep."""

    results: Mapping[str, Any]
    weights: Weights | None = None


@dataclass(frozen=True)
class Finished(Generic[S]):
    """A run that is done; its files give the weights."""

    run: Run[S]
    record: Mapping[str, Any]
    files: RunFiles


class Study(ABC, Generic[S]):
    """A study; :meth:`main` is its command.

    Class attributes:
        name: its command.
        title: one line about it.
        about: what ``--help`` says.
        reference: where in the paper.
        revision: raised when data or training change, so that older records are not taken for
            new ones.
        unit: what progress counts.
        seeds, quick_seeds: unless ``--seeds`` says otherwise.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    about: ClassVar[str]
    reference: ClassVar[str]
    revision: ClassVar[int] = 1
    unit: ClassVar[str] = "epoch"
    packages: ClassVar[tuple[str, ...]] = ("andmask_ext", "torch", "numpy")
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2, 3, 4)
    quick_seeds: ClassVar[tuple[int, ...]] = (0,)

    @abstractmethod
    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the study's own options to the common ones."""

    @abstractmethod
    def plan(self, options: argparse.Namespace) -> Sequence[Run[S]]:
        """Turn options into runs, in the order in which they are done.

        Beside the study's own, options have ``quick``, ``output``, ``seeds``, and ``seeds_given``:
        whether these are not the defaults. Raise ValueError for options that cannot be meant.
        """

    @abstractmethod
    def execute(self, settings: S, seed: int, files: RunFiles, report: Report) -> Outcome:
        """Do one run, or go on from its checkpoint. May be called in a process of its own.

        ``report`` is called with how much is done, of how much, and a few words about it.
        """

    @abstractmethod
    def present(
        self, finished: Sequence[Finished[S]], folder: Path, options: argparse.Namespace
    ) -> Summary:
        """Say what the runs, those that followed up too, come to; draw it into the folder."""

    def follow_up(
        self, finished: Sequence[Finished[S]], options: argparse.Namespace
    ) -> Sequence[Run[S]]:
        """Return the runs that depend on what others found, such as the best of a search again."""
        return ()

    def prepare(self, options: argparse.Namespace) -> bool:
        """Do what comes before any run, such as making data. Return False to stop after it."""
        return True

    def summary_name(self, options: argparse.Namespace) -> str:
        """Return how the summary's file is called, if options make it another study."""
        return self.name

    def main(self, arguments: Sequence[str], prog: str | None = None) -> int:
        """Run the study: 0, 1 if a file cannot be read or written, or 130 when interrupted.

        Wrong arguments exit with 2.
        """
        prog = prog or f"python -m studies {self.name}"
        parser = self._parser(prog)
        options = parser.parse_args(arguments)
        if options.output is None:
            options.output = Path("runs") / (f"{self.name}-quick" if options.quick else self.name)
        options.seeds_given = options.seeds is not None
        if options.seeds is None:
            options.seeds = list(self.quick_seeds if options.quick else self.seeds)
        options.seeds = list(dict.fromkeys(options.seeds))
        try:
            for name in ("threads", "jobs"):
                if getattr(options, name) < 1:
                    raise ValueError(f"{name}: expected at least 1, got {getattr(options, name)}")
            for seed in options.seeds:
                if not 0 <= seed < 2**32:
                    raise ValueError(f"seeds: expected numbers >= 0 and < 2**32, got {seed}")
            runs = list(self.plan(options))
            options.output.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=options.output):  # before hours of work
                pass
        except ValueError as error:
            parser.error(str(error))
        except OSError as error:
            parser.error(f"output: expected a folder that can be written, got {error}")
        torch.set_num_threads(options.threads)
        try:
            try:
                if not self.prepare(options):
                    return 0
            except ValueError as error:
                parser.error(str(error))
            started = time.perf_counter()
            finished = self._execute_all(runs, options)
            finished += self._execute_all(self.follow_up(finished, options), options)
            summary = self.present(finished, options.output, options)
            print(f"\n{summary}\n")
            path = summary.write(
                options.output,
                self.summary_name(options),
                {
                    "study": self.name,
                    "title": self.title,
                    "about": self.about,
                    "reference": self.reference,
                    "command": shlex.join([*prog.split(), *arguments]),
                    "quick": options.quick,
                    "runs": len(finished),
                    "seeds": sorted({one.run.seed for one in finished}),
                    "seconds": sum(one.record["seconds"] for one in finished),
                    "cpus": os.cpu_count(),
                    "build": am.build_info(),
                },
            )
            spent = time.perf_counter() - started
            print(f"summary {path}  ({len(finished)} runs, {spent:.0f} s now)")
        except KeyboardInterrupt:
            print(
                f"\ninterrupted: finished runs and checkpoints are in {options.output}; "
                "the same command goes on from there",
                file=sys.stderr,
            )
            return 130
        except OSError as error:
            print(
                f"{prog}: stopped: {error}; finished runs and checkpoints are in {options.output}, "
                "the same command goes on from there",
                file=sys.stderr,
            )
            return 1
        return 0

    def _parser(self, prog: str) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(
            prog=prog,
            description=f"{self.about} What is finished is not run again, and what was interrupted "
            "goes on from its checkpoint.",
            epilog=f"Reference: {self.reference}.",
        )
        what = parser.add_argument_group("what to run, and where")
        what.add_argument(
            "--quick", action="store_true", help="a short version, done within two minutes"
        )
        what.add_argument(
            "--seeds",
            nargs="+",
            type=int,
            metavar="SEED",
            help=f"default: {_words(self.seeds)} (--quick: {_words(self.quick_seeds)})",
        )
        what.add_argument(
            "--output",
            type=Path,
            metavar="FOLDER",
            help=f"default: runs/{self.name} (--quick: runs/{self.name}-quick)",
        )
        what.add_argument(
            "--threads", type=int, default=1, metavar="N", help="of each run (default: 1)"
        )
        what.add_argument(
            "--jobs",
            type=int,
            default=1,
            metavar="N",
            help="runs at the same time, each in a process of its own (default: 1)",
        )
        self.add_options(parser)
        return parser

    def _files(self, run: Run[S], options: argparse.Namespace) -> RunFiles:
        identity = {
            "study": self.name,
            "revision": self.revision,
            "settings": run.settings.identity(),
            "seed": run.seed,
            "threads": options.threads,
            "versions": {name: version(name) for name in self.packages},
        }
        name = f"{run.label} seed={run.seed}".replace(" ", "_").replace("=", "")
        return RunFiles(options.output, name.replace("/", "-"), identity)

    def _execute_all(
        self, runs: Sequence[Run[S]], options: argparse.Namespace
    ) -> list[Finished[S]]:
        titles = [
            f"[{number}/{len(runs)}] {run.label} seed={run.seed}"
            for number, run in enumerate(runs, start=1)
        ]
        if options.jobs == 1:
            return [self._one(*one, options) for one in zip(runs, titles, strict=True)]
        done: dict[int, Finished[S]] = {}
        context = multiprocessing.get_context("spawn")
        executor = ProcessPoolExecutor(
            options.jobs, mp_context=context, initializer=_start_worker, initargs=(options.threads,)
        )
        try:
            futures = {
                executor.submit(self._one, run, title, options, lines=True): number
                for number, (run, title) in enumerate(zip(runs, titles, strict=True))
            }
            for future in as_completed(futures):
                done[futures[future]] = future.result()
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.kill()  # files appear whole or not at all
            raise
        executor.shutdown()
        return [done[number] for number in range(len(runs))]

    def _one(
        self, run: Run[S], title: str, options: argparse.Namespace, lines: bool = False
    ) -> Finished[S]:
        files = self._files(run, options)
        record = files.read_record()
        if record is None:
            with Progress(title, self.unit, lines) as progress:
                try:
                    outcome = self.execute(run.settings, run.seed, files, progress)
                except Exception:
                    print(f"{title}  failed", file=sys.stderr, flush=True)
                    raise
            files.finish({**outcome.results, "build": am.build_info()}, outcome.weights)
            record = files.read_record()
            assert record is not None
        else:
            title = f"{title}  done before"
        finished = Finished(run, record, files)
        print(f"{title}  {self.describe(finished)}  {record['seconds']:.0f} s", flush=True)
        return finished

    def describe(self, finished: Finished[S]) -> str:
        """Say in a few words how a run ended."""
        final: Mapping[str, Any] = finished.record.get("final", {})
        return "  ".join(
            f"{name.replace('_', ' ')} {value:.4g}"
            if isinstance(value, float)
            else f"{name} {value}"
            for name, value in final.items()
            if value is not None
        )


def _words(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def _start_worker(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """End this process once its parent has ended, in whatever way."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
