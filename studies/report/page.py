"""The page: what was found, put into the template."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from studies.__main__ import COMMANDS

from ..summary import Table
from .cells import LONG, Cell, Grid, cell, duration
from .collect import Found, FoundRecord, FoundSummary
from .figures import Figure, embed
from .runs import Runs, lay_out, split

# What a reader asks of a build first; the rest is folded away.
FIRST_FACTS = ("andmask_ext", "torch", "python", "platform", "isa")
NO_SUMMARY = "no summary"


@dataclass(frozen=True)
class Group:
    """The runs of a study in one folder.

    Args:
        anchor: its place on the page.
        study: the command that did them.
        folder: where they lie.
        kinds: tables of them, one for each kind of settings.
        count: how many there are.
        tag: what stands beside its name: that it was a quick version, or has no summary.
        written: when the last record was written.
        seconds: the time of all of them.
    """

    anchor: str
    study: str
    folder: Path
    kinds: Sequence[Runs]
    count: int
    tag: str
    written: str
    seconds: Cell

    @property
    def long(self) -> bool:
        """Whether there are so many that they shall stay folded at first."""
        return self.count > LONG


@dataclass(frozen=True)
class Section:
    """A summary on the page.

    Args:
        anchor: its place on the page.
        summary: what it says.
        written: when it was written.
        seconds: the time of its runs.
        grids: its tables.
        figures: its pictures.
        first_facts: about the build, in a few words.
        facts: all about the build.
        group: its runs, if they are still there.
    """

    anchor: str
    summary: FoundSummary
    written: str
    seconds: Cell
    grids: Sequence[Grid]
    figures: Sequence[Figure]
    first_facts: Sequence[str]
    facts: Sequence[tuple[str, str]]
    group: Group | None

    @property
    def tag(self) -> str:
        """What stands beside its name."""
        return "quick" if self.summary.quick else ""

    @property
    def failed(self) -> int:
        """How many claims do not hold."""
        return len(self.summary.claims) - self.summary.held


def render(found: Found, folder: Path) -> str:
    """Write the page.

    Args:
        found: summaries and records, at least one of either.
        folder: where they were found.

    Returns:
        HTML that needs no other file.
    """
    groups = _groups(found)
    sections = [
        _section(number, summary, groups.get((summary.study, summary.path.parent)))
        for number, summary in enumerate(
            sorted(found.summaries, key=lambda one: (*_order(one.study), one.quick, one.path)),
            start=1,
        )
    ]
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # The browser runs and loads what has these hashes, and nothing else.
    style, script = _part("page.css"), _part("page.js")
    return environment.from_string(_part("page.html")).render(
        style=Markup(style),
        style_hash=_hash(style),
        script=Markup(script),
        script_hash=_hash(script),
        folder=folder,
        sections=sections,
        no_summary=NO_SUMMARY,
        groups=list(groups.values()),
        damaged=found.damaged,
        unfinished=found.unfinished,
        records=len(found.records),
        held=sum(section.summary.held for section in sections),
        failed=sum(section.failed for section in sections),
        seconds=duration(sum(one.content.get("seconds") or 0 for one in found.records)),
        made=_written(time.time()),
        version=version("andmask_ext"),
    )


def _order(study: str) -> tuple[int, str]:
    commands = list(COMMANDS)
    return commands.index(study) if study in commands else len(commands), study


def _groups(found: Found) -> dict[tuple[str, Path], Group]:
    records: dict[tuple[str, Path], list[FoundRecord]] = {}
    for record in found.records:
        records.setdefault((record.study, record.path.parent), []).append(record)
    quick = {(one.study, one.path.parent): one.quick for one in found.summaries}
    keys = sorted(records, key=lambda key: (*_order(key[0]), quick.get(key, False), key[1]))
    groups = {}
    for number, key in enumerate(keys, start=1):
        study, place = key
        own = records[key]
        groups[key] = Group(
            f"runs-{number}",
            study,
            place,
            [
                lay_out(f"Runs of {study}" + (f", kind {kind}" if kind > 1 else ""), some)
                for kind, some in enumerate(split(own), start=1)
            ],
            len(own),
            {True: "quick", False: "", None: NO_SUMMARY}[quick.get(key)],
            _written(max(one.path.stat().st_mtime for one in own)),
            duration(sum(one.content.get("seconds") or 0 for one in own)),
        )
    return groups


def _section(number: int, summary: FoundSummary, group: Group | None) -> Section:
    build = dict(summary.facts.get("build") or {})
    first = [
        str(build[name]) if name in ("platform", "isa") else f"{name} {build[name]}"
        for name in FIRST_FACTS
        if name in build
    ]
    for what, count in (("thread", build.get("threads")), ("CPU", summary.facts.get("cpus"))):
        if count:
            first.append(f"{count} {what}{'s' * (str(count) != '1')}")
    return Section(
        f"summary-{number}",
        summary,
        _written(summary.path.stat().st_mtime),
        duration(summary.facts.get("seconds")),
        [_grid(table) for table in summary.tables],
        [embed(picture) for picture in summary.pictures],
        first,
        [(name, str(value)) for name, value in build.items()],
        group,
    )


def _grid(table: Table) -> Grid:
    return Grid(table.title, table.columns, [[cell(value) for value in row] for row in table.rows])


def _written(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
