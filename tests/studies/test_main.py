"""The command line as a whole: what all commands have in common."""

import subprocess
import sys

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from studies.__main__ import COMMANDS, main

STUDIES = [command for command in COMMANDS if command not in ("info", "report")]


def stopped(capsys, *arguments: object) -> tuple[int, str, str]:
    """Run a command that ends by itself; return its status and what it printed."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    return stop.value.code, told.out, told.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    status, told, _ = stopped(capsys, command, "--help")
    assert status == 0
    assert told.startswith(f"usage: python -m studies {command} ")


def test_help_lists_every_command_with_what_it_does(capsys):
    status, told, _ = stopped(capsys, "--help")
    assert status == 0
    for command, (_, text) in COMMANDS.items():
        assert any(line.split(None, 1) == [command, text] for line in told.splitlines()), command


@pytest.mark.parametrize("command", STUDIES)
def test_every_study_has_the_common_options(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    _, told, _ = stopped(capsys, command, "--help")
    for option in ("--quick", "--seeds", "--output", "--threads", "--jobs"):
        assert f"{option} " in told, option
    assert f"default: runs/{command} (--quick: runs/{command}-quick)" in told
    assert "Reference:" in told


@pytest.mark.parametrize("command", STUDIES)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--threads", 0), "threads: expected at least 1, got 0"),
        (("--jobs", -2), "jobs: expected at least 1, got -2"),
        (("--seeds", 1, -1), "seeds: expected numbers >= 0 and < 2**32, got -1"),
        (("--seeds", "first"), "argument --seeds: invalid int value: 'first'"),
    ],
)
def test_wrong_common_options_are_named(command, arguments, message, tmp_path, capsys):
    folder = tmp_path / "none"
    status, _, told = stopped(capsys, command, "--output", folder, *arguments)
    assert status == 2
    assert message in told
    assert not folder.exists()


def test_an_unknown_command_is_named(capsys):
    status, _, told = stopped(capsys, "spiral")
    assert status == 2
    assert "'spiral'" in told
    assert all(command in told for command in COMMANDS)


def test_a_missing_matplotlib_is_one_sentence_in_every_study():
    code = (
        "import sys, studies.__main__ as m; sys.modules['matplotlib'] = None; "
        f"print([m.main([command, '--help']) for command in {STUDIES!r}])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == str([1] * len(STUDIES)), result.stderr
    for command, line in zip(STUDIES, result.stderr.splitlines(), strict=True):
        assert f"{command}: needs the package 'matplotlib'" in line
