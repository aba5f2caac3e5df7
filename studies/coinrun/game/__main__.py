"""The command line of the game's side."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from .expert import AT_ONCE, Search, policy, search
from .world import ACTIONS, Array, Game, play, replay

Parts = dict[str, Array]
SPLITS = ("train", "validation", "test")


def collect_level(level: int, options: Search) -> Parts:
    """Solve a level and keep states of it.

    ``frames``, ``targets`` (the policy) and ``plans`` (the actions from the start to the state,
    then -1) are by state. ``plan`` has the expert's actions, none if it found no coin, and
    ``expert`` reward and frames when that plan is played from the start.
    """
    graph = search(Game(AT_ONCE * len(ACTIONS), level, options.mode), options)
    plan, costs = graph.best_plan(), graph.costs()
    nodes = np.zeros(0, np.int64)
    if plan is not None:
        useful = np.flatnonzero(np.isfinite(costs.min(1)))
        nodes = np.random.default_rng((options.seed, level)).permutation(useful)
        nodes = np.sort(nodes[: options.states])
    reward, frames = replay(level, plan or [], options.mode)
    plans = [graph.plan(int(node)) for node in nodes]
    longest = max(map(len, plans), default=0)
    return {
        "frames": np.array([graph.images[node] for node in nodes], np.uint8).reshape(-1, 64, 64, 3),
        "targets": policy(costs[nodes], options.temperature),
        "plans": np.array([one + [-1] * (longest - len(one)) for one in plans], np.int8).reshape(
            len(plans), longest
        ),
        "plan": np.array(plan or [], np.int8),
        "expert": np.array([reward, frames], np.float32),
    }


def collect(splits: dict[str, tuple[int, int, Search]], output: Path) -> None:
    """Collect levels, one file for each until all are there, then one file of all."""
    parts = output.with_suffix(".parts")
    parts.mkdir(parents=True, exist_ok=True)
    work = [
        (split, level, options)
        for split, (first, count, options) in splits.items()
        for level in range(first, first + count)
    ]
    content: dict[str, list[Array]] = {}
    for number, (split, level, options) in enumerate(work, start=1):
        key = hashlib.sha256(json.dumps(asdict(options), sort_keys=True).encode()).hexdigest()[:8]
        path = parts / f"level-{level}-{key}.npz"
        if not path.exists():
            _write(path, collect_level(level, options))
        with np.load(path) as file:
            part = dict(file)
        count = len(part["frames"])
        reward, frames = part["expert"]
        ending = f"coin after {frames:.0f} frames" if reward > 0 else "no coin"
        print(f"[{number}/{len(work)}] {split} level {level}  {ending}  {count} states", flush=True)
        for name in ("frames", "targets"):
            content.setdefault(f"{split}_{name}", []).append(part[name])
        content.setdefault(f"{split}_plans", []).append(_padded(part["plans"]))
        content.setdefault(f"{split}_level", []).append(np.full(count, level, np.int32))
        content.setdefault(f"{split}_expert_plan", []).append(_padded(part["plan"][None]))
        content.setdefault(f"{split}_expert", []).append(part["expert"][None])
        content.setdefault(f"{split}_levels", []).append(np.array([level], np.int32))
    _write(output, {name: np.concatenate(arrays) for name, arrays in content.items()})
    for path in parts.iterdir():
        path.unlink()
    parts.rmdir()


def _padded(plans: Array, length: int = 256) -> Array:
    return np.pad(plans, ((0, 0), (0, length - plans.shape[1])), constant_values=-1)


def _write(path: Path, content: Parts) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **content)  # type: ignore[arg-type]
    temporary.replace(path)


def _splits(options: argparse.Namespace) -> Iterator[tuple[str, tuple[int, int, Search]]]:
    for split in SPLITS:
        first, count, states, expansions = getattr(options, split)
        yield (
            split,
            (
                first,
                count,
                Search(
                    mode=options.mode,
                    states=states,
                    expansions=expansions,
                    temperature=options.temperature,
                    seed=options.seed,
                ),
            ),
        )


def end_with_input() -> None:
    """End this process, from now on, when its standard input ends: nobody waits for it then."""

    def watch() -> None:
        while os.read(0, 1024):  # sys.stdin has a lock that the interpreter's end would wait for
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: Sequence[str]) -> int:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(prog="game.py", description=str(__doc__).splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("collect", help="make the data, until the input ends")
    for split in SPLITS:
        command.add_argument(
            f"--{split}",
            type=int,
            nargs=4,
            required=True,
            metavar=("FIRST", "LEVELS", "STATES", "EXPANSIONS"),
        )
    command.add_argument("--temperature", type=float, default=Search.temperature)
    command.add_argument("--seed", type=int, default=Search.seed)
    command.add_argument("--output", type=Path, required=True, metavar="FILE")
    server = commands.add_parser("play", help="play for the process at the other end of the pipe")
    server.add_argument("levels", type=int, nargs="+")
    for one in (command, server):
        one.add_argument("--mode", default=Search.mode)
    options = parser.parse_args(arguments)
    if options.command == "collect":
        end_with_input()
        collect(dict(_splits(options)), options.output)
    else:
        pipe = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)  # what libraries print must not reach the pipe

        def send(content: bytes) -> None:
            pipe.write(content)
            pipe.flush()

        play(options.levels, options.mode, send, sys.stdin.buffer.read)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
