"""Put the results of full runs into the pages of docs/results: python -m tools.results.

This tool writes what is between a line ``<!-- results: NAME -->`` and the next ``<!-- end -->``:
the claims, tables and figures of NAME.summary.json below the folder of runs. Everything else in a
page is written by hand. Figures are copied into docs/figures.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from studies.summary import SUFFIX, shown

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
WIDTH = 100


def markdown(summary: dict[str, Any], folder: Path, figures: Path) -> str:
    """Write a summary as Markdown, and copy its figures."""
    build = summary["build"]
    minutes = summary["seconds"] / 60
    parts = [
        wrapped(
            f"`{summary['command']}`: {summary['runs']} runs, seeds {_seeds(summary['seeds'])}, "
            f"{minutes:.1f} minutes one after the other, torch {build['torch']}, {build['isa']}."
        )
    ]
    if summary["claims"]:
        claims = [
            f"- {'**Holds**' if claim['holds'] else '**Does not hold**'}: {claim['text']}. "
            f"*{claim['measured']}*"
            for claim in summary["claims"]
        ]
        parts.append("\n".join(wrapped(claim, indent="  ") for claim in claims))
    for table in summary["tables"]:
        parts.append(wrapped(f"*{table['title']}*"))
        parts.append(_table(table["columns"], table["rows"]))
    for picture in summary["pictures"]:
        name = f"results-{summary['study']}-{picture['file']}".replace(
            f"{summary['study']}-{summary['study']}", summary["study"]
        )
        shutil.copyfile(folder / picture["file"], figures / name)
        title = Path(name).stem.removeprefix("results-").replace("-", " ")
        parts.append(f"![{title}](../figures/{name})")
        parts.append(wrapped(f"*{picture['caption']}*"))
    return "\n\n".join(parts) + "\n"


def wrapped(text: str, indent: str = "") -> str:
    """Return a paragraph in lines of the page's width; ``indent`` precedes all but the first."""
    # A line that starts with "1." or "-" would be a list: keep it with the word before.
    text = re.sub(r" (?=(\d+[.)]|[-+*#>]+)( |$))", "\0", with_zeros(text))
    lines = textwrap.fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return lines.replace("\0", " ")


def with_zeros(text: str) -> str:
    """Write decimals with the zero in front: .93 becomes 0.93."""
    return re.sub(r"(?<![\w.])\.(?=\d)", "0.", text)


def _seeds(seeds: Sequence[int]) -> str:
    whole = list(range(seeds[0], seeds[-1] + 1)) == list(seeds)
    return f"{seeds[0]} to {seeds[-1]}" if whole and len(seeds) > 2 else " ".join(map(str, seeds))


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *([shown(cell) for cell in row] for row in rows)]
    return "\n".join(
        f"| {' | '.join(with_zeros(str(cell)).replace('|', chr(92) + '|') for cell in line)} |"
        for line in lines
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--runs", type=Path, default=Path("runs"), help="default: runs")
    chosen = options.parse_args()

    def fill(block: re.Match[str]) -> str:
        start, name, end = block.groups()
        files = [
            path
            for path in chosen.runs.rglob(f"{name}{SUFFIX}")
            if not json.loads(path.read_text())["quick"]
        ]
        if len(files) != 1:
            raise SystemExit(
                f"results: expected one full run with {name}{SUFFIX} below {chosen.runs}, "
                f"but found {len(files)}"
            )
        print(f"{name}: {files[0]}")
        summary = json.loads(files[0].read_text())
        return f"{start}\n{markdown(summary, files[0].parent, DOCS / 'figures')}\n{end}"

    # All pages are made before the first is written: a missing run leaves them as they are.
    pages = {page: BLOCK.sub(fill, page.read_text()) for page in (DOCS / "results").glob("*.md")}
    for page, text in pages.items():
        page.write_text(text)


if __name__ == "__main__":
    main()
