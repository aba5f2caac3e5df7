"""What the page's tables are made of, without a browser."""

from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib")

from studies.records import RunFiles
from studies.report.cells import DASH, cell, duration, number
from studies.report.collect import FoundRecord, collect
from studies.report.runs import lay_out, split


def test_texts_are_sorted_as_the_numbers_they_begin_with():
    for text, expected in {
        "51.20 ± 0.94": 51.2,
        "-3": -3,
        "\N{MINUS SIGN}3": -3,
        "1e-9": 1e-9,
        ".5 %": 0.5,
        "< 0.001": 0.001,
        "1,024 MB": 1024,
        "12 (of 20)": 12,
        "3-layer": None,
        "0.5, 0.75": None,
        "2026-11-28": None,
        "seed 3": None,
        "": None,
        ".": None,
        "e5": None,
    }.items():
        assert number(text) == expected, text
    assert cell(1 / 3).key == 1 / 3
    assert [cell(value).text for value in (None, "-", [], True, [1, 0.25], [0] * 9, 1e-9)] == [
        *(DASH, DASH, DASH, "yes", "1, 0.25", "9 values", "1e-09")
    ]
    assert [duration(seconds).text for seconds in (0.04, 9.94, 9.96, 59.6, 3600, 7380, None)] == [
        *("0.0 s", "9.9 s", "10 s", "1 min 0 s", "1 h 0 min", "2 h 3 min", DASH)
    ]


def test_runs_show_in_what_they_differ(tmp_path):
    for number_, (settings, threads) in enumerate(
        [({"lr": 0.1, "net": {"depth": 2}}, 1), ({"lr": 0.1, "net": {"depth": 3}, "tau": 1}, 2)]
    ):
        identity = {"study": "s", "settings": settings, "seed": 0, "threads": threads}
        curves = {f"c{curve}": [0, None, curve] for curve in range(6)} | {"words": ["a", "b"]}
        RunFiles(tmp_path, str(number_), identity).finish({"final": {}, "history": curves})
    runs = lay_out("", collect(tmp_path).records)
    curves = [f"c{curve}, curve" for curve in range(4)]
    assert runs.grid.columns == ["net.depth", "threads", "tau", "seed", "time", *curves, "record"]
    assert [[one.text for one in row[:4]] for row in runs.grid.rows] == [
        ["2", "1", DASH, "0"],
        ["3", "2", "1", "0"],
    ]
    assert runs.common == [("lr", "0.1")]
    assert runs.undrawn == ["c4", "c5"]


def test_runs_of_other_settings_have_a_table_of_their_own_in_the_order_of_their_numbers():
    names = ["lr0.1_seed10-a.json", "lr0.1_seed9-b.json", "lr0.05_seed1-c.json"]
    kinds = [{"lr": 0.1, "epochs": 9} for _ in names]
    kinds[1] |= {"tau": 1}
    other = ("other.json", {"lr": 0.1, "width": 1, "depth": 3})
    records = [
        FoundRecord(SimpleNamespace(name=name), {"identity": {"study": "s", "settings": settings}})
        for name, settings in [other, *zip(names, kinds, strict=True)]
    ]
    found = [[record.path.name for record in kind] for kind in split(records)]
    assert found == [names[::-1], [other[0]]]
