"""``python -m studies linear`` from outside: records, claims, figures, messages."""

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from studies.__main__ import main
from studies.linear.selection import Cells
from studies.linear.study import unit_test_claims
from studies.linear.training import METHODS, UnitTestSettings
from studies.study import Finished, Run

from .common import assert_claims_hold, assert_picture, read_records, read_summary, run


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("linear")
    run("linear", "--quick", "--output", folder)
    return folder


def test_the_quick_setting_shows_what_the_papers_claim(quick):
    summary = read_summary(quick, "linear")
    assert summary["quick"] is True
    assert len(summary["claims"]) == 8
    assert_claims_hold(summary)


def test_the_figures(quick):
    names = [picture["file"] for picture in read_summary(quick, "linear")["pictures"]]
    assert names == ["linear-solutions.png", "linear-errors.png"]
    for name in names:
        assert_picture(quick / name)


def test_a_record_for_each_run(quick):
    found = read_records(quick)
    tests = [r for r in found if "method" in r["identity"]["settings"]]
    assert len(tests) == 3 * 2 * 5
    assert len(found) - len(tests) == 6 + 3 * 3
    for record in tests:
        assert record["identity"]["settings"]["trials"] == record["trials"]
        assert "scikit-learn" in record["identity"]["versions"]
        assert len(record["trials"]) == len(record["validation"]) == len(record["test"]) == 4
        assert record["final"]["validation"] == min(record["validation"])
    regressions = [r for r in found if "rule" in r["identity"]["settings"]]
    for record in regressions:
        assert len(record["theta"]) == 5
        seen_all = record["identity"]["settings"]["environments"] == "all four"
        assert (record["final"]["unseen_loss"] is None) is seen_all


def test_tables_compare_bases_and_methods(quick):
    stored, random, tests = read_summary(quick, "linear")["tables"]
    assert [len(table["rows"]) for table in (stored, random, tests)] == [6, 9, 6]
    assert stored["rows"][2][2:6] == ["3.03233", "3.03234", "0.005125", "0.005125"]
    rows = {row[1]: row[2:] for row in tests["rows"]}
    assert tests["columns"][2:] == ["mean", "AND-mask", "geometric mean", "IRMv1", "oracle"]
    assert float(rows["3"][1]) < 0.05 < 0.4 < float(rows["3s"][1])


def test_one_part_alone(tmp_path, capsys):
    run("linear", "--part", "regression", "--seeds", 0, "--output", tmp_path)
    summary = read_summary(tmp_path, "linear-regression")
    assert len(summary["claims"]) == 3
    assert "to 5e-05" in summary["claims"][0]["text"]
    # figures of the whole study, if there are any in the folder, are left alone
    assert [path.name for path in tmp_path.glob("*.png")] == ["linear-regression-solutions.png"]
    assert "example" not in capsys.readouterr().out

    tiny = ("--samples", 20, "--iterations", 3, "--trials", 2, "--seeds", 0, 1)
    run("linear", "--part", "unit-tests", *tiny, "--output", tmp_path)
    summary = read_summary(tmp_path, "linear-unit-tests")
    assert len(summary["claims"]) == 7
    assert [row[0] for row in summary["tables"][0]["rows"]] == [3] * 6 + [10] * 6
    assert_picture(tmp_path / "linear-unit-tests-errors.png")


def finished(seed, validation, test, trials=({"lr": 1}, {"lr": 2})):
    settings = UnitTestSettings(3, False, 10, "mean")
    record = {"trials": list(trials), "validation": validation, "test": test}
    return Finished(Run("x", settings, seed), record, None)


def test_settings_are_chosen_on_validation_data_of_all_seeds():
    cells = Cells([
        finished(0, [0.1, 0.3], [0.9, 0.1]),
        finished(1, [0.4, 0.1], [0.8, 0.2]),
    ])  # fmt: skip
    cell = cells.get(3, False, 10, "mean")
    assert cell.trial == {"lr": 2}
    assert cell.test == {0: 0.1, 1: 0.2}
    assert cell.error == pytest.approx(0.15)
    assert cell.validation == pytest.approx(0.2)


def test_a_setting_that_diverged_is_not_chosen():
    cells = Cells([finished(0, [None, 0.5], [None, 0.4])])
    assert cells.get(3, False, 10, "mean").trial == {"lr": 2}


GOOD = {
    "and-mask": (0.01, 0.48),
    "mean": (0.3, 0.32),
    "irm": (0.3, 0.31),
    "oracle": (0.01, 0.01),
    "geometric": (0.02, 0.48),
}


@pytest.mark.parametrize(
    ("errors", "holds"),
    [
        ({}, [True, True, True]),
        # nothing is learned, by nobody
        ({method: (0.5, 0.5) for method in METHODS}, [False, False, False]),
        ({"and-mask": (0.45, 0.48)}, [False, False, False]),
        ({"oracle": (0.01, 0.45)}, [True, False, True]),
        # better on rotated inputs is no loss, and a loss is none less for its size
        ({"mean": (0.4, 0.05)}, [True, True, True]),
        ({"mean": (0.05, 0.4)}, [True, True, False]),
        ({"and-mask": (0.48, 0.01), "mean": (0.4, 0.1), "irm": (0.4, 0.1)}, [False] * 3),
    ],
)
def test_claims_about_rotated_inputs_can_fail(errors, holds):
    """Errors of each method in example 3, as it is and rotated."""
    runs = [
        Finished(
            Run("x", UnitTestSettings(example, bool(turn), 10, method), 0),
            {"trials": [{}], "validation": [0.0], "test": [(GOOD | errors)[method][turn]]},
            None,
        )
        for example in (1, 2, 3)
        for turn in (0, 1)
        for method in METHODS
    ]
    assert [claim.holds for claim in unit_test_claims(Cells(runs))[:3]] == holds


def test_settings_that_differ_between_seeds_are_not_averaged():
    others = ({"lr": 1}, {"lr": 3})
    with pytest.raises(ValueError, match="trials: expected the same settings for all seeds"):
        Cells([finished(0, [0.1, 0.3], [0, 0]), finished(1, [0.1, 0.3], [0, 0], others)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--environments", "2"], "environments: expected at least 3, got 2"),
        (["--samples", "1"], "samples: expected at least 2, got 1"),
        (["--iterations", "0"], "iterations: expected at least 1, got 0"),
        (["--trials", "0"], "trials: expected at least 1, got 0"),
        (["--trials", "31"], "trials: expected at most the 30 settings that there are, got 31"),
        *(
            (["--part", "regression", f"--{name}", "7"], f"{name}: expected none with part regr")
            for name in ("environments", "samples", "iterations", "trials")
        ),
        (["--part", "all"], "invalid choice: 'all'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["linear", "--output", str(tmp_path / "none"), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
