"""``python -m studies report``: read what is there, write the page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..records import write_atomically
from .collect import collect
from .page import render


def main(arguments: Sequence[str], prog: str = "python -m studies report") -> int:
    """Write the page.

    Args:
        arguments: the command line after ``report``.
        prog: how the command was called.

    Returns:
        The exit status: 0. Wrong arguments, and a folder without any run, exit with 2.
    """
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
    page = render(found, folder).encode()
    try:
        write_atomically(output, lambda file: file.write(page))
    except OSError as error:
        parser.error(f"output: expected a file that can be written, got {error}")
    print(
        f"page  {output}  ({len(found.summaries)} summaries, {len(found.records)} runs, "
        f"{len(page) / 1e6:.1f} MB)"
    )
    return 0


HINT = "run a study first, such as 'python -m studies spirals --quick'"
