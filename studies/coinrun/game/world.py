"""The game as this study sees it: six actions, frames, states to go back to."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

ACTIONS = ("left", "left up", "wait", "up", "right", "right up")
BUTTONS = np.array([1, 2, 4, 5, 7, 8], dtype=np.int32)  # the game's numbers of them
FRAMES = 4  # that an action lasts


class Game:
    """Copies of one level, side by side, that can be put into any state."""

    def __init__(self, copies: int, level: int, mode: str) -> None:
        from procgen import ProcgenGym3Env

        self.copies = copies
        self.env = ProcgenGym3Env(
            num=copies,
            env_name="coinrun",
            start_level=level,
            num_levels=1,
            distribution_mode=mode,
            paint_vel_info=True,
            rand_seed=0,
            num_threads=0,
        )

    def frames(self) -> Array:
        """Return what each copy shows, uint8 of shape [copies, 64, 64, 3]."""
        frames: Array = self.env.observe()[1]["rgb"]
        return frames

    def act(self, actions: Array) -> tuple[Array, Array, Array]:
        """Act for four frames or until the level ends: rewards, which ended, frames played."""
        reward, done = np.zeros(self.copies), np.zeros(self.copies, bool)
        lasted = np.zeros(self.copies, np.int64)
        for _ in range(FRAMES):
            self.env.act(BUTTONS[actions])
            new, _, first = self.env.observe()
            reward += np.where(done, 0.0, new)
            lasted += ~done
            done |= first
        return reward, done, lasted


def pose(state: bytes) -> tuple[float, float, float, float]:
    """Read position and velocity of the player from a state of the game.

    It begins with words and numbers of 4 bytes each; strings, among them the two random
    generators, have their length before them.
    """
    place = 4
    for numbers in (17, 0):  # the game's name and options; the generator of the level
        place += 4 + struct.unpack_from("<i", state, place)[0] + 4 * numbers + 4
    place += 4 + struct.unpack_from("<i", state, place)[0] + 4 * 17
    x, y, vx, vy = struct.unpack_from("<4f", state, place)
    return x, y, vx, vy


def replay(level: int, plan: Sequence[int], mode: str) -> tuple[float, int]:
    """Play a plan from the start of a level: reward, and frames played."""
    game, frames = Game(1, level, mode), 0
    for action in plan:
        reward, done, lasted = game.act(np.array([action]))
        frames += int(lasted[0])
        if done[0]:
            return float(reward[0]), frames
    return 0.0, frames


def play(
    levels: Sequence[int], mode: str, send: Callable[[bytes], Any], ask: Callable[[int], bytes]
) -> None:
    """Play levels side by side for someone who sees only the frames.

    First, and after each action, goes out for each level: the frame (uint8), reward (float32) and
    whether the level has ended (uint8), three arrays one after the other. One byte for each level
    comes in: its action, of no effect where the level has ended. An end of input ends it.
    """
    once = {level: Game(1, level, mode).env.get_state()[0] for level in sorted(set(levels))}
    game = Game(len(levels), levels[0], mode)
    game.env.set_state([once[level] for level in levels])
    frames, over = game.frames().copy(), np.zeros(len(levels), bool)
    reward = np.zeros(len(levels))
    while True:
        send(frames.tobytes() + reward.astype("<f4").tobytes() + over.astype(np.uint8).tobytes())
        actions = np.frombuffer(ask(len(levels)), np.uint8)
        if len(actions) < len(levels):
            return
        reward, done, _ = game.act(actions)
        reward[over] = 0.0
        running = ~over & ~done
        frames[running] = game.frames()[running]
        over |= done
