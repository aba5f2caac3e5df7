"""The contests as a study, on the frame of ``studies``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from studies.records import RunFiles
from studies.study import Finished, Outcome, Report, Run, Settings, Study
from studies.summary import Summary

from ..measuring import ROUNDS
from .contest import EVERY, GROUPED, GROUPS, Case, contest
from .figures import draw
from .memory import SLOW
from .models import workload
from .peers import GRADIENTS, OUR_STEP, OURS, PLAIN, PLAIN_STEP, STEPS, versions
from .results import Results, summarise

FULL_MODELS, QUICK_MODELS = ["MLP", "CNN", "transformer"], ["MLP 256", "CNN", "transformer"]
QUICK_EXAMPLES = {EVERY: GROUPS, GROUPED: 2 * GROUPS}


@dataclass(frozen=True)
class ContestSettings(Settings):
    """One case.

    Args:
        model: as in :func:`models.workload`.
        kind: of environments.
        examples: in the batch.
        rounds: of timing.
        memory: whether it is measured, too.
        slow: seconds of a step above which it is timed once.
    """

    model: str
    kind: str
    examples: int
    rounds: int
    memory: bool
    slow: float

    def identity(self) -> dict[str, Any]:
        """Return also what is installed: a library that was missing is another contest."""
        return asdict(self) | {"libraries": versions()}


class Benchmark(Study[ContestSettings]):
    """Time and memory of every way to the AND-mask's gradient."""

    name = "benchmark"
    title = "time and memory of a training step, beside other libraries"
    about = (
        "Measure every way that exists to the AND-mask's gradient of one batch against a plain "
        "forward and backward pass, and compare the gradients. Contestants take turns; peak memory "
        "is that of a process of its own, with one thread. Opacus, BackPACK and TorchJD take part "
        "if they are installed (opacus, backpack-for-pytorch, torchjd). A record is of this "
        "machine in that hour: to measure again, give another --output."
    )
    reference = (
        "the cost of the algorithm in the paper's section 2.3, as released and as built since"
    )
    unit = "measurement"
    seeds = (0,)

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add models, kinds of environments, and how much is measured."""
        parser.add_argument(
            "--models",
            nargs="+",
            metavar="NAME",
            help="MLP, CNN, transformer, ResNet-9, or such as 'MLP 512' "
            f"(default: {', '.join(FULL_MODELS)}; --quick: {', '.join(QUICK_MODELS)})",
        )
        parser.add_argument(
            "--environments",
            nargs="+",
            choices=(EVERY, GROUPED),
            help="what is an environment (default: both; --quick: both of an MLP, one of others)",
        )
        parser.add_argument(
            "--examples",
            type=int,
            help=f"in a batch (default: as usual for the model; --quick: {GROUPS} or {2 * GROUPS})",
        )
        parser.add_argument("--rounds", type=int, help=f"of timing (default: {ROUNDS}; --quick: 1)")
        parser.add_argument(
            "--memory",
            action=argparse.BooleanOptionalAction,
            help="measure peak memory, too (default: yes; --quick: no)",
        )

    def plan(self, options: argparse.Namespace) -> list[Run[ContestSettings]]:
        """Return a run for each model and kind of environments."""
        quick = options.quick
        models = options.models or (QUICK_MODELS if quick else FULL_MODELS)
        rounds = (1 if quick else ROUNDS) if options.rounds is None else options.rounds
        memory = not quick if options.memory is None else options.memory
        if rounds < 1:
            raise ValueError(f"rounds: expected at least 1, got {rounds}")
        if options.jobs != 1:
            raise ValueError(
                f"jobs: expected 1, for runs side by side slow each other down, got {options.jobs}"
            )
        runs = []
        for number, model in enumerate(dict.fromkeys(models)):
            kinds = options.environments or [EVERY, GROUPED]
            if quick and not options.environments and number:
                kinds = kinds[number % 2 :][:1]
            for kind in dict.fromkeys(kinds):
                usual = QUICK_EXAMPLES[kind] if quick else workload(model).examples
                examples = usual if options.examples is None else options.examples
                if examples < 1 or (kind == GROUPED and examples % GROUPS):
                    raise ValueError(
                        f"examples: expected a positive multiple of {GROUPS}, got {examples}"
                    )
                workload(model)  # there is one
                settings = ContestSettings(
                    model, kind, examples, rounds, memory, slow=0.1 if quick else SLOW
                )
                runs += [Run(f"{model} {kind}", settings, seed) for seed in options.seeds]
        return runs

    def execute(
        self, settings: ContestSettings, seed: int, files: RunFiles, report: Report
    ) -> Outcome:
        """Let all contestants run, of gradients and of whole steps."""
        case = Case(settings.model, settings.kind, settings.examples, seed)
        total = (2 if settings.memory else 1) * (len(GRADIENTS) + len(STEPS)) + 2
        done = 0

        def tell(stage: str, name: str) -> None:
            nonlocal done
            done += 1
            report(done, total, f"{stage} {name}")

        load = os.getloadavg()[0]
        found = {}
        for key, contestants, yardstick in (
            ("gradients", GRADIENTS, PLAIN),
            ("steps", STEPS, PLAIN_STEP),
        ):
            found[key] = contest(
                case,
                contestants,
                yardstick,
                memory=settings.memory,
                rounds=settings.rounds,
                seconds_per_round=0.1 if settings.rounds > 1 else 0.0,
                slow=settings.slow,
                tell=tell,
            )
        rows, deviations = found["gradients"]
        steps, _ = found["steps"]
        ratio = {row.contestant: row.ratio for row in (*rows, *steps)}
        return Outcome(
            {
                "final": {
                    "gradient ÷ plain": ratio[OURS],
                    "step ÷ plain": ratio[OUR_STEP],
                    "ways compared": len(deviations),
                    "ways exact": sum(one.exact for one in deviations.values()),
                },
                "gradients": [asdict(row) for row in rows],
                "steps": [asdict(row) for row in steps],
                "deviations": {
                    name: asdict(one) | {"exact": one.exact} for name, one in deviations.items()
                },
                "libraries": versions(),
                "load": [load, os.getloadavg()[0]],
            }
        )

    def present(
        self,
        finished: Sequence[Finished[ContestSettings]],
        folder: Path,
        options: argparse.Namespace,
    ) -> Summary:
        """Set the ways beside each other."""
        results = Results(
            [(one.run.settings.model, one.run.settings.kind, one.record) for one in finished]
        )
        summary = summarise(results, timed=not options.quick)
        if not options.quick or options.memory:
            summary.pictures += [draw(results, kind, folder) for kind in results.kinds]
        return summary


main = Benchmark().main
