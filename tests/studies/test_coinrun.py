"""CoinRun without the game: the expert's search on a toy world, cloning, the talk with a server."""

import math
import struct
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("sklearn")

from studies.coinrun import data, training
from studies.coinrun.data import States, find_python
from studies.coinrun.game.expert import AT_ONCE, Search, policy, search
from studies.coinrun.game.world import ACTIONS, FRAMES, pose
from studies.coinrun.network import PolicyNetwork
from studies.coinrun.settings import FIRST, METHODS, SPACES, trials
from studies.coinrun.training import (
    CoinRunSettings,
    batches,
    divergence,
    train,
)
from studies.records import RunFiles

# ---- the expert, in a corridor ----

LEFT, WAIT, UP, RIGHT = (ACTIONS.index(one) for one in ("left", "wait", "up", "right"))
PIT, END = 6, 12  # an action moves by 2 cells; a pit has to be jumped over; the coin is at the end


def state_of(x, airborne):
    def numbers(count):
        return struct.pack(f"<{count}i", *range(count))

    name, generator = b"coinrun", b"12 34 56"
    text = numbers(1) + struct.pack("<i", len(name)) + name + numbers(17)
    for after in (0, 17):
        text += numbers(1) + struct.pack("<i", len(generator)) + generator + numbers(after)
    return text + struct.pack("<4f", x, float(airborne), 0.0, 0.0)


def step(x, airborne, action):
    """Return where an action leads, and the frames after which the level ends, if it does."""
    x = max(0, x + {"left": -2, "right": 2}.get(ACTIONS[action].split()[0], 0))
    if x >= END:
        return x, False, FRAMES - 1
    if x == PIT and not airborne:
        return x, False, 1
    return x, ACTIONS[action].endswith("up") and not airborne, None


class Corridor:
    """Stands in for the game: pushing right from a jump is the only way over the pit."""

    def __init__(self):
        self.copies = AT_ONCE * len(ACTIONS)
        self.places = [(0, False)] * self.copies
        self.env = self

    def get_state(self):
        return [state_of(*place) for place in self.places]

    def set_state(self, states):
        self.places = [(int(pose(one)[0]), pose(one)[1] > 0) for one in states]

    def frames(self):
        return np.array([np.full((64, 64, 3), x) for x, _ in self.places], np.uint8)

    def act(self, actions):
        after = [step(*place, action) for place, action in zip(self.places, actions, strict=True)]
        self.places = [(x, airborne) for x, airborne, _ in after]
        done = np.array([end is not None for *_, end in after])
        lasted = np.array([end or FRAMES for *_, end in after])
        return np.array([10.0 * (x >= END) for x, *_ in after]), done, lasted


def frames_of(plan):
    """Return the frames after which a plan reaches the coin; infinity if it does not."""
    place, frames = (0, False), 0
    for action in plan:
        x, airborne, end = step(*place, action)
        frames += end or FRAMES
        if end is not None:
            return frames if x >= END else math.inf
        place = x, airborne
    return math.inf


def test_position_and_velocity_are_read_from_a_state():
    assert pose(state_of(3.5, True)) == (3.5, 1.0, 0.0, 0.0)


def test_the_expert_finds_the_fastest_way():
    graph = search(Corridor(), Search(expansions=100))
    plan = graph.best_plan()
    every = min(map(frames_of, product((LEFT, WAIT, UP, RIGHT, RIGHT + 1), repeat=7)))
    assert frames_of(plan) == every == graph.costs()[0].min()
    assert {image[0, 0, 0] for image in graph.images} == {0, 2, 4, 6, 8, 10}


def test_the_policy_prefers_what_is_faster():
    costs = np.array([[8.0, 8.0, 12.0, np.inf]])
    expected = np.exp([0, 0, -2, -np.inf])
    np.testing.assert_allclose(policy(costs, 2.0)[0], expected / expected.sum(), rtol=1e-6)


# ---- the network ----


def test_it_is_a_resnet_18():
    # 11,176,512 parameters in front of the head, as in He et al. with 64 channels.
    parameters = sum(p.numel() for p in PolicyNetwork(64, 6).parameters())
    assert parameters == 11_176_512 + 6 * 512 + 6


# ---- cloning ----


def some_states(levels=3, each=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = levels * each
    targets = torch.rand(count, len(ACTIONS), generator=generator)
    targets[:, 0] = 0.0
    return States(
        frames=torch.randint(256, (count, 3, 64, 64), generator=generator).to(torch.uint8),
        targets=targets / targets.sum(1, keepdim=True),
        level=torch.arange(levels).repeat_interleave(each),
        levels=list(range(levels)),
        plans=np.zeros((levels, 4), np.int8),
        rewards=np.full(levels, 10.0),
        durations=np.full(levels, 9.0),
    )


@pytest.fixture
def states(monkeypatch):
    found = some_states()
    monkeypatch.setattr(training, "load", lambda file, split: found)
    return found


TINY = CoinRunSettings("trial", "temporal", "x", epochs=4, batch=4, width=8, measure_every=2)
TINY = replace(TINY, lr=1e-3, beta1=0.5, beta3=0.8, tau=0.3, bias_correction=False)


def test_a_step_has_the_states_of_one_level(states):
    torch.manual_seed(0)
    number = {frame.numpy().tobytes(): place for place, frame in enumerate(states.frames)}
    seen = []
    for frames, targets in batches(states, 4):
        rows = [number[frame.numpy().tobytes()] for frame in frames]
        assert len(set(rows)) == 4
        assert torch.equal(targets, states.targets[rows])
        assert len(states.level[rows].unique()) == 1
        seen.append(int(states.level[rows[0]]))
    assert sorted(seen) == [0, 1, 2]
    assert [len(frames) for frames, _ in batches(states, 99)] == [10, 10, 10]


def test_the_divergence_is_that_of_the_expert_from_the_clone():
    logits, targets = torch.randn(7, 6), some_states(1, 7).targets
    shares = logits.softmax(1)
    terms = targets * (targets / shares).log()
    torch.testing.assert_close(divergence(logits, targets), terms.nan_to_num().sum(1).mean())


@pytest.mark.parametrize("method", METHODS)
def test_training_follows_the_printed_formula(states, tmp_path, method):
    settings = replace(TINY, method=method, epochs=1, batch=99, weight_decay=0.1)
    model, _ = train(settings, 0, RunFiles(tmp_path, "run", {}), lambda *_: None)
    torch.manual_seed(0)
    twin = PolicyNetwork(8, len(ACTIONS))
    plain = [p.detach().clone() for p in twin.parameters()]
    moments = [[torch.zeros_like(p) for p in plain] for _ in range(3)]
    torch.manual_seed(0)  # that of epoch 0
    for number, (frames, targets) in enumerate(batches(states, 99), start=1):
        for p, value in zip(twin.parameters(), plain, strict=True):
            p.data.copy_(value)
        twin.zero_grad()
        logits = twin(frames)
        (-(targets * logits.log_softmax(1)).sum(1).mean()).backward()
        for p, value, m, v, a in zip(twin.parameters(), plain, *moments, strict=True):
            m.mul_(0.5).add_(p.grad, alpha=0.5)
            v.mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
            a.mul_(0.8).add_(p.grad.sign(), alpha=0.2)
            value.mul_(1 - 1e-3 * 0.1)
            if method == "adam":
                value -= 1e-3 * (m / (1 - 0.5**number)) / ((v / (1 - 0.999**number)).sqrt() + 1e-8)
            else:
                value -= 1e-3 * m * (a.abs() >= 0.3 - 1e-6) / (v.sqrt() + 1e-8)
    # Signs of gradients near zero may differ by rounding: nearly all coordinates are compared.
    near = [
        torch.isclose(p.detach(), value, rtol=1e-3, atol=1e-5).double().mean()
        for p, value in zip(model.parameters(), plain, strict=True)
    ]
    moved = [
        (p.detach() - value).abs().max() for p, value in zip(model.parameters(), plain, strict=True)
    ]
    assert min(near) > 0.9, moved
    assert sum(near) / len(near) > 0.99


# ---- the search ----


@pytest.mark.parametrize("method", METHODS)
def test_both_methods_have_equal_budgets(method):
    found = trials(method, 8)
    assert len({str(one) for one in found}) == len(found) == 8
    assert found[0] == FIRST[method]
    assert all(set(one) == set(SPACES[method]) for one in found[1:])
    assert trials(method, 3) == found[:3]


# ---- messages ----


def test_a_python_without_the_game_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv(data.VARIABLE, raising=False)
    with pytest.raises(ValueError, match=r"game-python: .*got /no/python.*pip install procgen2"):
        find_python("/no/python")
    monkeypatch.setenv(data.VARIABLE, "/another/python")
    with pytest.raises(ValueError, match="got /another/python"):
        find_python(None)
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'No module named procgen' >&2\nexit 1\n")
    fake.chmod(0o755)
    with pytest.raises(ValueError, match="No module named procgen"):
        find_python(str(fake))
    fake.write_text("#!/bin/sh\nexit 0\n")
    assert find_python(str(fake)) == str(fake)
