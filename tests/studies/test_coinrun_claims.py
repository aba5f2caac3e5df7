"""CoinRun: what claims make of runs, here made-up ones."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("sklearn")

from studies.coinrun.data import States
from studies.coinrun.results import (
    beyond_spread,
    claims,
    length_of_training,
    loss_table,
    return_table,
)
from studies.coinrun.training import CoinRunSettings
from studies.records import RunFiles, without_nan
from studies.study import Finished, Run

SETTINGS = CoinRunSettings("final", "adam", "x", epochs=30, batch=32)
LOSSES = [0.9, 0.8, 0.7, 0.6, 0.5, 0.45]


def run_of(folder, role, method, seed, final, losses=LOSSES):
    settings = replace(SETTINGS, role=role, method=method)
    record = {"final": without_nan(final), "history": {"test_loss": losses}, "levels": 10}
    return Finished(Run(method, settings, seed), record, RunFiles(folder, f"{method}{seed}", {}))


def final_runs(folder, adam, temporal):
    """Final runs by method, of test losses, training losses and returns for each seed."""
    names = ("test_loss", "train_loss", "test_return")
    return {
        method: [
            run_of(
                folder, "final", method, seed,
                dict(zip(names, numbers, strict=True))
                | {"best_test_loss": numbers[0], "train_accuracy": 0.5, "test_accuracy": 0.5},
            )
            for seed, numbers in enumerate(zip(*columns, strict=True))
        ]
        for method, columns in (("adam", adam), ("temporal", temporal))
    }  # fmt: skip


def levels(count):
    none = torch.zeros(0)
    numbers = np.full(count, 10.0)
    return States(none, none, none, list(range(count)), np.zeros((count, 1)), numbers, numbers)


def references(folder, right_up=5.6):
    return [
        run_of(folder, "reference", method, 0, {"test_return": reached})
        for method, reached in (("right up", right_up), ("random", 3.2))
    ]


def found(folder, adam, temporal, right_up=5.6):
    runs = final_runs(folder, adam, temporal)
    told = claims(references(folder, right_up), runs, levels(8), levels(9), (0.486, 0.592))
    names = ("expert", "trained", "unseen", "loss", "early", "gap", "return", "both play")
    return dict(zip(names, told, strict=True))


def test_a_difference_within_the_spread_is_none(tmp_path):
    adam = [[0.446, 0.449, 0.449], [0.33, 0.335, 0.34], [4.6, 5.1, 4.8]]
    temporal = [[0.444, 0.450, 0.446], [0.31, 0.30, 0.32], [5.1, 5.4, 5.1]]
    told = found(tmp_path, adam, temporal, right_up=4.0)
    for name in ("loss", "early", "return"):
        assert not told[name].holds, told[name]
        assert "no difference beyond the spread" in told[name].measured
    assert told["loss"].measured == (
        "test KL 0.447 ± 0.003, Adam 0.448 ± 0.002: no difference beyond the spread"
    )
    assert not told["gap"].holds
    assert "higher beyond the spread" in told["gap"].measured
    assert told["both play"].holds


def test_equal_returns_are_no_higher_ones(tmp_path):
    same = [[0.4, 0.5], [0.3, 0.3], [0.0, 0.0]]
    assert not found(tmp_path, same, same, right_up=-1)["return"].holds


def test_a_clear_difference_holds(tmp_path):
    adam = [[0.50, 0.51], [0.3, 0.3], [5.0, 5.1]]
    temporal = [[0.40, 0.41], [0.3, 0.3], [8.0, 8.1]]
    told = found(tmp_path, adam, temporal, right_up=4.0)
    assert all(one.holds for one in told.values()), told
    assert "lower beyond the spread" in told["loss"].measured


def test_a_return_below_policies_that_do_not_look_is_no_success(tmp_path):
    adam = [[0.50, 0.51], [0.3, 0.3], [2.0, 2.1]]
    temporal = [[0.40, 0.41], [0.3, 0.3], [5.0, 5.1]]
    told = found(tmp_path, adam, temporal)
    assert not told["return"].holds
    assert "5.60 without a look" in told["return"].measured
    assert not told["both play"].holds


def test_one_seed_shows_no_difference(tmp_path):
    told = found(tmp_path, [[0.5], [0.3], [5.0]], [[0.4], [0.3], [9.0]])
    assert not told["loss"].holds
    assert "one seed has no spread" in told["loss"].measured
    assert told["trained"].holds  # for the other policy has none


@pytest.mark.parametrize("diverged", [math.nan, math.inf])
def test_nothing_is_won_against_a_run_that_diverged(tmp_path, diverged):
    adam = [[diverged, 0.5], [diverged, 0.3], [5.0, 5.1]]
    temporal = [[0.40, 0.41], [0.3, 0.3], [8.0, 8.1]]
    told = found(tmp_path, adam, temporal)
    for name in ("trained", "unseen", "loss", "early", "gap"):
        assert not told[name].holds, told[name]
    assert "a run diverged" in told["loss"].measured
    runs = final_runs(tmp_path, adam, temporal)
    assert loss_table(runs, (0.486, 0.592)).rows[0][2] == "inf"
    return_table(references(tmp_path), runs, levels(8), levels(9))


def test_clones_are_held_against_a_blind_policy_on_the_same_levels(tmp_path):
    adam = [[0.7, 0.7], [0.3, 0.3], [5.0, 5.1]]  # memorised: below .486 on training levels only
    told = found(tmp_path, adam, adam)
    assert told["trained"].holds
    assert not told["unseen"].holds
    assert "on training levels" in told["trained"].text
    assert "on unseen levels" in told["unseen"].text


def test_the_spread_is_that_of_both():
    assert beyond_spread([1.0, 1.2], [1.5, 1.7])  # .5 against .28
    assert not beyond_spread([1.0, 1.2], [1.2, 1.4])  # .2 against .28
    assert not beyond_spread([1.5, 1.7], [1.0, 1.2])


def test_runs_that_end_while_loss_falls_say_so(tmp_path):
    falling = run_of(tmp_path, "final", "adam", 0, {})
    risen = run_of(tmp_path, "final", "adam", 1, {}, [0.5, 0.4, 0.45, 0.5, 0.6, 0.7])
    lost = run_of(tmp_path, "final", "adam", 2, {}, [None] * 6)
    note = length_of_training({"adam": [falling], "temporal": [falling]}, 9600)
    assert note.startswith("Final runs make 1.0 passes over the states.")
    assert "still falling in 2 of 2" in note
    assert "nothing about what longer training memorises" in note
    note = length_of_training({"adam": [risen, lost], "temporal": [falling]}, 960)
    assert note.startswith("Final runs make 10.0 passes")
    assert "still falling in 1 of 3" in note
    assert "memorises" not in note
