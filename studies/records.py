"""Results on disk: a JSON record for each run, found again by all that decided its outcome.

A run is described by an *identity*: a flat mapping with its settings, seed, thread count and the
versions of the software. On one machine, two runs with the same identity give the same numbers, so
a record with an equal identity may be reused, and a checkpoint with an equal identity may be
continued; anything else gets a file name of its own. All files appear whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch

Identity = Mapping[str, Any]
History = dict[str, list[Any]]

CHECKPOINT_SECONDS = 1.0  # at least, between checkpoints
CHECKPOINT_SHARE = 1 / 20  # of the time, at most, goes into them
CHECKPOINT_HEAD = b"andmask checkpoint, sha256 "  # then the digest of the rest, and a line break


class Stateful(Protocol):
    """A model, an optimizer, a schedule: what has a state dict."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take a state."""


def canonical(identity: Identity) -> str:
    """Write an identity as JSON in one fixed way; a number that is not finite raises ValueError.

    Example:
        >>> canonical({"tau": 0.8, "decay": (0.5, 0.75)})
        '{"decay": [0.5, 0.75], "tau": 0.8}'
    """
    return json.dumps(identity, sort_keys=True, allow_nan=False)


class RunFiles:
    """The files of one run: record, final weights, and the checkpoint while it lasts.

    The identity has everything that decides the outcome of the run; its hash ends the file names.

    The time of a run counts from the making of this object, and goes on where a checkpoint left it.

    Example:
        >>> files = RunFiles(Path("runs"), "mean-seed0", {"seed": 0, "tau": 0.8})
        >>> files.record.name
        'mean-seed0-0aa23cab.json'
    """

    def __init__(self, folder: Path | str, name: str, identity: Identity) -> None:
        self._identity = json.loads(canonical(identity))
        key = hashlib.sha256(canonical(identity).encode()).hexdigest()[:8]
        self.record = Path(folder) / f"{name}-{key}.json"
        self.weights = self.record.with_suffix(".pt")
        self.checkpoint = self.record.with_suffix(".checkpoint")
        self._started = time.perf_counter()

    def read_record(self) -> dict[str, Any] | None:
        """Read the finished record; None where there is none of this very identity."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError, RecursionError):
            return None
        if not isinstance(record, dict) or record.get("identity") != self._identity:
            return None
        return record if self.weights.exists() or not record.get("weights") else None

    def finish(
        self, results: Mapping[str, Any], weights: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Write weights and record, where NaN and infinities are null, then drop the checkpoint."""
        if weights is not None:
            content = _serialized(dict(weights))
            write_atomically(self.weights, lambda file: file.write(content))
        record = {
            "identity": self._identity,
            **without_nan(dict(results)),
            "seconds": self._seconds(),
            "weights": weights is not None,
        }
        text = json.dumps(record, indent=1, allow_nan=False)
        write_atomically(self.record, lambda file: file.write(text.encode() + b"\n"))
        self.checkpoint.unlink(missing_ok=True)

    def read_checkpoint(self) -> dict[str, Any] | None:
        """Read the state of an interrupted run; None without one, or where it is damaged."""
        try:
            head, _, content = self.checkpoint.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        # torch.load sees neither flipped bits nor every cut.
        if head != CHECKPOINT_HEAD + _digest(content):
            print(f"{self.checkpoint} is damaged, the run begins anew", file=sys.stderr)
            return None
        saved: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
        if saved["identity"] != self._identity:
            return None
        self._started = time.perf_counter() - saved["seconds"]
        state: dict[str, Any] = saved["state"]
        return state

    def write_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint by tensors, numbers, strings and containers of them."""
        content = _serialized(
            {"identity": self._identity, "seconds": self._seconds(), "state": dict(state)}
        )
        head = CHECKPOINT_HEAD + _digest(content) + b"\n"
        write_atomically(self.checkpoint, lambda file: file.write(head + content))

    def epochs(
        self, total: int, seed: int, history: History, parts: Mapping[str, Stateful]
    ) -> Iterator[int]:
        """Yield the epochs that are still to be done, and keep checkpoints between them.

        Before each epoch torch's global generator is seeded by ``seed`` and the epoch: if all that
        is random in an epoch comes from there, it needs nothing from the one before but ``parts``,
        and a run that was interrupted ends with the same bits as one that was not. Draw data from
        another stream: in the first epoch of seed 0 this one is that of ``torch.manual_seed(0)``.
        A checkpoint is loaded into ``parts`` (model, optimizer and whatever else changes) and into
        the lists of ``history``, which the loop's body appends to.

        Example:
            >>> import tempfile
            >>> files = RunFiles(tempfile.mkdtemp(), "run", {"seed": 0})
            >>> model, history = torch.nn.Linear(1, 1), {"loss": []}
            >>> for epoch in files.epochs(3, 0, history, {"model": model}):
            ...     history["loss"].append(1 / (1 + epoch))
            >>> len(history["loss"])
            3
        """
        done = 0
        if state := self.read_checkpoint():
            done = state["done"]
            for name, part in parts.items():
                part.load_state_dict(state["parts"][name])
            for name, values in state["history"].items():
                history[name][:] = values
        saved, pause = time.perf_counter(), CHECKPOINT_SECONDS
        for epoch in range(done, total):
            torch.manual_seed(seed * 1_000_003 + epoch)
            yield epoch
            now = time.perf_counter()
            if now - saved >= pause and epoch + 1 < total:
                self.write_checkpoint(
                    {
                        "done": epoch + 1,
                        "parts": {name: part.state_dict() for name, part in parts.items()},
                        "history": history,
                    }
                )
                saved = time.perf_counter()
                pause = max(CHECKPOINT_SECONDS, (saved - now) / CHECKPOINT_SHARE)

    def read_weights(self) -> dict[str, torch.Tensor]:
        """Read the final weights."""
        weights: dict[str, torch.Tensor] = torch.load(self.weights, weights_only=True)
        return weights

    def _seconds(self) -> float:
        return time.perf_counter() - self._started


def _serialized(content: object) -> bytes:
    """Return what torch.save writes. To a full disk it would raise no OSError."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def without_nan(value: Any) -> Any:
    """Return a JSON-like value with None in the place of NaN and infinities."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that a reader, or the next run after a crash, sees the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # it would hide why nothing was written
            temporary.unlink(missing_ok=True)
