"""CoinRun with the game: data against their definition, and the quick study as a user runs it."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("sklearn")

from studies.coinrun.data import (
    VARIABLE,
    DataSettings,
    Levels,
    find_python,
    game_command,
    load,
    make,
)
from studies.coinrun.game.world import ACTIONS
from studies.coinrun.player import follow, play
from studies.coinrun.settings import QUICK

from .common import assert_picture, need, read_records, read_summary, run


def game():
    try:
        return game_command(find_python(None))
    except ValueError:
        return None


@pytest.fixture(scope="module")
def command():
    found = game()
    need(found, f"a Python with procgen2 ({VARIABLE})")
    return found


@pytest.fixture(scope="module")
def quick(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick")
    run("coinrun", "--quick", "--output", folder)
    return folder


@pytest.fixture(scope="module")
def content(quick):
    with np.load(QUICK.data.file(quick)) as file:
        return dict(file)


# ---- the quick study ----


def test_records_of_trials_final_runs_and_references(quick):
    records = read_records(quick)
    roles = [
        (one["identity"]["settings"]["role"], one["identity"]["settings"]["method"])
        for one in records
    ]
    assert sorted(roles) == sorted(
        [("trial", "adam"), ("trial", "temporal")] * 2
        + [("final", "adam"), ("final", "temporal")]
        + [("reference", "random"), ("reference", "right up")]
    )
    for record in records:
        settings = record["identity"]["settings"]
        assert "file" not in settings
        assert "command" not in settings
        if settings["role"] == "trial":
            assert not any("test" in name for name in record["history"]), "trials see no test level"
            continue
        for split, levels in (("train", QUICK.data.train), ("test", QUICK.data.test)):
            returns = record["played"][split]["returns"]
            assert len(returns) == levels.count
            assert set(returns) <= {0.0, 10.0}
            assert record["final"][f"{split}_return"] == pytest.approx(np.mean(returns))


def test_the_expert_solves_the_levels_and_clones_look_at_the_frame(quick):
    summary = read_summary(quick, "coinrun")
    expert, clones = summary["claims"][:2]
    assert expert["holds"], expert["measured"]
    assert clones["holds"], clones["measured"]
    returns = {row[0]: float(row[1].split()[0]) for row in summary["tables"][1]["rows"]}
    assert returns["expert"] == 10
    assert returns["any action"] < 8
    losses = {row[0]: float(row[1].split()[0]) for row in summary["tables"][0]["rows"]}
    assert losses["Adam"] < 0.7 * losses["nothing: the expert's mean"]


def test_figures_and_the_contact_sheet(quick):
    pictures = read_summary(quick, "coinrun")["pictures"]
    assert [one["file"] for one in pictures] == [
        "coinrun-curves.png",
        "coinrun-search.png",
        "coinrun-play.png",
    ]
    for one in pictures:
        assert_picture(quick / one["file"])


# ---- the data ----


def test_no_level_is_in_two_splits(content):
    levels = [set(content[f"{split}_levels"]) for split in ("train", "validation", "test")]
    assert [len(one) for one in levels] == [4, 2, 4]
    assert len(set.union(*levels)) == 10
    full = DataSettings()
    ranges = [
        range(one.first, one.first + one.count) for one in (full.train, full.validation, full.test)
    ]
    assert len(set().union(*ranges)) == sum(map(len, ranges)) == 204


def test_states_are_what_the_game_shows_after_their_actions(content, command):
    for split in ("train", "test"):
        rows = np.random.default_rng(0).permutation(len(content[f"{split}_frames"]))[:40]
        plans, levels = content[f"{split}_plans"][rows], content[f"{split}_level"][rows]
        lengths = (plans >= 0).sum(1)
        assert lengths.max() > 4
        seen = play(command, {"a": (levels, follow(plans))}, lengths.max(), keep=True)["a"].frames
        for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            frame = seen[length][place].permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(frame, content[f"{split}_frames"][row])


def test_the_expert_s_plans_reach_the_coin(content, command):
    for split in ("train", "validation", "test"):
        plans, levels = content[f"{split}_expert_plan"], content[f"{split}_levels"]
        lengths = (plans >= 0).sum(1)
        played = play(command, {"a": (levels, follow(plans))}, lengths.max())["a"]
        assert (played.rewards == 10).all()
        np.testing.assert_array_equal(played.rewards, content[f"{split}_expert"][:, 0])
        np.testing.assert_array_equal(played.decisions, lengths)
        frames = content[f"{split}_expert"][:, 1]
        assert ((frames > 4 * (lengths - 1)) & (frames <= 4 * lengths)).all()


def test_the_expert_s_policy_has_no_action_that_dies_at_once(content, command):
    targets, plans = content["train_targets"], content["train_plans"]
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-5)
    lengths = (plans >= 0).sum(1).repeat(len(ACTIONS))
    tried = plans.repeat(len(ACTIONS), axis=0)
    tried[np.arange(len(tried)), lengths] = np.tile(np.arange(len(ACTIONS)), len(plans))
    levels = content["train_level"].repeat(len(ACTIONS))
    played = play(command, {"a": (levels, follow(tried))}, lengths.max() + 1)["a"]
    ended = played.over & (played.decisions == lengths + 1)
    dead, coin = ended & (played.rewards == 0), ended & (played.rewards == 10)
    assert dead.sum() >= 3
    assert (targets.ravel()[dead] == 0).all()
    assert coin.sum() >= 3
    assert (targets.ravel()[coin] > 0).all()


def test_collecting_goes_on_where_it_stopped(command, tmp_path):
    settings = DataSettings(Levels(2, 1, 20, 20), Levels(2004, 1, 9, 20), Levels(2005, 1, 9, 20))
    whole, part = tmp_path / "whole.npz", tmp_path / "part.npz"
    make(settings, whole, command)
    code = (
        "import sys; from pathlib import Path; from studies.coinrun import data; "
        "L = data.Levels; data.make(data.DataSettings(L(2, 1, 20, 20), L(2004, 1, 9, 20), "
        "L(2005, 1, 9, 20)), Path(sys.argv[1]), sys.argv[2:])"
    )
    call = [sys.executable, "-c", code, str(part), *command]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("[1/3] train level 2  coin after")
    process.kill()
    process.communicate(timeout=60)  # ends with the game's side, which has the same output
    (left,) = tmp_path.glob("part.parts/level-2-*.npz")
    assert not part.exists()
    with np.load(left) as file:
        marked = dict(file)
    marked["frames"][:, 5, 5] = 201, 202, 203
    np.savez_compressed(left, **marked)
    make(settings, part, command)
    assert not (tmp_path / "part.parts").exists()
    with np.load(whole) as one, np.load(part) as two:
        assert set(one) == set(two)
        for name in set(one) - {"train_frames"}:
            np.testing.assert_array_equal(one[name], two[name])
        assert not np.array_equal(one["train_frames"], marked["frames"])
        np.testing.assert_array_equal(two["train_frames"], marked["frames"], "made once more")
    states = load(whole, "train")
    assert states.levels == [2]
    assert states.frames.shape[1:] == (3, 64, 64)
    assert (states.rewards == 10).all()
