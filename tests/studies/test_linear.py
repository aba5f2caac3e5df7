"""``python -m studies linear`` from outside: records, claims, figures, messages."""

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from studies.linear.selection import Cells
from studies.linear.study import unit_test_claims
from studies.linear.training import METHODS, UnitTestSettings
from studies.study import Finished, Run

from .common import assert_claims_hold, read_summary, run


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


GOOD = {
    "and-mask": (0.01, 0.48),
    "mean": (0.3, 0.32),
    "irm": (0.3, 0.31),
    "oracle": (0.01, 0.01),
    "geometric": (0.02, 0.48),
    "fdr": (0.02, 0.48),
    "significance": (0.02, 0.48),
}


@pytest.mark.parametrize(
    ("errors", "holds"),
    [
        ({}, [True, True, True]),
        # nothing is learned, by nobody
        (dict.fromkeys(METHODS, (0.5, 0.5)), [False, False, False]),
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
