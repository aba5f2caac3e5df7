"""One page of all that studies left in a folder: ``python -m studies report``.

The page is one HTML file, which holds its pictures and loads nothing. It runs no script.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from .figures import DPI
from .records import write_atomically
from .summary import SUFFIX, Claim, Table, shown

LONG = 20  # rows; longer tables are folded
PICTURES = ("PNG", "JPEG", "GIF", "WEBP")
NUMBER = re.compile(r"\W*\d|-$")  # what a cell of a column of numbers begins with
HINT = "run a study first, such as 'python -m studies spirals --quick'"


# ---- what a folder holds ----


@dataclass(frozen=True)
class Summary:
    """A summary, read again; ``facts`` is all of the file."""

    path: Path
    facts: dict[str, Any]
    claims: Sequence[Claim]
    tables: Sequence[Table]

    @property
    def name(self) -> str:
        """Its study, or what makes it a part of one, and whether it is the short version."""
        return self.path.name.removesuffix(SUFFIX) + " (quick)" * bool(self.facts.get("quick"))

    @property
    def held(self) -> int:
        """How many claims hold."""
        return sum(claim.holds for claim in self.claims)


@dataclass
class Found:
    """Summaries, records of each study and folder, checkpoints, and files that are left out."""

    summaries: list[Summary] = field(default_factory=list)
    records: dict[tuple[str, Path], list[tuple[Path, dict[str, Any]]]] = field(default_factory=dict)
    unfinished: list[Path] = field(default_factory=list)
    damaged: list[tuple[Path, str]] = field(default_factory=list)

    @property
    def runs(self) -> int:
        """How many records there are."""
        return sum(map(len, self.records.values()))


def collect(folder: Path) -> Found:
    """Read all summaries and records below a folder; JSON files of others are left alone."""
    found = Found(unfinished=sorted(folder.rglob("*.checkpoint")))
    for path in sorted(path for path in folder.rglob("*.json") if path.is_file()):
        try:
            content = json.loads(
                path.read_text(encoding="utf-8"), parse_float=_finite, parse_constant=_finite
            )
            json.dumps(content, ensure_ascii=False).encode()  # no half characters
            if path.name.endswith(SUFFIX):
                found.summaries.append(_summary(path, content))
            elif isinstance(content, dict) and "identity" in content:
                study = _record(content)
                found.records.setdefault((study, path.parent), []).append((path, content))
        except RecursionError:
            found.damaged.append((path, "lists are nested too deeply"))
        except (OSError, ValueError, TypeError, OverflowError) as error:
            found.damaged.append((path, str(error)))
    return found


def _summary(path: Path, content: Any) -> Summary:
    _expect(content, dict, "a summary")
    for key, kind in (("study", str), ("claims", list), ("tables", list), ("notes", list)):
        _expect(content.get(key), kind, key)
    for picture in _expect(content.get("pictures"), list, "pictures"):
        _expect(_expect(picture, dict, "a picture").get("file"), str, "file")
    _expect(content.get("build", {}), dict, "build")
    _number(content.get("seconds", 0), "seconds")
    claims = [Claim(**_expect(claim, dict, "a claim")) for claim in content["claims"]]
    for claim in claims:
        _expect(claim.holds, bool, "holds")
    tables = [Table(**_expect(table, dict, "a table")) for table in content["tables"]]
    for table in tables:
        for row in (table.columns, table.rows, *table.rows):
            _expect(row, list, "a row")
    return Summary(path, content, claims, tables)


def _record(content: dict[str, Any]) -> str:
    """Return the study of a record that can be shown."""
    study: str = _expect(_expect(content["identity"], dict, "identity").get("study"), str, "study")
    _expect(content.get("final", {}), dict, "final")
    _number(content.get("seconds", 0), "seconds")
    return study


def _expect(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{what}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def _number(value: Any, what: str) -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{what}: expected a number, got {type(value).__name__}")
    float(value)  # an integer may be too large


def _finite(word: str) -> float:
    number = float(word)
    if not math.isfinite(number):
        raise ValueError(f"expected finite numbers, got {word}")
    return number


# ---- the page ----


def render(found: Found, folder: Path) -> str:
    """Write the page."""
    sections = [_section(number, summary) for number, summary in enumerate(found.summaries)]
    runs = [_runs(key, records) for key, records in sorted(found.records.items())]
    claims = [claim for summary in found.summaries for claim in summary.claims]
    held = sum(claim.holds for claim in claims)
    contents = "".join(
        f'<li><a href="#s{number}">{escape(summary.name)}</a>: {summary.held} of '
        f"{len(summary.claims)} claims hold</li>"
        for number, summary in enumerate(found.summaries)
    )
    files = _files("Left out", (f"{path}: {why}" for path, why in found.damaged))
    files += _files("Not finished: the same command goes on from there", found.unfinished)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>AND-mask: studies in {escape(str(folder))}</title>
<style>{Path(__file__).with_suffix(".css").read_text(encoding="utf-8")}</style>
</head>
<body>
<h1>AND-mask: the studies</h1>
<p class="soft">Found in <code>{escape(str(folder))}</code> on {_when(time.time())} UTC:
{len(sections)} summaries, {held} of {len(claims)} claims hold, {found.runs} runs.</p>
<nav aria-label="Contents"><ul>{contents}<li><a href="#runs">Single runs</a></li></ul></nav>
<main>
{"".join(sections)}
<section id="runs"><h2>Single runs</h2>{"".join(runs)}</section>
{files}
</main>
<footer>andmask_ext {version("andmask_ext")}, <code>python -m studies report</code></footer>
</body>
</html>
"""


def _section(number: int, summary: Summary) -> str:
    facts = summary.facts
    build = " · ".join(f"{key} {_cell(value)}" for key, value in facts.get("build", {}).items())
    about = [
        *(_cell(facts[key]) for key in ("title", "about", "reference") if facts.get(key)),
        f"{_cell(facts.get('runs'))} runs, {_duration(facts.get('seconds', 0))} in all, "
        f"written {_when(summary.path.stat().st_mtime)} UTC",
    ]
    parts = [f'<section id="s{number}"><h2>{escape(summary.name)}</h2>']
    parts += [f"<p>{escape(text)}</p>" for text in about]
    parts.append(f"<p><code>{escape(_cell(facts.get('command')))}</code></p>")
    parts.append(f'<details class="soft"><summary>software</summary>{escape(build)}</details>')
    if summary.claims:
        parts.append(
            f"<h3>Claims</h3><ul class='claims'>{''.join(map(_claim, summary.claims))}</ul>"
        )
    parts += [_figure(summary.path.parent, picture) for picture in facts["pictures"]]
    parts += [_table(table.title, table.columns, table.rows) for table in summary.tables]
    parts += [f"<p>{escape(_cell(note))}</p>" for note in facts["notes"]]
    return "\n".join([*parts, "</section>"])


def _claim(claim: Claim) -> str:
    name, mark = ("holds", "✓ holds") if claim.holds else ("fails", "✗ does not hold")
    text, measured = escape(_cell(claim.text)), escape(_cell(claim.measured))
    return f'<li><span class="{name}">{mark}</span> {text}<div class="soft">{measured}</div></li>'


def _figure(folder: Path, picture: dict[str, Any]) -> str:
    """Return a picture that lies in the summary's folder itself, or why there is none."""
    name, caption = picture["file"], escape(_cell(picture.get("caption")))
    path = folder / name
    try:
        if path.resolve().parent != folder.resolve():
            raise ValueError("lies outside of the summary's folder")
        with Image.open(path, formats=PICTURES) as image:
            width, height = (round(side * 96 / DPI) for side in image.size)
            kind = Image.MIME[str(image.format)]
        content = base64.b64encode(path.read_bytes()).decode()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = escape(f"{name} is left out: {error}")
        return f'<p class="fails">{why}</p><p>{caption}</p>'
    return (
        f'<figure><img src="data:{kind};base64,{content}" alt="{caption}" width="{width}" '
        f'height="{height}"><figcaption>{caption}</figcaption></figure>'
    )


def _runs(key: tuple[str, Path], records: Sequence[tuple[Path, dict[str, Any]]]) -> str:
    """Return the table of a study's runs in one folder: how they ended."""
    study, folder = key
    finals = [record.get("final", {}) for _, record in records]
    names = list(dict.fromkeys(name for final in finals for name in final))
    rows = [
        [path.stem, *map(final.get, names), _duration(record.get("seconds", 0))]
        for (path, record), final in zip(records, finals, strict=True)
    ]
    columns = ["record", *(name.replace("_", " ") for name in names), "time"]
    return _table(f"{study}, in {folder}: {len(rows)} runs", columns, rows)


def _table(title: object, columns: Iterable[object], rows: Iterable[Iterable[Any]]) -> str:
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [all(map(NUMBER.match, column)) for column in zip(*cells, strict=True)]

    def line(tag: str, texts: Iterable[str]) -> str:
        aligned = zip(texts, numeric or [False] * len(list(columns)), strict=True)
        inside = (f"<{tag}{' class=n' * right}>{escape(text)}</{tag}>" for text, right in aligned)
        return f"<tr>{''.join(inside)}</tr>"

    body = "".join(line("td", row) for row in cells)
    head, caption = line("th", map(_cell, columns)), escape(_cell(title))
    table = f"<table><caption>{caption}</caption><thead>{head}</thead><tbody>{body}</tbody></table>"
    scroll = f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}">{table}</div>'
    if len(cells) <= LONG:
        return scroll
    return f"<details><summary>{caption}, {len(cells)} rows</summary>{scroll}</details>"


def _cell(value: Any) -> str:
    """Write what JSON can hold in a few words."""
    if isinstance(value, (list, dict)):
        return f"{len(value)} values"
    return shown(value)


def _files(title: str, files: Iterable[object]) -> str:
    lines = "".join(f"<li><code>{escape(str(file))}</code></li>" for file in files)
    return f"<section><h2>{title}</h2><ul>{lines}</ul></section>" if lines else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {left} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def main(arguments: Sequence[str], prog: str = "python -m studies report") -> int:
    """Write the page: 0. Wrong arguments, and a folder without any run, exit with 2."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write one HTML page of all summaries and records in a folder and the folders "
        "in it. The page holds its figures; it needs no other file, and no network.",
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("runs"), help="where to look (default: runs)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: report.html in that folder"
    )
    options = parser.parse_args(arguments)
    folder: Path = options.folder
    output: Path = options.output or folder / "report.html"
    if not folder.is_dir():
        parser.error(f"folder: expected a folder with results of studies, got {folder}; {HINT}")
    found = collect(folder)
    for path, why in found.damaged:
        print(f"{prog}: {path} is left out: {why}", file=sys.stderr)
    if not found.summaries and not found.records:
        parser.error(f"folder: expected results of studies, got none in {folder}; {HINT}")
    page = render(found, folder).encode(errors="replace")  # names of files may be no UTF-8
    try:
        write_atomically(output, lambda file: file.write(page))
    except OSError as error:
        parser.error(f"output: expected a file that can be written, got {error}")
    print(
        f"page  {output}  ({len(found.summaries)} summaries, {found.runs} runs, "
        f"{len(page) / 1e6:.1f} MB)"
    )
    return 0
