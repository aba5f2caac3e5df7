"""What the parts come to: tables and claims."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..summary import Cell, Claim, Summary, Table, spread
from .parts import ILC_EPSILON, RULES

Record = Mapping[str, Any]
RHO = "\N{GREEK SMALL LETTER RHO}"  # looks like a p to linters
PLACES = ("consistent", "patchwork", "elsewhere")


class Part(Protocol):
    """What is asked of a run's settings."""

    @property
    def part(self) -> str:
        """Name of the part."""

    @property
    def rule(self) -> str:
        """Rule of descents."""

    @property
    def epsilons(self) -> tuple[float, ...]:
        """Levels of scores."""


class Results:
    """Records of runs, by part."""

    def __init__(self, records: Sequence[tuple[Part, Record]]) -> None:
        self._records = records
        self.quadratics = self._of("quadratics")[0]["pairs"]
        self.patches = self._of("patchwork")
        self.minima = [record["minima"] for record in self._of("minima")]
        self.epsilons = next(one.epsilons for one, _ in records if one.part == "minima")

    def _of(self, part: str, rule: str = "") -> list[Record]:
        return [
            record for one, record in self._records if one.part == part and one.rule in ("", rule)
        ]

    def descents(self, rule: str) -> list[Record]:
        """Return the descents of a rule, one record for each seed."""
        return self._of("descents", rule)

    def share(self, rule: str, place: str) -> list[float]:
        """Return which percentage of starts leads somewhere, for each seed."""
        return [record["final"][f"{place} %"] for record in self.descents(rule)]

    def ilc(self, rule: str, places: Sequence[str] = PLACES) -> list[float]:
        """Return minus the score of each scored end, of all seeds."""
        return [
            -math.inf if score is None else -score  # of a descent that diverged
            for one in self.descents(rule)
            for score, place in zip(one["ilc"]["scores"], one["ends"], strict=False)
            if place in places
        ]


def summarise(results: Results) -> Summary:
    """Write tables and claims."""
    return Summary(
        claims=[
            *_of_minima(results),
            *_of_descents(results),
            *_of_quadratics(results),
            *_of_patchwork(results),
        ],
        tables=[
            _minima_table(results),
            _descent_table(results),
            _quadratic_table(results),
            _patchwork_table(results),
        ],
        notes=[
            "Scores of the surfaces and of the patchwork example are lower bounds, found by "
            "search; an invariant learning consistency made of them is an upper bound. Sized for "
            "two cores."
        ],
    )


# ---- tables ----


def _minima_table(results: Results) -> Table:
    rows: list[Sequence[Cell]] = []
    for name, one in results.minima[0].items():
        scores = zip(*(minima[name]["scores"] for minima in results.minima), strict=True)
        low, high = one["pooled_curvatures"]
        rows.append(
            (
                name,
                *one["losses"],
                f"{low:.3g}, {high:.3g}",
                *(statistics.median(s) for s in scores),
            )
        )
    levels = [f"score, ε = {epsilon:g}" for epsilon in results.epsilons]
    columns = ("minimum", "L_A", "L_B", "pooled curvatures", *levels)
    return Table("two minima that pooling cannot tell apart (medians over seeds)", columns, rows)


def _descent_table(results: Results) -> Table:
    rows: list[Sequence[Cell]] = []
    for rule in RULES:
        shares = (spread(results.share(rule, place), 1) for place in PLACES)
        scored, known = results.ilc(rule), results.ilc(rule, PLACES[:2])
        at_minima = f"{statistics.mean(known):.3g}" if known else None
        rows.append((rule, *shares, f"{statistics.mean(scored):.3g}", at_minima, len(scored)))
    ends = (f"ends {place}, %" for place in PLACES)
    columns = ("rule", *ends, "ILC at most", "of ends at minima", "ends scored")
    return Table(f"where rules lead, and their ILC at ε = {ILC_EPSILON:g}", columns, rows)


def _quadratic_table(results: Results) -> Table:
    rows = [
        (name, one["determinants"], one["score"], one["printed_bound"], one["sharp_bound"])
        for name, one in results.quadratics.items()
    ]
    sharp = f"({RHO} + √({RHO}² - 1))²"
    columns = ("pair of quadratics", RHO, "exact score ÷ ε", f"printed 2{RHO}²", sharp)
    return Table("bounds of the score", columns, rows)


def _patchwork_table(results: Results) -> Table:
    first = results.patches[0]
    rows: list[Sequence[Cell]] = [
        ("solution θ*", *first["solution"], None),
        ("θ* with θ₆ = -.5", *first["turned"], None),
    ]
    for number, one in enumerate(first["searches"]):
        found = [record["searches"][number] for record in results.patches]
        middle = sorted(found, key=lambda each: each["score"])[len(found) // 2]
        name = f"found, ε = {one['epsilon']:g}, {one['steps']} steps"
        rows.append((name, *middle["losses"], middle["score"]))
    return Table("the patchwork example (median seed)", ("point", "L_A", "L_B", "score"), rows)


# ---- claims ----


def _of_minima(results: Results) -> list[Claim]:
    one = results.minima[0]
    good, bad = one["consistent"], one["patchwork"]
    pairs = [
        *zip(good["losses"], bad["losses"], strict=True),
        *zip(good["pooled_curvatures"], bad["pooled_curvatures"], strict=True),
    ]
    gap = max(abs(a - b) / abs(b) for a, b in pairs)
    slope = max(good["pooled_gradient"], bad["pooled_gradient"])
    ratios = [
        theirs / ours
        for minima in results.minima
        for ours, theirs in zip(
            minima["consistent"]["scores"], minima["patchwork"]["scores"], strict=True
        )
    ]
    return [
        Claim(
            "the two minima look alike after pooling",
            gap < 0.01 and slope < 1e-3,
            f"losses and curvatures differ by at most {100 * gap:.2g} %, "
            f"the pooled gradient is at most {slope:.1g}",
        ),
        Claim(
            "the inconsistency score tells them apart: it is larger at the patchwork minimum",
            min(ratios) > 1,
            f"{min(ratios):.3g} to {max(ratios):.3g} times as large",
        ),
    ]


def _of_descents(results: Results) -> list[Claim]:
    def number(rule: str, place: str) -> int:
        return sum(record["ends"].count(place) for record in results.descents(rule))

    starts = sum(len(record["ends"]) for record in results.descents("mean"))
    mean, masked = number("mean", "patchwork"), number("and-mask", "patchwork")
    voted = number("geometric mean", "patchwork")
    unvoted = number("geometric mean, no vote", "patchwork")
    reached = [number(rule, "consistent") for rule in ("mean", "and-mask")]
    lost = number("and-mask", "elsewhere")
    # Of seeds that have such ends; None is what a number that is not finite becomes in a record.
    slopes = [
        math.inf if (slope := record["largest_gradient_elsewhere"]) is None else slope
        for record in results.descents("and-mask")
        if "elsewhere" in record["ends"]
    ]
    ilc, settled = (
        {rule: _mean(results.ilc(rule, places)) for rule in ("mean", "and-mask")}
        for places in (PLACES, PLACES[:2])
    )
    return [
        Claim(
            "the mean gradient leads to the patchwork minimum from a part of the starts",
            mean > 0.05 * starts,
            f"{mean} of {starts}",
        ),
        Claim(
            "the AND-mask never ends at the patchwork minimum", not masked, f"{masked} of {starts}"
        ),
        Claim(
            "the geometric mean does not either, and it is the vote that keeps it away",
            not voted and unvoted > 0.05 * starts,
            f"{voted} of {starts} with the vote, {unvoted} without",
        ),
        Claim(
            "the AND-mask ends at the consistent minimum from more starts than the mean gradient",
            reached[1] > reached[0],
            f"{reached[1]} against {reached[0]} of {starts}",
        ),
        Claim(
            "wherever else the AND-mask stops, environments contradict each other in both "
            "coordinates",
            lost > 0 and max(slopes) < 1e-3,
            f"{lost} starts; the masked gradient there is at most {max(slopes, default=0):.1g}",
        ),
        Claim(
            "the invariant learning consistency of the AND-mask is higher than the mean gradient's",
            ilc["and-mask"] > ilc["mean"],
            f"{ilc['and-mask']:.3g} against {ilc['mean']:.3g}",
        ),
        *(
            [
                Claim(
                    "of descents that end at a minimum, those of the AND-mask are the more "
                    "consistent",
                    settled["and-mask"] > settled["mean"],
                    f"{settled['and-mask']:.3g} against {settled['mean']:.3g}",
                )
            ]
            if not any(map(math.isnan, settled.values()))  # no such descent is scored: no claim
            else []
        ),
    ]


def _mean(values: Sequence[float]) -> float:
    return statistics.mean(values) if values else math.nan


def _of_quadratics(results: Results) -> list[Claim]:
    pairs = results.quadratics
    broken = {name: one for name, one in pairs.items() if one["score"] > one["printed_bound"]}
    sharp = [one["score"] / one["sharp_bound"] for one in pairs.values()]
    return [
        Claim(
            f"the score of a pair of quadratics is at most 2 ε {RHO}², as printed",
            not broken,
            "; ".join(
                f"{name}: {one['score']:.3g} ε against {one['printed_bound']:.3g} ε"
                for name, one in broken.items()
            )
            or f"{len(pairs)} pairs",
        ),
        Claim(
            f"that score is at most ε ({RHO} + √({RHO}² - 1))²",
            max(sharp) <= 1 + 1e-9,
            f"{min(sharp):.2f} to {max(sharp):.2f} of it in {len(pairs)} pairs",
        ),
    ]


def _of_patchwork(results: Results) -> list[Claim]:
    first = results.patches[0]
    (a, b), (kept, moved) = first["solution"], first["turned"]
    found = [one for record in results.patches for one in record["searches"]]
    within = max(
        abs(one["losses"][one["kept"]] - first["solution"][one["kept"]]) - one["epsilon"]
        for one in found
    )
    grows = all(
        earlier["score"] < later["score"]
        for record in results.patches
        for earlier, later in zip(record["searches"], record["searches"][1:], strict=False)
        if earlier["epsilon"] == later["epsilon"]
    )
    smallest = min(one["score"] for one in found)
    return [
        Claim(
            "the patchwork solution has loss .0032 in both environments, and θ₆ = -.5 takes that "
            "of B alone to 1.06",
            all(round(loss, 4) == 0.0032 for loss in (a, b, kept)) and round(moved, 2) == 1.06,
            f"{a:.4f} and {b:.4f}, then {kept:.4f} and {moved:.2f}",
        ),
        Claim(
            "search finds worse points within ε of the loss of A",
            within <= 0 and smallest > moved,
            f"scores {smallest:.3g} to {max(one['score'] for one in found):.3g}",
        ),
        Claim(
            "the longer the search, the larger the score",
            grows,
            f"{len(found)} searches",
        ),
    ]
