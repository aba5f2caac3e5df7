"""``python -m andmask_ext spirals`` from outside: records, figures, resuming, messages."""

import json
import signal
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from matplotlib.image import imread

from andmask_ext.__main__ import main

pytestmark = pytest.mark.cpu_only

TINY = (
    "spirals --environments 4 --examples 64 --test-examples 100 --shortcut-dims 4 "
    "--batch 32 --width 16 --layers 2 --revolutions 1"
).split()


def command(*arguments):
    return [sys.executable, "-m", "andmask_ext", *map(str, arguments)]


def run(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120)


def records(folder):
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {(r["identity"]["settings"]["method"], r["identity"]["seed"]): r for r in found}


def assert_picture(path):
    picture = imread(path)
    assert picture.shape[0] > 300
    assert picture.shape[1] > 800
    assert picture[..., :3].std() > 0.05, "an empty picture"
    assert len({tuple(pixel) for pixel in picture[::7, ::7].reshape(-1, picture.shape[2])}) > 20


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    result = run(*TINY, "--epochs", 3, "--seeds", 0, 1, "--output", folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_a_record_for_every_method_and_seed(done):
    folder, _ = done
    found = records(folder)
    assert set(found) == {("and-mask", 0), ("and-mask", 1), ("mean", 0), ("mean", 1)}
    record = found["and-mask", 1]
    identity = record["identity"]
    assert identity["study"] == "spirals"
    assert identity["threads"] == 1
    assert set(identity["versions"]) == {"andmask_ext", "torch", "numpy"}
    settings = identity["settings"]
    assert (settings["environments"], settings["revolutions"], settings["tau"]) == (4, 1, 0.8)
    assert "tau" not in found["mean", 0]["identity"]["settings"]
    assert set(record["history"]) == {"train_accuracy", "test_accuracy", "loss"}
    assert all(len(series) == 3 for series in record["history"].values())
    assert record["final"]["test_accuracy"] == record["history"]["test_accuracy"][-1]
    assert 0 <= record["final"]["train_accuracy"] <= 1
    assert record["seconds"] > 0
    assert record["build"]


def test_a_table_with_the_spread_and_the_figure(done):
    folder, output = done
    assert "and-mask tau=0.8 revolutions=1      2" in output
    assert "±" in output
    assert str(folder / "revolutions1.png") in output
    assert_picture(folder / "revolutions1.png")


def test_nothing_but_results_is_left(done):
    folder, _ = done
    kinds = sorted(path.suffix for path in folder.iterdir())
    assert kinds == [".json"] * 4 + [".png"] + [".pt"] * 4


def test_what_is_done_is_not_run_again_but_other_settings_are(done, capsys):
    folder, _ = done
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    again = [*TINY, "--epochs", "3", "--seeds", "0", "--method", "mean", "--output", str(folder)]
    assert main(again) == 0
    assert "done before" in capsys.readouterr().out
    assert main([*again, "--lr", "0.001"]) == 0
    assert "done before" not in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    assert len(after) == len(before) + 1
    assert after.items() >= before.items()


def test_several_tau_give_a_map(tmp_path, capsys):
    arguments = [*TINY, "--epochs", "1", "--seeds", "0", "--tau", "0", "0.5", "1"]
    assert main([*arguments, "--revolutions", "1", "2", "--output", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("*.json"))) == 2 * (3 + 1)
    assert "revolutions=2" in capsys.readouterr().out
    assert_picture(tmp_path / "map.png")


def test_the_data_are_drawn_without_training(tmp_path):
    assert main(["spirals", "--draw-data", "--output", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["data.png"]
    assert_picture(tmp_path / "data.png")


STOPPED = """
import os, signal, sys
from andmask_ext.__main__ import main
from andmask_ext.studies.spirals import training

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
number, last, plain, seen = int(sys.argv[1]), int(sys.argv[2]), training.batches, []

def batches(*arguments):
    for batch in plain(*arguments):
        seen.append(batch)
        if len(seen) == last:
            os.kill(os.getpid(), number)
        yield batch

training.batches, training.CHECKPOINT_SECONDS = batches, 0
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_interrupted_and_killed_runs_end_with_the_same_bits(tmp_path):
    arguments = [*TINY, "--method", "and-mask", "--seeds", "0", "--epochs", "12", "--output"]

    def stop(how, batch):
        call = [sys.executable, "-c", STOPPED, str(int(how)), str(batch)]
        result = subprocess.run(
            [*call, *arguments, tmp_path / "stopped"], capture_output=True, text=True, timeout=120
        )
        assert not list((tmp_path / "stopped").glob("*.json"))
        assert len(list((tmp_path / "stopped").glob("*.checkpoint"))) == 1
        return result

    interrupted = stop(signal.SIGINT, batch=2 * 4 + 1)
    assert interrupted.returncode == 130
    assert "the same command goes on from there" in interrupted.stderr
    assert "Traceback" not in interrupted.stderr
    assert stop(signal.SIGKILL, batch=2 * 3 + 1).returncode == -signal.SIGKILL

    assert "goes on after epoch 7" in run(*arguments, tmp_path / "stopped").stdout
    assert "goes on" not in run(*arguments, tmp_path / "whole").stdout
    (stopped,) = records(tmp_path / "stopped").values()
    (whole,) = records(tmp_path / "whole").values()
    assert stopped.pop("seconds") > 0
    assert whole.pop("seconds") > 0
    assert stopped == whole
    weights = [next((tmp_path / name).glob("*.pt")) for name in ("stopped", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not list((tmp_path / "stopped").glob("*.checkpoint"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tau", "1.5"], "tau: expected a number in [0, 1], got 1.5"),
        (["--tau", "nan"], "tau: expected a number in [0, 1], got nan"),
        (["--epochs", "0"], "epochs: expected at least 1, got 0"),
        (["--batch", "4096"], "batch: expected at most the 1280 examples"),
        (["--lr", "-1"], "lr: expected a finite number > 0, got -1.0"),
        (["--l2", "-1"], "l2: expected a finite number >= 0, got -1.0"),
        (["--decay", "2"], "decay: expected shares of the epochs"),
        (["--environments", "0"], "environments: expected at least 1, got 0"),
        (["--threads", "0"], "threads: expected at least 1, got 0"),
        (["--seeds", "-1"], "seeds: expected numbers >= 0, got -1"),
        (["--method", "median"], "invalid choice: 'median'"),
        (["--tau", "much"], "invalid float value: 'much'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["spirals", "--output", str(tmp_path / "none"), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_an_output_folder_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        main(["spirals", "--output", str(tmp_path / "file")])
    assert stopped.value.code == 2
    assert "output: expected a folder" in capsys.readouterr().err


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "spirals" in capsys.readouterr().out


def test_info_prints_the_build(capsys):
    assert main(["info"]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("package", ["numpy", "matplotlib", "tqdm"])
def test_a_missing_package_is_one_sentence(package):
    code = (
        f"import sys, andmask_ext.__main__ as m; sys.modules[{package!r}] = None; "
        "sys.exit(m.main(['spirals', '--epochs', '0']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    assert f"needs the package '{package}': pip install andmask_ext[studies]" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_package_itself_imports_no_study():
    code = (
        "import sys, andmask_ext; print({'matplotlib', 'andmask_ext.studies'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr
