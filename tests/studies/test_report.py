"""The page of all results: what is on it, and what must never be."""

import json
import os
import shutil
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from matplotlib.figure import Figure

from studies.__main__ import main
from studies.figures import save
from studies.records import RunFiles
from studies.summary import Claim, Picture, Summary, Table

from . import toy
from .common import run

SCRIPT = "</style><script>document.title = 'taken over'</script><img src=x onerror=alert(1)>"
EMPTY = {"study": "toy", "claims": [], "tables": [], "pictures": [], "notes": []}


class Page(HTMLParser):
    """The tags, the attributes and the text of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.ids, self.links, self.images, self.text = [], [], [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if tag == "a" else []
        self.images += [values["src"]] if tag == "img" else []
        assert not [name for name in values if name.startswith("on")]

    def handle_data(self, data):
        self.text += data


def write_page(folder):
    run("report", folder)
    return Page((folder / "report.html").read_text())


def write_linear(folder):
    """Write a summary with all that can be in one, and runs of which one diverged."""
    figure = Figure(figsize=(6, 4))
    figure.subplots().plot([1, 3, 2])
    Summary(
        claims=[Claim("it <holds>", True, "1 > 0"), Claim("it breaks", False, "0 < 1")],
        tables=[
            Table("few", ("method", "test %"), [("AND-mask <b>", "51.20 ± 0.94"), ("mean", None)]),
            Table("many", ("trial",), [(trial,) for trial in range(30)]),
        ],
        pictures=[Picture(save(figure, folder / "curve.png"), 'losses "of <all> rules"')],
        notes=[SCRIPT],
    ).write(folder, "linear", {"study": "linear", "title": "lines & points", "seconds": 200.4})
    for seed in range(3):
        final = {"test_loss": float("nan") if seed == 2 else 1e-3 / (seed + 1)}
        identity = {"study": "linear", "settings": {}, "seed": seed}
        RunFiles(folder, f"run seed{seed}", identity).finish({"final": final})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    for place, *options in (("toy-quick", "--quick"), ("toy", "--lr", "0.5", "0.1")):
        assert toy.main(["--output", str(folder / place), "--epochs", "5", *options]) == 0
    write_linear(folder / "deep" / "linear")
    (folder / "interrupted").mkdir()
    for record in (folder / "toy").glob("lr*.json"):
        shutil.copy(record, folder / "interrupted")
    (folder / "interrupted" / "more.checkpoint").touch()
    (folder / "toy" / "others.json").write_text('{"no": "record"}')
    return folder


def test_what_is_found_is_on_the_page(folder, capsys):
    page = write_page(folder)
    assert "(3 summaries, 12 runs, " in capsys.readouterr().out
    for words in (
        *("3 summaries", "3 of 4 claims hold", "12 runs", "lines & points", "3 min 20 s in all"),
        *("✓ holds it <holds>", "✗ does not hold it breaks", 'losses "of <all> rules"', SCRIPT),
        *("AND-mask <b>", "51.20 ± 0.94", "toy (quick)", "test loss", "0.001", "many, 30 rows"),
        *("interrupted: 4 runs", "interrupted/more.checkpoint"),
    ):
        assert words in page.text, words
    assert "others.json" not in page.text
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_the_page_runs_nothing_and_asks_nobody(folder):
    page = write_page(folder)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert [image.partition(";")[0] for image in page.images] == ["data:image/png"]
    html = (folder / "report.html").read_text()
    assert "default-src 'none'" in html
    assert "http:" not in html
    assert "https:" not in html


ODD = {
    "cut.json": '{"identity": {"stu',
    "study.json": '{"identity": {"study": 3}}',
    "nan.json": '{"identity": {"study": "toy"}, "seconds": NaN}',
    "huge.json": '{"identity": {"study": "toy"}, "seconds": 1e999}',
    "long.json": f'{{"identity": {{"study": "toy"}}, "seconds": {"9" * 400}}}',
    "deep.json": "[" * 100_000,
    "half.json": r'{"identity": {"study": "\ud800"}}',
    "half.summary.json": json.dumps(EMPTY | {"notes": ["\udc00"]}),
    "claim.summary.json": json.dumps(EMPTY | {"claims": [{"text": "?"}]}),
    "table.summary.json": json.dumps(EMPTY | {"tables": [{"title": "", "columns": 1, "rows": []}]}),
    "list.summary.json": "[1]",
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_is_left_out_and_named(tmp_path, name, capsys):
    (tmp_path / "toy.summary.json").write_text(json.dumps(EMPTY | {"notes": ["one note"]}))
    (tmp_path / name).write_text(ODD[name])
    page = write_page(tmp_path)
    assert f"{tmp_path / name} is left out: " in capsys.readouterr().err
    assert "one note" in page.text
    assert f"{tmp_path / name}: " in page.text


def test_odd_values_are_shown(tmp_path):
    nested = json.loads("[" * 300 + "]" * 300)
    RunFiles(tmp_path, "run", {"study": "toy"}).finish({"final": {"x": nested, "y": 10**400}})
    assert "1 values" in write_page(tmp_path).text


@pytest.mark.parametrize(
    "name", ["../secret.png", "/secret.png", "link.png", "", "a\0b", "text.png"]
)
def test_a_picture_from_elsewhere_or_none_at_all_is_left_out(tmp_path, name):
    folder = tmp_path / "runs"
    folder.mkdir()
    figure = Figure()
    figure.subplots()
    save(figure, tmp_path / "secret.png")
    os.symlink(tmp_path / "secret.png", folder / "link.png")
    (folder / "text.png").write_text("words")
    name = name.replace("/secret", f"{tmp_path}/secret") if name[:1] == "/" else name
    summary = EMPTY | {"pictures": [{"file": name, "caption": "a caption"}]}
    (folder / "toy.summary.json").write_text(json.dumps(summary))
    page = write_page(folder)
    assert not page.images
    assert "is left out: " in page.text
    assert "a caption" in page.text


@pytest.mark.parametrize("make", [False, True])
def test_a_folder_without_results_says_what_to_run(tmp_path, make, capsys):
    folder = tmp_path / "empty"
    if make:
        folder.mkdir()
    with pytest.raises(SystemExit) as stop:
        main(["report", str(folder)])
    assert stop.value.code == 2
    assert f"{folder}; run a study first" in capsys.readouterr().err
    assert not (folder / "report.html").exists()


def test_an_output_that_cannot_be_written_is_told(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["report", str(folder), "--output", str(tmp_path)])
    assert stop.value.code == 2
    assert "output: expected a file that can be written, got" in capsys.readouterr().err
