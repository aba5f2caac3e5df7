"""Loss surfaces, where rules lead on them, and the patchwork example."""

import math

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from studies.landscape import parts
from studies.landscape.cli import PartSettings
from studies.landscape.results import Results, summarise
from studies.landscape.surfaces import LOSSES, POINTS

from .common import read_records, read_summary, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The quick setting, through the command line."""
    path = tmp_path_factory.mktemp("landscape")
    run("landscape", "--quick", "--threads", 1, "--output", path)
    return path


@pytest.fixture(scope="module")
def summary(folder):
    return read_summary(folder, "landscape")


@pytest.fixture(scope="module")
def records(folder):
    return {
        (r["identity"]["settings"]["part"], r["identity"]["settings"]["rule"]): r
        for r in read_records(folder)
    }


CLAIMS = [
    ("the two minima look alike after pooling", True),
    ("the inconsistency score tells them apart", True),
    ("the mean gradient leads to the patchwork minimum", True),
    ("the AND-mask never ends at the patchwork minimum", True),
    ("the geometric mean does not either, and it is the vote", True),
    ("wherever else the AND-mask stops", True),
    ("the score of a pair of quadratics is at most 2 ε", False),  # the paper's bound, printed
    ("that score is at most ε (", True),
    ("the patchwork solution has loss .0032", True),
    ("search finds worse points within ε", True),
    ("the longer the search", True),
    ("the AND-mask ends at the consistent minimum from more starts", True),
    ("the invariant learning consistency of the AND-mask is higher", False),
]


@pytest.mark.parametrize(("start", "holds"), CLAIMS)
def test_claims(summary, start, holds):
    (claim,) = [one for one in summary["claims"] if one["text"].startswith(start)]
    assert claim["holds"] is holds, claim


SETTLED = "of descents that end at a minimum"


def claims_with(folder, **changes):
    """Claims about the quick records, with other numbers in those of the AND-mask."""
    found = []
    for record in read_records(folder):
        settings = PartSettings(**record["identity"]["settings"])
        if settings.rule == "and-mask":
            record |= changes
        found.append((settings, record))
    return {claim.text: claim.holds for claim in summarise(Results(found)).claims}


def test_claims_about_descents_can_fail(folder, records):
    ends = records["descents", "and-mask"]["ends"]
    where = "wherever else the AND-mask stops, environments contradict each other in both "
    where += "coordinates"
    # None: the gradient was not finite
    for slope, holds in ((0.0, True), (0.0009, True), (0.01, False), (None, False)):
        assert claims_with(folder, largest_gradient_elsewhere=slope)[where] is holds
    found = claims_with(folder, ends=["patchwork"] * len(ends))
    assert found["the AND-mask never ends at the patchwork minimum"] is False
    settled = f"{SETTLED}, those of the AND-mask are the more consistent"
    mean = records["descents", "mean"]["ilc"]["scores"][0]
    for score, holds in ((mean - 0.001, True), (mean + 0.001, False), (None, False)):
        changes = {"ends": ["consistent", *ends[1:]], "ilc": {"scores": [score]}}
        assert claims_with(folder, **changes)[settled] is holds
    ilc = "the invariant learning consistency of the AND-mask is higher than the mean gradient's"
    assert claims_with(folder, ilc={"scores": [mean - 0.001]})[ilc] is True


def test_a_start_ends_where_plain_gradient_descent_leads(records):
    """A reference: one start at a time, and the rules written out."""
    rules = {
        "mean": lambda grads: grads.mean(0),
        "and-mask": lambda grads: torch.where(grads.sign().sum(0).abs() == 2, grads.mean(0), 0),
    }
    for name, rule in rules.items():
        record = records["descents", name]
        for start, end in list(zip(record["starts"], record["ends"], strict=True))[:6]:
            theta = torch.tensor(start, dtype=torch.float64)
            for _ in range(250):
                grads = [torch.func.grad(loss)(theta) for loss in LOSSES]
                theta = theta - 0.05 * rule(torch.stack(grads))
            near = [place for place, at in POINTS.items() if math.dist(theta, at) < 0.1]
            assert (near or ["elsewhere"]) == [end], (name, start)


def test_the_score_of_the_consistent_minimum_is_epsilon(records):
    """There both environments have the same bowl, so that they lose the same."""
    minima = records["minima", ""]["minima"]
    epsilons = records["minima", ""]["identity"]["settings"]["epsilons"]
    assert minima["consistent"]["scores"] == pytest.approx(epsilons, rel=1e-3)
    assert minima["patchwork"]["scores"][0] > 0.5


def test_quadratics_are_scored_exactly(records):
    pairs = records["quadratics", ""]["pairs"]
    assert all(one["exact"] for one in pairs.values())
    for name, hessians in parts.PAIRS.items():
        a, b = torch.tensor(hessians, dtype=torch.float64)
        ratios = torch.linalg.eigvals(torch.linalg.solve(a, b)).real
        assert pairs[name]["score"] == pytest.approx(float(max(ratios.max(), 1 / ratios.min())))
