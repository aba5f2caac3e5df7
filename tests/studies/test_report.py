"""The page of all results: what is on it, and how it behaves in a real browser."""

import json
import shutil
import time

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from matplotlib.figure import Figure

from studies.__main__ import main
from studies.figures import save
from studies.records import RunFiles
from studies.report.cells import DASH
from studies.summary import Claim, Picture, Summary, Table

from . import toy
from .browser import Browser, start
from .common import run

TEST = ["51.20 ± 0.94", "9.50 ± 0.1", None, "100.00 ± 0.00", DASH]
DECAY = [1e-9, 0.001, 0.5, None, 3e-7]
METHODS = ["mean", "AND-mask <b>τ</b> & more", "seed10", "seed9", "mean"]
SCRIPT = "</script><script>document.title = 'taken over'</script><img src=x onerror=alert(1)>"


def write_linear(folder):
    """Write a summary with all that can be in one, and runs of which one diverged."""
    figure = Figure(figsize=(6, 4))
    figure.subplots().plot([1, 3, 2])
    picture = Picture(save(figure, folder / "curve.png"), 'losses "of <all> rules" & more')
    Summary(
        claims=[Claim("it <holds>", True, "1 > 0"), Claim("it breaks", False, "0 < 1")],
        tables=[
            Table(
                "few", ("method", "test %", "decay"), list(zip(METHODS, TEST, DECAY, strict=True))
            ),
            Table("many", ("trial",), [(trial,) for trial in range(30)]),
        ],
        pictures=[picture, Picture(folder / "lost.png", "gone")],
        notes=[SCRIPT],
    ).write(
        folder,
        "linear",
        {
            "study": "linear",
            "title": "lines & points",
            "about": "All about lines.",
            "reference": "a paper, section 1",
            "command": "python -m studies linear --name 'two words'",
            "quick": False,
            "runs": 24,
            "seconds": 200.4,
            "cpus": 2,
            "build": {"torch": "9.9", "isa": "x86-64-v4", "threads": 1},
        },
    )
    for seed in range(24):
        history = {"epoch": list(range(100)), "loss": [1 / (1 + epoch) for epoch in range(100)]}
        if seed == 3:
            history["loss"][50:] = [float("nan")] * 50
        settings = {"lr": [0.1, 0.5][seed % 2], "data": {"n": 7}, "method": "mean"}
        identity = {"study": "linear", "settings": settings, "seed": seed}
        final = {"test_loss": None if seed == 3 else 1e-3 / (seed + 1)}
        files = RunFiles(folder, f"run seed{seed}", identity)
        files.finish({"final": final, "history": history})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    for place, *options in (("toy-quick", "--quick"), ("toy", "--lr", "0.5", "0.1")):
        assert toy.main(["--output", str(folder / place), "--epochs", "5", *options]) == 0
    write_linear(folder / "deep" / "linear")
    (folder / "interrupted").mkdir()
    for record in list((folder / "toy").glob("lr*.json"))[:3]:
        shutil.copy(record, folder / "interrupted")
    another_kind = {"study": "toy", "settings": {"width": 3}, "seed": 0}
    RunFiles(folder / "interrupted", "other", another_kind).finish({})
    (folder / "interrupted" / "more.checkpoint").touch()
    (folder / "toy" / "cut.json").write_text('{"identity": {"stu')
    (folder / "toy" / "odd.json").write_text('{"identity": {"study": 3}}')
    (folder / "toy" / "odd.summary.json").write_text('{"study": "toy", "claims": [{"text": "?"}]}')
    (folder / "toy" / "nan.json").write_text('{"identity": {"study": "toy"}, "seconds": NaN}')
    (folder / "toy" / "others.json").write_text('{"no": "record"}')
    return folder


@pytest.fixture(scope="module")
def page(folder):
    run("report", folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with start(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def browser(chromium, page):
    return Browser(chromium, page)


FEW = '.scroll[aria-label="few"]'
RUNS = '.scroll[aria-label="Runs of linear"]'


def test_the_page_loads_whole_and_asks_nobody_for_anything(browser):
    assert browser.driver.get_log("browser") == []
    events = [
        json.loads(one["message"])["message"] for one in browser.driver.get_log("performance")
    ]
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert browser.page.as_uri() in asked
    assert {url.split(":")[0] for url in asked} <= {"file", "data"}
    assert [url for url in asked if url.startswith("file")] == [browser.page.as_uri()]
    assert browser.driver.title == f"AND-mask: studies in {browser.page.parent}"
    widths = browser.run("[...document.querySelectorAll('main img')].map(i => i.naturalWidth)")
    assert widths == [960]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_window_and_shows_something(browser, scheme):
    for width in (390, 768, 1280, 1920):
        browser.open(width, scheme)
        browser.run("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        assert browser.run("innerWidth") == width
        assert browser.run("document.scrollingElement.scrollWidth") <= width
        picture = browser.screenshot()
        assert picture.size == (width, 844)
        darkest, brightest = picture.convert("L").getextrema()
        assert brightest - darkest > 150, "nothing to read"
        assert len(picture.getcolors(1 << 24)) > 50
        small = browser.run(
            "[...document.querySelectorAll('button, input')].filter(one => one.checkVisibility() "
            "&& (one.offsetHeight < 38 || one.offsetWidth < 38)).map(one => one.outerHTML)"
        )
        assert not small, "too small for a finger"


def test_dark_and_light_follow_the_system_until_the_reader_chooses(browser):
    light = browser.background()
    browser.open(scheme="dark")
    dark = browser.background()
    assert dark < 200 < 600 < light
    assert browser.find("#theme").text == "Light mode"
    browser.click("#theme")
    assert browser.background() == light
    assert browser.find("#theme").text == "Dark mode"
    browser.open(scheme="dark")
    assert browser.background() == light, "the choice is forgotten"
    paper = "getComputedStyle(document.querySelector('.paper')).backgroundColor"
    browser.open(scheme="light")
    browser.click("#theme")
    assert browser.background() == dark
    assert browser.run(paper) == "rgb(255, 255, 255)"
    browser.run("localStorage.clear()")


@pytest.mark.parametrize(
    ("heading", "place", "ascending", "descending"),
    [
        # As numbers, empty cells last both times.
        (
            "test %",
            2,
            ["9.50 ± 0.1", "51.20 ± 0.94", "100.00 ± 0.00", DASH, DASH],
            ["100.00 ± 0.00", "51.20 ± 0.94", "9.50 ± 0.1", DASH, DASH],
        ),
        (
            "decay",
            3,
            ["1e-09", "3e-07", "0.001", "0.5", DASH],
            ["0.5", "0.001", "3e-07", "1e-09", DASH],
        ),
        # As words, with the numbers in them.
        (
            "method",
            1,
            [METHODS[1], "mean", "mean", "seed9", "seed10"],
            ["seed10", "seed9", "mean", "mean", METHODS[1]],
        ),
    ],
)
def test_a_click_on_a_heading_sorts(browser, heading, place, ascending, descending):
    before = browser.column(FEW, place)
    head = f"{FEW} th:nth-child({place})"
    for expected, state in [(ascending, "ascending"), (descending, "descending"), (before, None)]:
        browser.click(f"{head} button", heading)
        assert browser.column(FEW, place) == expected
        assert browser.find(head).get_attribute("aria-sort") == state
        assert len(browser.driver.find_elements("css selector", f"{FEW} [aria-sort]")) == bool(
            state
        )


def test_rows_that_tie_keep_their_order(browser):
    for expected in (["51.20 ± 0.94", DASH], ["51.20 ± 0.94", DASH]):
        browser.click(f"{FEW} th:nth-child(1) button")
        rows = zip(browser.column(FEW, 1), browser.column(FEW, 2), strict=True)
        assert [test for method, test in rows if method == "mean"] == expected


def test_headings_are_buttons_for_the_keyboard(browser):
    button = browser.find(f"{FEW} th:nth-child(3) button")
    button.send_keys("\ue007")  # enter
    assert browser.column(FEW, 3)[0] == "1e-09"
    assert browser.run("document.activeElement.closest('th').ariaSort") == "ascending"


def test_a_link_opens_the_runs_and_the_filter_finds_some(browser):
    assert not browser.find(RUNS).is_displayed(), "a long table, folded at first"
    browser.click("#summary-1 a", "all of them")
    assert browser.find(RUNS).is_displayed()
    names = [head.text for head in browser.driver.find_elements("css selector", f"{RUNS} th")]
    assert names == ["lr", "seed", "test loss", "time", "loss, curve", "record"]
    assert browser.column(RUNS, 2) == [str(seed) for seed in range(24)]
    field = browser.find("#runs-1 input")
    for words, seeds in [
        ("lr=0.5 seed1", ["1", "11", "13", "15", "17", "19"]),
        ("SEED=3", ["3"]),
        ("test_loss=0.001", ["0"]),
        ("nowhere", []),
    ]:
        field.clear()
        field.send_keys(words)
        assert browser.column(RUNS, 2) == seeds
        assert browser.find("#runs-1 output").text == f"{len(seeds)} of 24 runs"
    field.clear()
    field.send_keys("lr=0.1")
    browser.click(f"{RUNS} th button", "test loss")
    assert browser.column(RUNS, 2) == [str(seed) for seed in range(22, -1, -2)]


def test_a_link_from_elsewhere_opens_what_is_folded(browser):
    browser.open(part="#runs-1")
    assert browser.find(RUNS).is_displayed()


def test_curves_are_drawn_as_far_as_they_go(browser):
    browser.open(part="#runs-1")
    box = "[...document.querySelectorAll(arguments[0])].map(path => path.getBBox())"
    curves = browser.run(box, f"{RUNS} svg path")
    assert len(curves) == 24
    for seed, curve in enumerate(curves):
        assert curve["width"] == pytest.approx(100 if seed != 3 else 49, abs=1)
        assert curve["height"] == pytest.approx(24, abs=1)


def test_a_column_of_curves_is_sorted_by_their_last_values(browser):
    browser.open(part="#runs-1")
    before = list(map(str, range(24)))
    others = [seed for seed in before if seed != "3"]  # it stopped at the larger loss
    for expected in ([*others, "3"], ["3", *others], before):
        browser.click(f"{RUNS} th button", "loss, curve")
        assert browser.column(RUNS, 2) == expected


def test_a_picture_opens_in_full_size(browser):
    browser.click("button.paper")
    assert browser.find("#zoom").is_displayed()
    assert browser.run("document.querySelector('#zoom img').naturalWidth") == 960
    browser.click("#zoom button")
    assert not browser.find("#zoom").is_displayed()


def test_the_command_line_is_copied_as_it_is(browser):
    allowed = ["clipboardReadWrite", "clipboardSanitizedWrite"]
    browser.cdp("Browser.grantPermissions", permissions=allowed)
    section = browser.find("main section h2", "linear").find_element("xpath", "..")
    button = section.find_element("css selector", ".copy")
    button.click()
    for _ in range(100):
        told = button.text  # once: it does not stay
        if told == "Copied":
            break
        time.sleep(0.05)
    assert told == "Copied"
    read = "const done = arguments[0]; navigator.clipboard.readText().then(done, done);"
    copied = browser.driver.execute_async_script(read)
    assert copied == "python -m studies linear --name 'two words'"


def test_what_is_found_is_on_the_page(browser, folder):
    text = browser.run("document.querySelector('main').textContent")
    for words in (
        *("lines & points", "All about lines.", "a paper, section 1", "torch 9.9 · x86-64-v4"),
        *("1 thread · 2 CPUs", "3 min 20 s together", "1 of 2 hold", "it <holds>", "1 > 0"),
        *("✓ holds", "✗ does not hold", 'losses "of <all> rules" & more', METHODS[1], SCRIPT),
        *("lost.png cannot be read: No such file", "There is no summary of these runs"),
        *("Kind 1 3 runs", "Kind 2 1 run"),
        *("toy/cut.json", "cannot be read", "study: expected str, got int"),
        *("odd.summary.json", "interrupted/more.checkpoint"),
    ):
        assert words in text, words
    assert "others.json" not in text
    studies = browser.run(
        "[...document.querySelectorAll('.overview tbody th a')].map(one => one.textContent)"
    )
    assert studies == ["linear", "toy", "toy", "toy"], "the order of the command line"
    settings = browser.column(".overview", 4)
    assert settings == ["full", "full", "quick", DASH]
    assert [browser.column(".overview", place)[0] for place in (2, 3, 5)] == ["1", "1", "24"]
    links = "[...document.querySelectorAll('a')].filter(a => !document.querySelector(a.hash))"
    assert browser.run(f"{links}.length") == 0, "links that lead nowhere"
    ids = browser.run("[...document.querySelectorAll('[id]')].map(one => one.id)")
    assert len(ids) == len(set(ids))


def test_damaged_files_are_named_and_the_rest_is_written(folder, tmp_path, capsys):
    run("report", folder, "--output", tmp_path / "new" / "page.html")
    told = capsys.readouterr()
    for name in ("cut.json", "odd.json", "nan.json", "odd.summary.json"):
        assert f"{folder / 'toy' / name} is left out: " in told.err
    assert told.out.startswith(f"page  {tmp_path / 'new' / 'page.html'}  (3 summaries, 33 runs, ")
    html = (tmp_path / "new" / "page.html").read_text()
    assert html.startswith("<!doctype html>")
    assert "http://" not in html.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in html


def test_a_summary_that_says_little_is_shown(tmp_path):
    little = {"study": "toy", "claims": [], "tables": [], "pictures": [], "notes": ["one note"]}
    (tmp_path / "toy.summary.json").write_text(json.dumps(little))
    run("report", tmp_path)
    assert "one note" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("make", [False, True])
def test_a_folder_without_results_says_what_to_run(tmp_path, make, capsys):
    folder = tmp_path / "empty"
    if make:
        folder.mkdir()
    with pytest.raises(SystemExit) as stop:
        main(["report", str(folder)])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert f"{folder}; run a study first, such as 'python -m studies spirals --quick'" in message
    assert not (folder / "report.html").exists()


def test_an_output_that_cannot_be_written_is_told(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["report", str(folder), "--output", str(tmp_path)])
    assert stop.value.code == 2
    assert "output: expected a file that can be written, got" in capsys.readouterr().err
