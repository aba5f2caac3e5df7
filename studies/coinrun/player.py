"""Playing: policies here, the game in its own process."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import torch
from torch import Tensor, nn

from .game.world import ACTIONS, Array

SIDE = 64
Policy = Callable[[Tensor, Tensor], Tensor]


class GameServer:
    """Levels that are played side by side in the game's process."""

    def __init__(self, command: Sequence[str], levels: Sequence[int]) -> None:
        self._count = len(levels)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        # A session of its own, so that Ctrl-C comes to us alone; it ends with its input.
        self._process = subprocess.Popen(
            [*command, "play", *map(str, levels)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )

    def __enter__(self) -> GameServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._process.wait()

    def look(self) -> tuple[Tensor, Array, Array]:
        """Return frames [levels, 3, 64, 64], rewards, and which levels have ended."""
        count = self._count
        content = self._read(count * (3 * SIDE * SIDE + 4 + 1))
        frames = np.frombuffer(content, np.uint8, count * 3 * SIDE * SIDE)
        rewards = np.frombuffer(content, "<f4", count, len(frames))
        over = np.frombuffer(content, np.uint8, count, len(frames) + 4 * count) != 0
        shaped = torch.from_numpy(frames.reshape(count, SIDE, SIDE, 3).copy())
        return shaped.permute(0, 3, 1, 2), rewards, over

    def act(self, actions: Array) -> None:
        """Send an action for each level."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(actions.astype(np.uint8).tobytes())
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()

    def _read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        content = self._process.stdout.read(size)
        if len(content) < size:
            self._fail()
        return content

    def _fail(self) -> None:
        self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace")
        raise RuntimeError(f"the game's process has ended ({self._process.returncode}):\n{said}")


@dataclass
class Played:
    """How levels went."""

    rewards: Array
    decisions: Array  # how many actions were taken in each
    over: Array  # which levels ended before the last decision
    frames: list[Tensor] = field(default_factory=list)


def play(
    command: Sequence[str],
    parts: Mapping[str, tuple[Sequence[int], Policy]],
    limit: int,
    keep: bool = False,
) -> dict[str, Played]:
    """Play levels once each, all at the same time, for at most ``limit`` decisions.

    ``parts`` has numbers of levels and the policy that plays them, by name. A policy gets frames
    and the places of their levels within its part, and returns actions.
    """
    played = {
        name: Played(np.zeros(len(levels)), np.zeros(len(levels), int), np.zeros(len(levels), bool))
        for name, (levels, _) in parts.items()
    }
    starts = np.cumsum([0, *(len(levels) for levels, _ in parts.values())])
    slices = [slice(*ends) for ends in itertools.pairwise(starts.tolist())]
    everything = [level for levels, _ in parts.values() for level in levels]
    with GameServer(command, everything) as server:
        for decision in range(limit + 1):
            frames, rewards, over = server.look()
            actions = np.zeros(len(everything), np.uint8)
            last = decision == limit or bool(over.all())
            for here, one, (_, policy) in zip(slices, played.values(), parts.values(), strict=True):
                one.rewards += rewards[here]
                one.over = over[here]
                if keep:
                    one.frames.append(frames[here])
                places = np.flatnonzero(~over[here])
                if not last and len(places):
                    choice = policy(frames[here][places], torch.from_numpy(places))
                    actions[here][places] = choice.numpy()
                    one.decisions += ~over[here]
            if last:
                break
            server.act(actions)
    return played


def greedy(model: nn.Module) -> Policy:
    """Return the policy that takes the most likely action of a network.

    Of scores that are not numbers, since training diverged, the first is taken.
    """

    def policy(frames: Tensor, places: Tensor) -> Tensor:
        with torch.inference_mode():
            choice: Tensor = model(frames).argmax(1)
        return choice

    return policy


def sampled(model: nn.Module, seed: int) -> Policy:
    """Return the policy that draws actions by the probabilities of a network.

    Where these are not numbers, since training diverged, all actions are equally likely.
    """
    generator = torch.Generator().manual_seed(seed)

    def policy(frames: Tensor, places: Tensor) -> Tensor:
        with torch.inference_mode():
            shares = model(frames).softmax(1)
        shares = torch.where(shares.isfinite().all(1, keepdim=True), shares, 1 / shares.shape[1])
        return torch.multinomial(shares, 1, generator=generator)[:, 0]

    return policy


def uniform(seed: int) -> Policy:
    """Return the policy that draws any action."""
    generator = torch.Generator().manual_seed(seed)
    return lambda frames, places: torch.randint(len(ACTIONS), (len(frames),), generator=generator)


def always(action: str) -> Policy:
    """Return the policy that knows one action."""
    number = ACTIONS.index(action)
    return lambda frames, places: torch.full((len(frames),), number)


def follow(plans: Array) -> Policy:
    """Return the policy that takes the actions of plans, one plan for each level."""
    steps = np.zeros(len(plans), int)

    def policy(frames: Tensor, places: Tensor) -> Tensor:
        rows = places.numpy()
        actions = plans[rows, steps[rows]]
        steps[rows] += 1
        return torch.from_numpy(np.maximum(actions, 0).astype(np.int64))

    return policy
