"""The command line as a whole: what all commands have in common."""

import subprocess
import sys

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from studies.__main__ import COMMANDS, main

STUDIES = [command for command in COMMANDS if command != "report"]
WRONG = [
    ("coinrun", "--levels 0", "levels: expected at least 1, got 0"),
    ("coinrun", "--levels 2000", "levels: expected at most 1000, got 2000"),
    ("coinrun", "--width 12", "width: expected a multiple of 8, got 12"),
    ("correlation", "--environments 1", "environments: expected at least 2, got 1"),
    ("linear", "--environments 2", "environments: expected at least 3, got 2"),
    ("linear", "--trials 31", "trials: expected at most the 30 settings that there are, got 31"),
    ("linear", "--part regression --samples 7", "samples: expected none with part regr"),
    ("spirals", "--tau 1.5", "tau: expected a number in [0, 1], got 1.5"),
    ("spirals", "--batch 4096", "batch: expected at most the 1280 examples"),
    ("spirals", "--environments 2 4", "environments: expected one value in this part, got [2, 4]"),
    (
        "spirals",
        "--pooled",
        "pooled: expected a method that does without environments, got 'and-mask'",
    ),
    ("spirals", "--part environments --no-pooled", "pooled: expected no such option"),
    ("spirals", "--trials 3", "trials: expected at least 1, and --part search, got 3 and compare"),
    ("spirals", "--part environments --method irm", "method: expected mean or and-mask"),
    ("spirals", "--fdr 0.1 --significance 0.1", "fdr, significance: expected one of them, got 0.1"),
    ("threshold", "--part criteria --size short", "size: expected none without part spirals"),
    ("label-noise", "--tau 1.5", "tau: expected a number in [0, 1], got 1.5"),
    ("label-noise", "--size 8", "size: expected at least 16, got 8"),
    ("label-noise", "--batch 2000", "batch: expected at most the 1440 training images, got 2000"),
    ("label-noise", "--data cifar10", "data-dir: expected a folder that holds CIFAR-10, got none"),
    (
        "label-noise",
        "--part random-labels --norm batch group",
        "norm: expected none without part label-noise, got batch group",
    ),
    ("landscape", "--starts 0", "starts: expected 1 to 100000, got 0"),
    ("landscape", "--samples 5 --starts 2", "samples: expected at most the 2 starts, got 5"),
]


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


def test_an_unknown_command_is_named(capsys):
    status, _, told = stopped(capsys, "spiral")
    assert status == 2
    assert "'spiral'" in told
    assert all(command in told for command in COMMANDS)


@pytest.mark.parametrize(("command", "arguments", "message"), WRONG)
def test_wrong_arguments_are_named(command, arguments, message, tmp_path, capsys):
    folder = tmp_path / "none"
    status, _, told = stopped(capsys, command, "--output", folder, *arguments.split())
    assert status == 2
    assert message in told
    assert not list(folder.glob("*"))


def test_without_a_command_help_is_printed(capsys):
    assert main([]) == 0
    told = capsys.readouterr().out
    assert all(f"  {command} " in told for command in COMMANDS)


@pytest.mark.parametrize("package", ["matplotlib", "numpy"])
def test_a_missing_package_is_one_sentence_in_every_study(package):
    code = (
        f"import sys, studies.__main__ as m; sys.modules[{package!r}] = None; "
        f"print([m.main([command]) for command in {STUDIES!r}]); m.main(['spirals', '--help'])"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]  # torch warns of a missing numpy
    result = subprocess.run(command, capture_output=True, text=True)
    statuses, about, options = result.stdout.splitlines()
    assert statuses == str([1] * len(STUDIES)), result.stderr
    remedy = (
        f"the package {package!r}: run `pip install --no-build-isolation '.[studies]'` in the clone"
    )
    for command, line in zip(STUDIES, result.stderr.splitlines(), strict=True):
        assert line.endswith(f"{command}: needs {remedy}")
    # Help says what it can without the package.
    assert about.endswith(f"spirals: {COMMANDS['spirals'][1]}")
    assert options == f"To show its options, it needs {remedy}"
