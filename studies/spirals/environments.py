"""How many environments plain training and the AND-mask need."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..study import Run
from ..summary import Claim, Picture, Summary, Table, spread
from . import charts, options
from .parts import PASSED, Done, Part, SpiralsRun, label, mean_of, notes_on_shortcuts, percents

NUMBERS, QUICK_NUMBERS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024), (2, 8)
EPOCHS, QUICK_EPOCHS = 3000, 80  # times the number of environments: the paper's, and a short one
REVOLUTIONS = 1.0
WIDTH = 128
POOLED_BATCH = 256
# Steps of an epoch do not depend on the number of environments where each gives a batch: beyond
# this number too few are left in all.
MOST_FOR_THE_MASK = 256


class Environments(Part):
    """The number of examples seen is the same for all, as in the paper: 3000 / d epochs."""

    def plan(self, chosen: argparse.Namespace) -> list[SpiralsRun]:
        """Turn options into runs."""
        methods = chosen.method or ["mean", "and-mask"]
        if unknown := set(methods) - {"mean", "and-mask"}:
            raise ValueError(
                f"method: expected mean or and-mask in this part, got {', '.join(sorted(unknown))}"
            )
        if chosen.pooled is not None:
            raise ValueError(
                "pooled: expected no such option in this part, where plain training is pooled and "
                f"the AND-mask is not, got {chosen.pooled}"
            )
        base = options.base(chosen, several=("environments",), revolutions=REVOLUTIONS, width=WIDTH)
        numbers = chosen.environments or (QUICK_NUMBERS if chosen.quick else NUMBERS)
        passes = QUICK_EPOCHS if chosen.quick else EPOCHS
        runs = []
        for number in dict.fromkeys(numbers):
            for method in methods:
                if method == "and-mask" and number > MOST_FOR_THE_MASK:
                    continue
                changes: dict[str, Any] = {"method": method, "environments": number}
                if method == "mean":
                    changes |= {"pooled": True, "batch": chosen.batch or POOLED_BATCH}
                if chosen.epochs is None:
                    changes["epochs"] = max(1, round(passes / number))
                settings = replace(base, **changes)
                runs += [Run(label(settings, True), settings, seed) for seed in chosen.seeds]
        return runs

    def present(self, finished: Sequence[Done], folder: Path, name: str) -> Summary:
        """Say what the runs come to."""
        groups: dict[tuple[str, int], list[Done]] = {}
        for one in finished:
            settings = one.run.settings
            groups.setdefault((settings.method, settings.environments), []).append(one)
        rows = [
            (
                method,
                number,
                runs[0].run.settings.epochs,
                len(runs),
                spread(percents(runs, "train")),
                spread(percents(runs, "test")),
            )
            for (method, number), runs in sorted(groups.items(), key=lambda item: item[0])
        ]
        columns = ("method", "environments", "epochs", "seeds", "train %", "test %")
        path = charts.draw_environments(groups, folder / f"{name}.png")
        return Summary(
            _claims(groups),
            [Table("accuracy over the number of environments", columns, rows)],
            [
                Picture(
                    path,
                    "Test accuracy (solid) and training accuracy (dashed) over the number of "
                    "environments; the number of examples seen is the same for all. Dots are "
                    "seeds, lines their means.",
                )
            ],
            [
                "Sized for two cores: width 128. Plain training takes batches of "
                f"{POOLED_BATCH} from all environments together, so that it makes as many steps "
                "with any number of them. The AND-mask takes 128 from each, and makes the fewer "
                f"steps the more there are; with more than {MOST_FOR_THE_MASK} too few would be "
                "left, and it is not run.",
                *notes_on_shortcuts(finished),
            ],
        )


def _claims(groups: dict[tuple[str, int], list[Done]]) -> list[Claim]:
    claims = []
    for method, expected in (("mean", 1024), ("and-mask", 32)):
        shares = {
            number: mean_of(runs, "test")
            for (which, number), runs in sorted(groups.items())
            if which == method
        }
        if expected not in shares:
            continue
        passed = [number for number, share in shares.items() if share >= PASSED]
        said = ", ".join(f"{number}: {100 * share:.1f} %" for number, share in shares.items())
        if method == "mean":
            claims.append(
                Claim(
                    "plain training first passes 95 % on test data at about 1024 environments "
                    "(512 or 1024 of those tried)",
                    bool(passed) and min(passed) in (512, 1024) and min(shares) <= 256,
                    said,
                )
            )
        else:
            claims.append(
                Claim("the AND-mask passes 95 % with 32 environments", 32 in passed, said)
            )
    return claims
