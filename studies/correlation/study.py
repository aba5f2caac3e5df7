"""The study ``correlation``: what is run, and what it comes to."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..records import RunFiles
from ..study import Finished, Outcome, Report, Run, Study
from ..summary import Claim, Picture, Summary, Table, spread
from .figures import draw_conditions, draw_main
from .measuring import (
    ADAPTIVE,
    CONDITIONS,
    SIGNALS,
    CorrelationSettings,
    curve,
    measure,
    where_enough,
)

_EFFECT = 0.1  # a change of a correlation that counts
_FEWEST = 3  # seeds for a change, and half of them all


class Correlation(Study[CorrelationSettings]):
    """Gradient correlation with mechanism and shortcut."""

    name = "correlation"
    title = "What is left in the gradient: correlation with the mechanism and with the shortcut"
    about = (
        "Correlate masked gradients of a random network with those of data in which the mechanism, "
        "the shortcut, or neither is left."
    )
    reference = "Parascandolo et al., ICLR 2021, section 4.1, gradient correlations"
    revision = 2
    unit = "part"
    seeds = tuple(range(10))
    quick_seeds = (0, 1, 2)

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add conditions and sizes."""
        parser.add_argument(
            "--conditions",
            nargs="+",
            choices=CONDITIONS,
            help="default: all (--quick: paper)",
        )
        default = CorrelationSettings()
        for name, text in (
            ("environments", "number of environments"),
            ("examples", "examples in each, all in one batch"),
            ("width", "units in each hidden layer"),
        ):
            parser.add_argument(
                f"--{name}",
                type=int,
                default=getattr(default, name),
                metavar="N",
                help=f"{text} (default: {getattr(default, name)})",
            )

    def plan(self, options: argparse.Namespace) -> Sequence[Run[CorrelationSettings]]:
        """Each condition and seed."""
        for name, least in (("environments", 2), ("examples", 2), ("width", 1)):
            if getattr(options, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(options, name)}")
        sizes = {name: getattr(options, name) for name in ("environments", "examples", "width")}
        conditions = options.conditions or (["paper"] if options.quick else list(CONDITIONS))
        return [
            Run(condition, CorrelationSettings(**CONDITIONS[condition], **sizes), seed)
            for condition in dict.fromkeys(conditions)
            for seed in options.seeds
        ]

    def execute(
        self, settings: CorrelationSettings, seed: int, files: RunFiles, report: Report
    ) -> Outcome:
        """Measure one network."""
        results = measure(settings, seed, report)
        plain = results["curves"]["and"]["plain"]
        ends = {"mechanism": plain["mechanism"], "shortcut": plain["shortcut"]}
        final = {
            f"{name} {place}": values[index]
            for name, values in ends.items()
            for place, index in (("unmasked", 0), ("unanimous", -1))
        }
        return Outcome({"final": final, **results})

    def present(
        self,
        finished: Sequence[Finished[CorrelationSettings]],
        folder: Path,
        options: argparse.Namespace,
    ) -> Summary:
        """Claims about the first condition, a table of all, and figures."""
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for one in finished:
            groups.setdefault(one.run.label, []).append(one.record)
        first, records = next(iter(groups.items()))
        pictures = [
            Picture(
                draw_main(records, folder / "correlation.png"),
                f"Condition '{first}': mean over {len(records)} seeds, and one standard deviation. "
                "Left: what the AND-mask keeps, against gradients of data in which one cause is "
                "left, or neither. Middle: the XOR-mask keeps what the AND-mask drops. Right: how "
                "many coordinates are left of each. (With an even number of environments two "
                "thresholds in a row make the same mask.)",
            )
        ]
        if len(groups) > 1:
            pictures.append(
                Picture(
                    draw_conditions(groups, folder / "conditions.png"),
                    "The AND-mask for other data and starts. Dashed, without markers: the signal's "
                    "gradient is masked by the votes of its own environments as well, so that only "
                    "coordinates count on which both agree.",
                )
            )
        return Summary(
            claims=claims(records),
            tables=[_table(groups), _adaptive_table(groups)],
            pictures=pictures,
            notes=[
                f"Claims are about the condition '{first}', with signals as they are. The paper "
                "prints neither the number of revolutions nor how weights are drawn: 'paper' has "
                "one revolution and PyTorch's start, because of the conditions tried at full size "
                "this came nearest to the correlation that the paper prints. Permutations stay "
                "within an environment. A correlation needs two coordinates that are zero in "
                "neither gradient; where fewer than half of the seeds have one, none is given."
            ],
        )


def claims(records: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Compare correlations at the ends of the range of thresholds.

    A fall counts if its mean over seeds is more than 0.1 and more than two standard errors; what
    stays falls by 0.1 at most. Either needs three seeds, and half of all, with a correlation at
    both ends: a claim about fewer does not hold.
    """
    plain = {name: curve(records, "and", "plain", name) for name in SIGNALS}
    xor = {name: curve(records, "xor", "plain", name) for name in SIGNALS}
    tau = torch.tensor(records[0]["tau"])
    quarter = int((tau - 0.25).abs().argmin())
    start = {name: plain[name][:, 0] for name in SIGNALS}
    end = {name: plain[name][:, -1] for name in SIGNALS}
    low = {name: xor[name][:, quarter] for name in SIGNALS}

    def changes(values: Tensor, reference: Tensor) -> list[float]:
        known = (values - reference)[~(values - reference).isnan()].tolist()
        return known if len(known) >= max(_FEWEST, len(values) / 2) else []

    def falls(changes: list[float]) -> bool:
        if not changes:
            return False
        mean, error = statistics.mean(changes), statistics.stdev(changes) / len(changes) ** 0.5
        return mean < -_EFFECT and mean + 2 * error < 0

    def stays(changes: list[float]) -> bool:
        return bool(changes) and statistics.mean(changes) >= -_EFFECT

    begin = start["mechanism"].mean().item()
    return [
        Claim(
            "without a mask the gradient correlates with the mechanism at about .4",
            abs(begin - 0.4) <= 0.1,
            f"{_spread(start['mechanism'])}; with the shortcut {_spread(start['shortcut'])}",
        ),
        Claim(
            "towards unanimity the correlation with the shortcut is suppressed",
            falls(changes(end["shortcut"], start["shortcut"])),
            f"{_spread(start['shortcut'])} at τ = 0, {_spread(end['shortcut'])} at τ = 1",
        ),
        Claim(
            "that with the mechanism stays or grows",
            stays(changes(end["mechanism"], start["mechanism"])),
            f"{_spread(start['mechanism'])} at τ = 0, {_spread(end['mechanism'])} at τ = 1",
        ),
        Claim(
            "the XOR-mask does the reverse: the mechanism is suppressed, the shortcut stays",
            falls(changes(low["mechanism"], start["mechanism"]))
            and stays(changes(low["shortcut"], start["shortcut"])),
            f"mechanism {_spread(start['mechanism'])} without a mask, {_spread(low['mechanism'])} "
            f"at τ = {tau[quarter]:g}; shortcut {_spread(start['shortcut'])}, "
            f"{_spread(low['shortcut'])}",
        ),
    ]


def _spread(values: Tensor) -> str:
    known = values[~values.isnan()].tolist()
    return spread(known) + (
        f" ({len(known)} of {len(values)} seeds)" if 0 < len(known) < len(values) else ""
    )


def _table(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    taus = (0.0, 0.5, 0.75, 1.0)
    rows = []
    for condition, records in groups.items():
        grid = torch.tensor(records[0]["tau"])
        places = [int((grid - tau).abs().argmin()) for tau in taus]
        for signals in ("plain", "masked"):
            for name in SIGNALS:
                values = where_enough(curve(records, "and", signals, name))
                rows.append((condition, signals, name, *(_spread(values[:, i]) for i in places)))
    return Table(
        "correlation of the masked gradient with each signal, mean ± standard deviation over seeds",
        ("condition", "signal's gradient", "signal", *(f"τ = {tau:g}" for tau in taus)),
        rows,
    )


def _adaptive_table(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    rows = []
    for condition, records in groups.items():
        for threshold in ADAPTIVE:
            found = [record["adaptive"][threshold] for record in records]
            kept = spread([100 * one["kept"] for one in found], 1)
            values = [
                torch.tensor([math.nan if one[s] is None else one[s] for one in found])
                for s in SIGNALS
            ]
            rows.append((condition, threshold, kept, *map(_spread, values)))
    return Table(
        "thresholds that set themselves: coordinates kept, and correlation of what is kept with "
        "each signal",
        ("condition", "threshold", "kept %", *SIGNALS),
        rows,
    )


main = Correlation().main
