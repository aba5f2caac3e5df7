"""The data: which levels, where they lie, and how the game's Python makes them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .game.world import Array

VARIABLE = "ANDMASK_GAME_PYTHON"
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Levels:
    """The levels of one split."""

    first: int  # its number; the others follow
    count: int
    states: int  # kept of each, at most
    expansions: int  # of the expert's search in each


@dataclass(frozen=True)
class DataSettings:
    """What decides the data.

    Args:
        train: levels to clone the expert on.
        validation: levels that settings are chosen by.
        test: levels for the results.
        revision: raised when the search changes.
    """

    train: Levels = Levels(0, 64, 400, 700)
    validation: Levels = Levels(1000, 40, 50, 300)
    test: Levels = Levels(2000, 100, 20, 300)
    revision: int = 1

    @property
    def key(self) -> str:
        """Return what names these data."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]

    def file(self, folder: Path) -> Path:
        """Return where the data lie in a folder."""
        return folder / f"levels-{self.key}.npz"


@dataclass(frozen=True)
class States:
    """Recorded states."""

    frames: Tensor  # uint8 [states, 3, 64, 64]
    targets: Tensor  # the expert's policy, [states, actions]
    level: Tensor  # number of the level of each
    levels: list[int]  # all of them, with or without states
    plans: Array  # the expert's actions from the start of each level, then -1
    rewards: Array  # and the frames, when that plan is played
    durations: Array


@lru_cache(maxsize=3)
def load(file: Path, split: str) -> States:
    """Read one split."""
    with np.load(file) as content:
        part = {
            name: content[f"{split}_{name}"]
            for name in ("frames", "targets", "level", "levels", "expert_plan", "expert")
        }
    return States(
        frames=torch.from_numpy(part["frames"]).permute(0, 3, 1, 2),
        targets=torch.from_numpy(part["targets"]),
        level=torch.from_numpy(part["level"]),
        levels=part["levels"].tolist(),
        plans=part["expert_plan"],
        rewards=part["expert"][:, 0],
        durations=part["expert"][:, 1],
    )


def find_python(given: str | None) -> str:
    """Find a Python that has the game."""
    found = given or os.environ.get(VARIABLE)
    if found is None and importlib.util.find_spec("procgen"):
        found = sys.executable
    advice = (
        "procgen2 needs numpy < 2, so give it an environment of its own: "
        "python3 -m venv ~/.procgen; ~/.procgen/bin/pip install procgen2 'numpy<2'; "
        f"then --game-python ~/.procgen/bin/python, or {VARIABLE}"
    )
    if found is None:
        raise ValueError(f"game-python: expected a Python with procgen2, got none; {advice}")
    found = os.path.expanduser(found)
    try:
        call = [found, "-c", "import procgen"]
        answer = subprocess.run(call, capture_output=True, text=True, check=False)
        problem = answer.stderr.strip().rpartition("\n")[2] if answer.returncode else ""
    except OSError as error:
        problem = str(error)
    if problem:
        raise ValueError(
            f"game-python: expected a Python with procgen2, got {found} ({problem}); {advice}"
        )
    return found


def game_command(python: str) -> list[str]:
    """Return the command that runs the game's side."""
    run = "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); "
    run += "runpy.run_module('game', run_name='__main__', alter_sys=True)"
    return [python, "-c", run, str(HERE)]


def game_version(command: Sequence[str]) -> str:
    """Return the version of procgen2."""
    code = "from importlib.metadata import version; print(version('procgen2'))"
    call = [command[0], "-c", code]
    answer = subprocess.run(call, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "of unknown version"


def make(settings: DataSettings, file: Path, command: Sequence[str]) -> None:
    """Have the game's side make the data; what it did before an interruption is not done again."""
    arguments = [*command, "collect", "--output", str(file)]
    for split in ("train", "validation", "test"):
        arguments += [f"--{split}", *map(str, asdict(getattr(settings, split)).values())]
    # A session of its own, so that Ctrl-C comes to us alone and ends it in our way. It ends with
    # its input, which closes with us even if we are killed; communicate() would close it at once.
    with subprocess.Popen(
        arguments, start_new_session=True, stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        try:
            errors = process.stderr.read()
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise RuntimeError(f"the game's side failed:\n{errors.decode(errors='replace')}")
