"""What a folder holds: summaries, records, and files that are damaged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..summary import SUFFIX, Claim, Picture, Table


@dataclass(frozen=True)
class FoundSummary:
    """A summary, read again.

    Args:
        path: its file.
        facts: study, title, command and so on.
        claims: as written.
        tables: as written.
        pictures: as written, in the folder where the summary lies now.
        notes: as written.
    """

    path: Path
    facts: Mapping[str, Any]
    claims: Sequence[Claim]
    tables: Sequence[Table]
    pictures: Sequence[Picture]
    notes: Sequence[str]

    @property
    def name(self) -> str:
        """How it is called: that of its study, or of a part of it."""
        return self.path.name.removesuffix(SUFFIX)

    @property
    def study(self) -> str:
        """The command that wrote it."""
        return str(self.facts["study"])

    @property
    def quick(self) -> bool:
        """Whether it is that of a quick version."""
        return bool(self.facts.get("quick"))

    @property
    def held(self) -> int:
        """How many claims hold."""
        return sum(claim.holds for claim in self.claims)


@dataclass(frozen=True)
class FoundRecord:
    """A record of a run, read again.

    Args:
        path: its file.
        content: all of it.
    """

    path: Path
    content: Mapping[str, Any]

    @property
    def study(self) -> str:
        """The command that wrote it."""
        return str(self.content["identity"]["study"])


@dataclass
class Found:
    """What a folder and those in it hold.

    Args:
        summaries: in the order of their paths.
        records: in the order of their paths.
        damaged: files that are neither, but should be, and why they are not.
        unfinished: checkpoints of runs that were interrupted, or are under way.
    """

    summaries: list[FoundSummary] = field(default_factory=list)
    records: list[FoundRecord] = field(default_factory=list)
    damaged: list[tuple[Path, str]] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)


def collect(folder: Path) -> Found:
    """Read all summaries and records in a folder and the folders in it.

    JSON files of others, which have no ``identity``, are left alone.

    Args:
        folder: where to look.

    Returns:
        What was found.
    """
    found = Found(unfinished=sorted(folder.rglob("*.checkpoint")))
    for path in sorted(folder.rglob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
            if path.name.endswith(SUFFIX):
                found.summaries.append(_summary(path, content))
            elif isinstance(content, dict) and "identity" in content:
                found.records.append(_record(path, content))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            found.damaged.append((path, f"cannot be read: {error}"))
        except (ValueError, TypeError) as error:
            found.damaged.append((path, str(error)))
    return found


# What the page shows of a summary, if it says so.
_FACTS: dict[str, Any] = {"title": "", "about": "", "reference": "", "command": "", "runs": 0}


def _summary(path: Path, content: Any) -> FoundSummary:
    _expect(content, dict, "a summary")
    _expect(content.get("study"), str, "study")
    for key in ("claims", "tables", "pictures", "notes"):
        _expect(content.get(key), list, key)
    _expect(content.get("command", ""), str, "command")
    _expect(content.get("build", {}), dict, "build")
    _expect(content.get("seconds", 0), (int, float), "seconds")
    claims = [Claim(**_expect(one, dict, "a claim")) for one in content["claims"]]
    for claim in claims:
        _expect(claim.holds, bool, "holds")
    return FoundSummary(
        path,
        _FACTS | content,
        claims,
        [Table(**_expect(one, dict, "a table")) for one in content["tables"]],
        [
            Picture(
                path.parent / _expect(_expect(one, dict, "a picture").get("file"), str, "file"),
                str(one.get("caption", "")),
            )
            for one in content["pictures"]
        ],
        [str(note) for note in content["notes"]],
    )


def _record(path: Path, content: Mapping[str, Any]) -> FoundRecord:
    identity = _expect(content["identity"], dict, "identity")
    _expect(identity.get("study"), str, "study")
    for key in ("settings", "versions"):
        _expect(identity.get(key, {}), dict, key)
    for key in ("final", "history"):
        _expect(content.get(key, {}), dict, key)
    _expect(content.get("seconds", 0), (int, float), "seconds")
    return FoundRecord(path, content)


def _expect(value: Any, kind: type | tuple[type, ...], what: str) -> Any:
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(one.__name__ for one in kinds)
        raise TypeError(f"{what}: expected {wanted}, got {type(value).__name__}")
    return value


def _refuse(word: str) -> float:
    raise ValueError(f"expected numbers, got {word}")
