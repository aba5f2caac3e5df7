"""Shared by tests of studies: running a command, reading what it left, what a machine may lack."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from studies.__main__ import main


def run(*arguments: object) -> None:
    """Run a command in this process."""
    assert main([str(argument) for argument in arguments]) == 0


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of runs, without the summaries."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [record for record in found if "identity" in record]


def read_summary(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.summary.json").read_text())


def assert_claims_hold(summary: dict[str, Any]) -> None:
    assert summary["claims"], "a study without claims"
    broken = [c for c in summary["claims"] if not c["holds"]]
    assert not broken, broken


def assert_picture(path: Path, width: int = 600, height: int = 300) -> None:
    """Assert that a PNG file shows something."""
    from matplotlib.image import imread

    picture = imread(path)
    assert picture.shape[0] > height
    assert picture.shape[1] > width
    assert picture[..., :3].std() > 0.05, "an empty picture"
    assert len({tuple(pixel) for pixel in picture[::7, ::7].reshape(-1, picture.shape[2])}) > 20


def need(present: object, what: str) -> None:
    """Skip a test on a machine without ``what``; CI, which has all, fails instead."""
    if present:
        return
    if os.environ.get("ANDMASK_TEST_ALL"):
        pytest.fail(f"ANDMASK_TEST_ALL is set, but there is no {what}")
    pytest.skip(f"needs {what}")
