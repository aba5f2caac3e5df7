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
    claims,
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


def test_a_clear_difference_holds(tmp_path):
    adam = [[0.50, 0.51], [0.3, 0.3], [5.0, 5.1]]
    temporal = [[0.40, 0.41], [0.3, 0.3], [8.0, 8.1]]
    told = found(tmp_path, adam, temporal, right_up=4.0)
    assert all(one.holds for one in told.values()), told
    assert "lower beyond the spread" in told["loss"].measured


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
