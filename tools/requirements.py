"""Prints what a development environment needs: to build, and for the extras that are named.

python tools/requirements.py dev
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib


def requirements(extra: str, extras: dict[str, list[str]]) -> list[str]:
    """Return the requirements of an extra, with those of the extras that it names."""
    lines = []
    for line in extras[extra]:
        others = re.fullmatch(r"andmask_ext\[(.+)\]", line)
        for other in others[1].split(",") if others else []:
            lines += requirements(other.strip(), extras)
        if not others:
            lines.append(line)
    return lines


def main(names: list[str]) -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)
    lines = project["build-system"]["requires"] + project["project"]["dependencies"]
    for name in names:
        lines += requirements(name, project["project"]["optional-dependencies"])
    print("\n".join(dict.fromkeys(lines)))


if __name__ == "__main__":
    main(sys.argv[1:])
