"""Records and checkpoints: found again by identity, never half written."""

import doctest
import io
import json

import pytest
import torch

from benchmarks import measuring
from studies import records, search, summary
from studies.records import RunFiles, write_atomically

IDENTITY = {"study": "x", "settings": {"tau": 0.8, "decay": (0.5, 0.75)}, "seed": 0}


def finished(folder, identity=IDENTITY):
    files = RunFiles(folder, "run", identity)
    files.finish({"final": {"loss": 1.5}}, {"w": torch.arange(3.0)})
    return files


def test_a_record_is_read_back_with_its_weights(tmp_path):
    files = finished(tmp_path / "new" / "folder")
    again = RunFiles(tmp_path / "new" / "folder", "run", IDENTITY)
    assert again.read_record()["final"] == {"loss": 1.5}
    assert torch.equal(again.read_weights()["w"], torch.arange(3.0))
    assert {p.name for p in files.record.parent.iterdir()} == {
        files.record.name,
        files.weights.name,
    }


@pytest.mark.parametrize("change", [{"seed": 1}, {"study": "y"}, {"settings": {"tau": 0.9}}])
def test_another_identity_is_another_run(tmp_path, change):
    files = finished(tmp_path)
    other = RunFiles(tmp_path, "run", IDENTITY | change)
    assert other.record != files.record
    assert other.read_record() is None


def test_a_record_with_the_right_name_and_another_identity_is_not_taken(tmp_path):
    files = finished(tmp_path)
    record = json.loads(files.record.read_text())
    record["identity"]["seed"] = 7
    files.record.write_text(json.dumps(record))
    assert files.read_record() is None


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\x01", "[" * 100_000])
def test_a_damaged_record_is_not_taken(tmp_path, text):
    files = finished(tmp_path)
    files.record.write_text(text)
    assert files.read_record() is None


def test_a_record_without_weights_is_not_taken(tmp_path):
    files = finished(tmp_path)
    files.weights.unlink()
    assert files.read_record() is None


def test_a_checkpoint_lasts_until_the_record(tmp_path):
    files = RunFiles(tmp_path, "run", IDENTITY)
    files.write_checkpoint({"w": torch.ones(2), "epoch": 3})
    files.write_checkpoint({"w": torch.zeros(2), "epoch": 4})
    state = RunFiles(tmp_path, "run", IDENTITY).read_checkpoint()
    assert state["epoch"] == 4
    assert torch.equal(state["w"], torch.zeros(2))
    files.finish({}, {})
    assert files.read_checkpoint() is None
    assert not files.checkpoint.exists()


def damage(content):
    """Yield files that are no whole checkpoint: cut, with a flipped bit, of another kind."""
    for place in range(0, len(content), len(content) // 50):
        yield content[:place]
        yield content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
        yield content[:place] + bytes(512) + content[place + 512 :]
    for other in ([1, 2], {"identity": IDENTITY}, 5, None):
        file = io.BytesIO()
        torch.save(other, file)
        yield file.getvalue()
    yield content + b"more"


def test_a_damaged_checkpoint_is_not_taken(tmp_path, capsys):
    files = RunFiles(tmp_path, "run", IDENTITY)
    files.write_checkpoint({"w": torch.ones(20), "epoch": 3})
    whole = files.checkpoint.read_bytes()
    assert files.read_checkpoint()["epoch"] == 3
    for content in damage(whole):
        if content != whole:  # 512 zeros in the place of zeros
            files.checkpoint.write_bytes(content)
            assert files.read_checkpoint() is None
            assert "is damaged, the run begins anew" in capsys.readouterr().err


def test_a_failed_cleanup_does_not_hide_why(tmp_path, monkeypatch):
    def full(file):
        monkeypatch.setattr("pathlib.Path.unlink", read_only)
        raise OSError(28, "No space left on device")

    def read_only(path, missing_ok=False):
        raise OSError(30, "Read-only file system")

    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file", full)


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_that_diverged_has_a_record_too(tmp_path):
    files = RunFiles(tmp_path, "run", IDENTITY)
    files.finish({"history": {"loss": [0.5, float("inf"), float("nan")]}, "seconds": 1.0}, {})
    assert files.read_record()["history"]["loss"] == [0.5, None, None]


@pytest.mark.parametrize("module", [records, search, summary, measuring], ids=lambda m: m.__name__)
def test_examples_print_what_they_say(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
