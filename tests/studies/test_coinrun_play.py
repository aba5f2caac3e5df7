"""CoinRun: the talk with the game's process, here a small one of another game."""

import os
import signal
import subprocess
import sys

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("sklearn")

from studies.coinrun.player import always, greedy, play, sampled

# Level k ends after k + 1 actions, with a reward if all of them were k. Frames show k, and how
# many actions came.
SERVER = """
import sys
levels = [int(one) for one in sys.argv[2:]]
assert sys.argv[1] == "play"
steps, right = [0] * len(levels), [True] * len(levels)
rewards, over = [0.0] * len(levels), [False] * len(levels)
import struct
while True:
    for level, step in zip(levels, steps):
        sys.stdout.buffer.write(bytes([level, step, 7]) * 64 * 64)
    sys.stdout.buffer.write(struct.pack(f"<{len(levels)}f", *rewards))
    sys.stdout.buffer.write(bytes(over))
    sys.stdout.buffer.flush()
    actions = sys.stdin.buffer.read(len(levels))
    if len(actions) < len(levels):
        sys.exit()
    if 5 in actions:
        sys.exit("the fifth action breaks me")
    for place, level in enumerate(levels):
        rewards[place] = 0.0
        if not over[place]:
            steps[place] += 1
            right[place] &= actions[place] == level
            over[place] = steps[place] > level
            rewards[place] = 10.0 * (over[place] and right[place])
"""


@pytest.fixture
def server(tmp_path):
    path = tmp_path / "server.py"
    path.write_text(SERVER)
    return [sys.executable, str(path)]


def test_each_level_is_played_to_its_end(server):
    seen = []

    def policy(frames, places):
        seen.append((frames[:, 0, 0, 0].tolist(), frames[:, 1, 5, 5].tolist(), places.tolist()))
        assert (frames[:, 2] == 7).all()
        return torch.where(frames[:, 0, 0, 0] == 1, 0, frames[:, 0, 0, 0])

    played = play(server, {"a": ([2, 0, 1], policy)}, limit=9, keep=True)["a"]
    assert seen == [([2, 0, 1], [0, 0, 0], [0, 1, 2]), ([2, 1], [1, 1], [0, 2]), ([2], [2], [0])]
    assert played.rewards.tolist() == [10, 10, 0]
    assert played.decisions.tolist() == [3, 1, 2]
    assert played.over.all()
    assert [frames[0, 1, 0, 0].item() for frames in played.frames] == [0, 1, 2, 3]


def test_a_server_that_dies_is_heard(server):
    with pytest.raises(RuntimeError, match="the fifth action breaks me"):
        play(server, {"a": ([4], always("right up"))}, limit=9)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_network_that_diverged_plays_any_action(broken):
    def model(frames):
        logits = torch.zeros(len(frames), 6)
        logits[:, 2] = broken
        logits[0] = torch.tensor([0.0, 0, 0, 0, 99, 0])
        return logits

    frames, places = torch.zeros(4000, 3, 64, 64, dtype=torch.uint8), torch.arange(4000)
    choice = sampled(model, 0)(frames, places)
    assert choice[0] == 4
    counts = choice.bincount(minlength=6) / 4000
    torch.testing.assert_close(counts, torch.full((6,), 1 / 6), rtol=0, atol=0.03)
    assert set(greedy(model)(frames, places).tolist()) <= {2, 4}


# The game's side, but for the game: its data take forever.
ENDLESS = """
import os, sys, time
from studies.coinrun.game import __main__ as side
def collect(splits, output):
    print(os.getpid(), flush=True)
    time.sleep(600)
side.collect = collect
side.main(sys.argv[1:])
"""
PARENT = """
import sys
from pathlib import Path
from studies.coinrun.data import DataSettings, make
make(DataSettings(), Path(sys.argv[1]), [sys.executable, "-c", sys.argv[2]])
"""


def test_collecting_ends_with_a_parent_that_is_killed(tmp_path):
    call = [sys.executable, "-c", PARENT, str(tmp_path / "data.npz"), ENDLESS]
    with subprocess.Popen(call, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
        try:
            parent.communicate(timeout=240)  # the child has the same output: it ends with the child
        except subprocess.TimeoutExpired:
            os.kill(child, signal.SIGKILL)
            pytest.fail("collecting goes on, and nobody waits for it")
