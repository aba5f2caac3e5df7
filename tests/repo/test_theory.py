"""The page on theory says only what runs: its Python blocks, in order, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "theory.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[int, str]]:
    """Return the blocks of the page with the number of the line before each."""
    text = PAGE.read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start(1)), found[1]) for found in BLOCK.finditer(text)]


def test_every_block_runs() -> None:
    namespace: dict[str, object] = {"__name__": "theory"}
    for line, source in blocks():
        # Empty lines in front: a traceback names the line of the page.
        exec(compile("\n" * line + source, str(PAGE), "exec"), namespace)


def test_every_block_claims_something() -> None:
    silent = [line for line, source in blocks() if not re.search(r"^ *assert ", source, re.M)]
    assert silent == []


def test_no_block_is_missed() -> None:
    fences = re.findall(r"^ *```.*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(blocks()) >= 9
    assert fences == ["```python", "```"] * len(blocks())
