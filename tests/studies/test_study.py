"""The frame of all studies: options, records, resuming, processes, the summary."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from studies.summary import Summary, Table

from .common import read_records as records
from .common import read_summary
from .toy import main


def summary(folder):
    return read_summary(folder, "toy")


def process(folder, *arguments):
    call = [sys.executable, "-m", "tests.studies.toy", "--output", folder, *map(str, arguments)]
    root = Path(__file__).parents[2]
    return subprocess.run(call, capture_output=True, text=True, timeout=300, cwd=root)


def test_runs_leave_records_and_a_summary(tmp_path, capsys):
    assert main(["--output", str(tmp_path), "--lr", "0.5", "0.1"]) == 0
    found = records(tmp_path)
    assert len(found) == 4
    assert {one["identity"]["seed"] for one in found} == {0, 1}
    assert all(one["seconds"] > 0 and one["build"] for one in found)
    content = summary(tmp_path)
    assert content["runs"] == 4
    assert content["seconds"] == pytest.approx(sum(one["seconds"] for one in found))
    assert content["claims"][0]["holds"] is True
    assert content["tables"][0]["rows"][0][:2] == ["lr=0.5", 0]
    assert content["command"] == f"python -m studies toy --output {tmp_path} --lr 0.5 0.1"
    output = capsys.readouterr().out
    assert "[4/4] lr=0.1 seed=1  loss" in output
    assert "[holds] losses are numbers: 4 of them" in output


def test_what_is_done_is_not_run_again(tmp_path, capsys):
    arguments = ["--output", str(tmp_path), "--seeds", "0"]
    assert main(arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("lr*")}
    capsys.readouterr()
    assert main([*arguments, "--lr", "0.5", "0.2"]) == 0
    assert capsys.readouterr().out.count("done before") == 1
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("lr*")}
    assert after.items() > before.items()


def test_runs_that_depend_on_others_follow(tmp_path):
    assert main(["--output", str(tmp_path), "--lr", "0.5", "0.1", "--again"]) == 0
    rows = summary(tmp_path)["tables"][0]["rows"]
    assert rows[-1][:2] == ["best", 99]
    assert len(rows) == 5


def test_processes_give_the_same_records(tmp_path):
    alone = process(tmp_path / "alone", "--lr", 0.5, 0.1)
    assert alone.returncode == 0, alone.stderr
    together = process(tmp_path / "together", "--lr", 0.5, 0.1, "--jobs", 2)
    assert together.returncode == 0, together.stderr
    one, two = (records(tmp_path / name) for name in ("alone", "together"))
    for record in (*one, *two):
        del record["seconds"]
    assert one == two
    tables = [summary(tmp_path / name)["tables"] for name in ("alone", "together")]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_ends_with_the_same_bits(tmp_path, number):
    arguments = ["--seeds", "0", "--epochs", "9"]
    whole = process(tmp_path / "whole", *arguments)
    assert whole.returncode == 0, whole.stderr
    stopped = process(tmp_path / "stopped", *arguments, "--stop", int(number), 5)
    if number == signal.SIGINT:
        assert stopped.returncode == 130
        assert "the same command goes on from there" in stopped.stderr
        assert "Traceback" not in stopped.stderr
    else:
        assert stopped.returncode == -number
    assert not records(tmp_path / "stopped")
    assert len(list((tmp_path / "stopped").glob("*.checkpoint"))) == 1
    again = process(tmp_path / "stopped", *arguments)
    assert "goes on after epoch 5" in again.stdout
    one, two = (records(tmp_path / name)[0] for name in ("whole", "stopped"))
    assert two.pop("seconds") > 0
    assert one.pop("seconds") > 0
    assert one == two
    assert not list((tmp_path / "stopped").glob("*.checkpoint"))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_fails_is_named(tmp_path, jobs):
    failed = process(tmp_path, "--lr", 0.5, 7, "--seeds", 0, "--jobs", jobs)
    assert failed.returncode == 1
    assert "[2/2] lr=7 seed=0  failed" in failed.stderr
    assert "RuntimeError: lr of 7" in failed.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_end_with_a_killed_parent(tmp_path):
    call = [sys.executable, "-m", "tests.studies.toy", "--output", tmp_path]
    parent = subprocess.Popen(
        [*map(str, call), "--jobs", "2", "--epochs", "1000000000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert wait_for(lambda: len(list(tmp_path.glob("*.checkpoint"))) == 2)
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        assert len(children) >= 2
    finally:
        parent.kill()
        parent.wait()
    assert wait_for(lambda: not any(map(alive, children)))


def wait_for(condition):
    for _ in range(2400):
        if condition():
            return True
        time.sleep(0.1)
    return False


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_a_damaged_checkpoint_is_told(tmp_path, capsys, content):
    arguments = ["--output", str(tmp_path), "--seeds", "0"]
    assert main(arguments) == 0
    (record,) = (path for path in tmp_path.glob("*.json") if "summary" not in path.name)
    record.unlink()
    record.with_suffix(".checkpoint").write_bytes(content)
    assert main(arguments) == 0
    assert "is damaged, the run begins anew" in capsys.readouterr().err
    assert record.exists()


@pytest.mark.parametrize("after", [0, 1])
def test_a_full_disk_is_told_and_the_same_command_goes_on(tmp_path, capsys, monkeypatch, after):
    arguments = ["--output", str(tmp_path)]
    room = [None] * after  # files that still fit

    def full(descriptor):
        if not room:
            raise OSError(28, "No space left on device", "a file")
        room.pop()

    with monkeypatch.context() as disk:
        disk.setattr("studies.records.os.fsync", full)
        assert main(arguments) == 1
    told = capsys.readouterr().err
    assert "No space left on device" in told
    assert "the same command goes on from there" in told
    assert "Traceback" not in told
    assert len(list(tmp_path.iterdir())) == after
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("done before") == after


def test_a_folder_that_cannot_be_written_is_told_before_any_run(tmp_path, capsys, monkeypatch):
    def read_only(dir):
        raise OSError(30, "Read-only file system", str(dir))

    monkeypatch.setattr("studies.study.TemporaryFile", read_only)
    with pytest.raises(SystemExit) as stopped:
        main(["--output", str(tmp_path)])
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert "output: expected a folder that can be written" in told.err
    assert "lr=" not in told.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "threads: expected at least 1, got 0"),
        (["--jobs", "0"], "jobs: expected at least 1, got 0"),
        (["--seeds", "0", "-2"], "seeds: expected numbers >= 0 and < 2**32, got -2"),
        (["--epochs", "0"], "epochs: expected at least 1, got 0"),
        (["--lr", "13"], "lr: expected no 13"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--output", str(tmp_path / "none"), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "none").glob("*"))


# ---- the summary ----


def test_not_a_number_is_null_in_json(tmp_path):
    path = Summary(tables=[Table("t", ("a",), [(float("nan"),)])]).write(tmp_path, "x", {"a": 1})
    assert path.name == "x.summary.json"
    assert json.loads(path.read_text())["tables"][0]["rows"] == [[None]]
