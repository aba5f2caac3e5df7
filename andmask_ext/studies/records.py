"""Results on disk: a JSON record for each run, found again by all that decided its outcome.

A run is described by an *identity*: a flat mapping with its settings, seed, thread count and the
versions of the software. Two runs with the same identity give the same numbers, so a record with
an equal identity may be reused, and a checkpoint with an equal identity may be continued; anything
else gets a file name of its own. All files appear whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

Identity = Mapping[str, Any]


def canonical(identity: Identity) -> str:
    """Write an identity as JSON in one fixed way, so that equal identities are equal strings.

    Args:
        identity: a mapping that JSON can hold; tuples count as lists.

    Returns:
        JSON with sorted keys.

    Raises:
        ValueError: a value is NaN or infinite, which JSON cannot hold.

    Example:
        >>> canonical({"tau": 0.8, "decay": (0.5, 0.75)})
        '{"decay": [0.5, 0.75], "tau": 0.8}'
    """
    return json.dumps(identity, sort_keys=True, allow_nan=False)


class RunFiles:
    """The files of one run: record, final weights, and the checkpoint while it lasts.

    Args:
        folder: output folder; made when something is first written.
        name: readable start of the file names, such as ``and-mask-seed0``.
        identity: everything that decides the outcome of the run; a hash of it ends the file names.

    Example:
        >>> files = RunFiles(Path("runs"), "mean-seed0", {"seed": 0, "tau": 0.8})
        >>> files.record.name
        'mean-seed0-0aa23cab.json'
    """

    def __init__(self, folder: Path, name: str, identity: Identity) -> None:
        self._identity = json.loads(canonical(identity))
        key = hashlib.sha256(canonical(identity).encode()).hexdigest()[:8]
        self.record = Path(folder) / f"{name}-{key}.json"
        self.weights = self.record.with_suffix(".pt")
        self.checkpoint = self.record.with_suffix(".checkpoint")

    def read_record(self) -> dict[str, Any] | None:
        """Read the finished record.

        Returns:
            The record, or None where there is none of this very identity.
        """
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            return None
        matches = isinstance(record, dict) and record.get("identity") == self._identity
        return record if matches and self.weights.exists() else None

    def finish(self, results: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> None:
        """Write weights and record, then drop the checkpoint.

        Args:
            results: what to keep beside the identity; NaN and infinities, which JSON does not
                know, are written as null.
            weights: state dict of the trained model.
        """
        write_atomically(self.weights, lambda file: torch.save(dict(weights), file))
        record = {"identity": self._identity, **_without_nan(dict(results))}
        text = json.dumps(record, indent=1, allow_nan=False)
        write_atomically(self.record, lambda file: file.write(text.encode() + b"\n"))
        self.checkpoint.unlink(missing_ok=True)

    def read_checkpoint(self) -> dict[str, Any] | None:
        """Read the state of an interrupted run.

        Returns:
            The state given to :meth:`write_checkpoint`, or None where there is none.
        """
        try:
            saved: dict[str, Any] = torch.load(self.checkpoint, weights_only=True)
        except FileNotFoundError:
            return None
        return saved["state"] if saved["identity"] == self._identity else None

    def write_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint.

        Args:
            state: tensors, numbers, strings and containers of them.
        """
        saved = {"identity": self._identity, "state": dict(state)}
        write_atomically(self.checkpoint, lambda file: torch.save(saved, file))

    def read_weights(self) -> dict[str, torch.Tensor]:
        """Read the final weights.

        Returns:
            The state dict of the trained model.
        """
        weights: dict[str, torch.Tensor] = torch.load(self.weights, weights_only=True)
        return weights


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that a reader, or the next run after a crash, sees the old or the new one.

    Args:
        path: where the file shall be; its folder is made.
        write: called with an open binary file.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
