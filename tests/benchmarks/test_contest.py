"""The contest as a study: that all ways lead to the same gradient. Times are never asserted."""

import math
import sys

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks.contest.cli import main
from benchmarks.contest.contest import EVERY, GROUPED, Case, contest
from benchmarks.contest.exactness import Loop
from benchmarks.contest.memory import peak_of
from benchmarks.contest.models import MODELS, loss, setting
from benchmarks.contest.peers import (
    EXACT,
    GRADIENTS,
    LIBRARIES,
    OURS,
    PLAIN,
    STEPS,
    TAU,
    versions,
)  # fmt: skip
from benchmarks.contest.results import Results, summarise
from tests.studies.common import assert_picture, read_records, read_summary


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The quick setting, through the command line."""
    path = tmp_path_factory.mktemp("benchmark")
    assert main(["--quick", "--threads", "1", "--output", str(path)]) == 0
    return path


def test_all_ways_have_the_gradient_of_the_loop(folder):
    found = read_records(folder)
    assert len(found) == 4
    for record in found:
        compared = record["deviations"]
        assert {OURS, "am.backward", EXACT, "vmap(grad)", "vmap(grad) + am.AndMask"} <= set(
            compared
        )
        for name, one in compared.items():
            assert one["exact"], (record["identity"]["settings"], name, one)
            assert one["masked_otherwise"] == 0
            assert one["decided"] > 0.99, "hardly anything was compared"
    (claim,) = read_summary(folder, "benchmark")["claims"]
    assert claim["holds"], claim


def test_every_way_has_a_row_with_times_or_a_reason(folder):
    for record in read_records(folder):
        rows = {row["contestant"]: row for row in record["gradients"]}
        assert list(rows) == list(GRADIENTS)
        for name, row in rows.items():
            assert (row["median"] > 0) == (name in record["deviations"] or name == PLAIN)
            assert row["median"] > 0 or row["note"], row
        assert rows[PLAIN]["ratio"] == 1
        assert rows[OURS]["ratio"] == pytest.approx(rows[OURS]["median"] / rows[PLAIN]["median"])
        assert [row["contestant"] for row in record["steps"]] == list(STEPS)
        for name, present in versions().items():
            assert (rows[name]["note"] == "not installed") == (present is None)


def test_the_loop_is_the_papers_formula():
    network, batch = setting("MLP 32", 16)
    GRADIENTS[EXACT](network, batch, 8)()
    parts = zip(batch[0].chunk(8), batch[1].chunk(8), strict=True)
    params = list(network.parameters())
    rows = [torch.autograd.grad(loss(network, part), params) for part in parts]
    for param, grads in zip(params, zip(*rows, strict=True), strict=True):
        stack = torch.stack(grads)
        keep = stack.sign().sum(0).abs() >= math.ceil(TAU * 8)
        torch.testing.assert_close(param.grad, keep * stack.mean(0))


@pytest.mark.parametrize("spoil", ["mask", "value", "none", "nan"])
def test_a_wrong_gradient_is_seen(spoil):
    network, batch = setting("MLP 32", 16)
    loop = Loop(network, batch, 8)
    GRADIENTS[EXACT](network, batch, 8)()
    grads = [param.grad.clone() for param in network.parameters()]
    assert loop.compare(grads).exact
    kept = grads[0].flatten().abs().argmax()
    if spoil == "mask":
        grads[0].flatten()[kept] = 0
    elif spoil == "value":
        grads[0].flatten()[kept] *= 1.01
    elif spoil == "nan":
        grads[0].flatten()[kept] = math.nan
    else:
        grads[0] = None
    found = loop.compare(grads)
    assert not found.exact
    assert str(found)


def test_what_rounding_may_turn_is_not_held_against_a_way():
    """A sum that is zero but for rounding: the mean over a group of an input and its negative."""
    model = torch.nn.Linear(2, 10, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0 + 3e-7]]).repeat(8, 1)  # second input: noise
    batch = (x, torch.zeros(16, dtype=torch.long))
    loop = Loop(model, batch, 8)
    GRADIENTS[EXACT](model, batch, 8)()
    other = model.weight.grad.clone()
    assert loop.compare([other]).decided == 0.5
    other[:, 1] = 0
    assert loop.compare([other]).exact
    other[:, 0] = 0
    assert not loop.compare([other]).exact


def test_what_fails_says_why(monkeypatch):
    def broken(model, batch, environments):
        raise NotImplementedError("no such layer")

    ways = {PLAIN: GRADIENTS[PLAIN], EXACT: GRADIENTS[EXACT], OURS: GRADIENTS[OURS]}
    ways |= {"Opacus": broken, "TorchJD": broken}
    monkeypatch.setitem(sys.modules, LIBRARIES["Opacus"][0], None)  # as if not installed
    monkeypatch.setitem(sys.modules, LIBRARIES["TorchJD"][0], torch)  # as if it were
    rows, deviations = contest(
        Case("MLP 16", GROUPED, 16), ways, PLAIN, memory=False, rounds=1, seconds_per_round=0.0
    )
    assert [row.contestant for row in rows] == list(ways)
    assert set(deviations) == {EXACT, OURS}
    notes = {row.contestant: row.note for row in rows}
    assert notes["Opacus"] == "not installed"
    assert notes["TorchJD"] == "NotImplementedError: no such layer"
    assert not notes[OURS]


def test_a_library_that_cannot_be_imported_ends_nothing(tmp_path, monkeypatch):
    (tmp_path / "brokenlibrary.py").write_text("raise AttributeError('built for another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(LIBRARIES, "Opacus", ("brokenlibrary", "opacus"))
    ways = {name: GRADIENTS[name] for name in (PLAIN, EXACT, "Opacus")}
    rows, _ = contest(
        Case("MLP 16", GROUPED, 16), ways, PLAIN, memory=False, rounds=1, seconds_per_round=0.0
    )
    assert rows[-1].note == "AttributeError: built for another torch"
    assert not rows[-1].median


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_stacked_gradients_grows_with_environments():
    parameters = sum(param.numel() for param in MODELS["MLP"].build().parameters())
    stack = 32 * parameters * 4 / 2**20
    loop, _ = peak_of(EXACT, "MLP", 32, 32)
    ours, whole = peak_of(OURS, "MLP", 32, 32)
    assert stack < loop < 2.5 * stack
    assert parameters * 4 / 2**20 < ours < stack / 4
    assert whole > ours


def made_up(kind, ratios, model="MLP", exact=True, memory=10.0):
    """A record with chosen figures."""
    return (
        model,
        kind,
        {
            "gradients": [
                {
                    "contestant": name, "median": ratio, "ratio": ratio, "note": "",
                    "megabytes": memory * ratio, "memory_ratio": ratio,
                }
                for name, ratio in ratios.items()
            ],
            "steps": [
                {
                    "contestant": name, "median": 1.0, "ratio": 1.1, "note": "",
                    "megabytes": 20.0, "memory_ratio": 1.3,
                }
                for name in STEPS
            ],
            "deviations": {
                name: {"exact": exact, "masked_otherwise": 0, "difference": 0.0, "decided": 1.0}
                for name in ratios
                if name != PLAIN
            },
            "load": [0.0, 1.0],
        },
    )  # fmt: skip


def claims_of(*records):
    claims = summarise(Results(records), timed=True).claims
    return {claim.text: claim for claim in claims}


def test_claims_follow_from_figures():
    fast = {PLAIN: 1.0, OURS: 1.2, EXACT: 40.0, "vmap(grad)": 2.0}
    slow = {PLAIN: 1.0, OURS: 1.4, EXACT: 1.3, "vmap(grad)": 2.0}
    found = claims_of(made_up(EVERY, fast), made_up(GROUPED, slow))
    fastest = "Agreement is the fastest exact way to the gradient for every model"
    assert found[f"{EVERY}: {fastest}"].holds
    assert not found[f"{GROUPED}: {fastest}"].holds
    assert "MLP 1.40, next authors' loop 1.30" in found[f"{GROUPED}: {fastest}"].measured
    within = found["the gradient takes at most 1.3 times as long as plain training's"]
    assert not within.holds
    assert within.measured == "1.20 to 1.40; more in MLP, 8 groups 1.40"
    assert found["a step takes at most 1.2 times as long as plain training's"].holds
    assert not found["a step takes at most 1.15 times the memory of plain training's"].holds
    assert found["every way has the gradient of the authors' loop, up to rounding"].holds
    wrong = claims_of(made_up(EVERY, fast, exact=False))
    assert not wrong["every way has the gradient of the authors' loop, up to rounding"].holds


SAME = "every way has the gradient of the authors' loop, up to rounding"
ABOUT_US = (
    f"{EVERY}: Agreement is the fastest exact way to the gradient for every model",
    f"{EVERY}: Agreement needs less memory than gradients of single examples",
    "the gradient takes at most 1.3 times as long as plain training's",
    "a step takes at most 1.2 times as long as plain training's",
    SAME,
)
GOOD = {PLAIN: 1.0, OURS: 1.2, EXACT: 40.0, "vmap(grad)": 2.0}


@pytest.mark.parametrize("how", ["inexact", "missing", "missing in one of two seeds"])
def test_a_case_without_our_gradient_is_held_against_us(how):
    case = made_up(EVERY, GOOD, "CNN")
    cases = [made_up(EVERY, GOOD), case]
    if how == "inexact":
        case[2]["deviations"][OURS]["exact"] = False
    elif how == "missing":
        del case[2]["deviations"][OURS]
        case[2]["gradients"] = [r for r in case[2]["gradients"] if r["contestant"] != OURS]
    else:
        cases.append(made_up(EVERY, GOOD, "CNN"))
        del case[2]["deviations"][OURS]
    found = claims_of(*cases)
    for text in ABOUT_US:
        assert not found[text].holds, found[text]
        assert "CNN" in found[text].measured


def test_figure_with_memory(tmp_path):
    sizes = ["--models", "MLP 16", "--environments", GROUPED]
    assert main(["--quick", *sizes, "--memory", "--output", str(tmp_path)]) == 0
    (record,) = read_records(tmp_path)
    assert record["identity"]["settings"]["examples"] == 16
    for row in record["gradients"]:
        assert (row["megabytes"] is not None) == (row["median"] > 0), row
    assert_picture(tmp_path / "benchmark-groups.png")
    table = read_summary(tmp_path, "benchmark")["tables"][1]
    assert table["columns"] == ["way", "MLP 16: time", "MLP 16: memory"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "LSTM"], "models: expected MLP, CNN, transformer, ResNet-9"),
        (["--examples", "12"], "examples: expected a positive multiple of 8, got 12"),
        (["--jobs", "2"], "jobs: expected 1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--output", str(tmp_path / "none"), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
