"""Put what full runs of the studies found into docs/results.md: python -m tools.results.

Between a line ``<!-- results: NAME -->`` and the next ``<!-- end -->`` stand the claims, tables and
figures of NAME.summary.json below the folder of runs; all else in the page is written by hand.
Figures are copied into docs/figures.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from studies.summary import SUFFIX, shown

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(summary: dict[str, Any], folder: Path, figures: Path) -> str:
    """Write a summary as Markdown, and copy its figures."""
    build = summary["build"]
    minutes = summary["seconds"] / 60
    parts = [
        f"`{summary['command']}`: {summary['runs']} runs, seeds {_seeds(summary['seeds'])}, "
        f"{minutes:.1f} minutes one after the other, torch {build['torch']}, {build['isa']}."
    ]
    if summary["claims"]:
        marks = [
            f"- {'**Holds**' if claim['holds'] else '**Does not hold**'}: {claim['text']}. "
            f"*{claim['measured']}*"
            for claim in summary["claims"]
        ]
        parts.append("\n".join(marks))
    for table in summary["tables"]:
        parts.append(f"*{table['title']}*\n\n{_table(table['columns'], table['rows'])}")
    for picture in summary["pictures"]:
        name = f"results-{summary['study']}-{picture['file']}".replace(
            f"{summary['study']}-{summary['study']}", summary["study"]
        )
        shutil.copyfile(folder / picture["file"], figures / name)
        caption = picture["caption"]
        parts.append(f"![{caption}](figures/{name})\n\n*{caption}*")
    return "\n\n".join(parts) + "\n"


def _seeds(seeds: Sequence[int]) -> str:
    whole = list(range(seeds[0], seeds[-1] + 1)) == list(seeds)
    return f"{seeds[0]} to {seeds[-1]}" if whole and len(seeds) > 2 else " ".join(map(str, seeds))


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *([shown(cell) for cell in row] for row in rows)]
    return "\n".join(
        f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |"
        for line in lines
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--runs", type=Path, default=Path("runs"), help="default: runs")
    chosen = options.parse_args()
    page = DOCS / "results.md"

    def fill(found: re.Match[str]) -> str:
        start, name, end = found.groups()
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

    page.write_text(BLOCK.sub(fill, page.read_text()))


if __name__ == "__main__":
    main()
