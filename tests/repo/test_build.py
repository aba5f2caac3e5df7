"""What a user sees who lacks something: one clear sentence, from the build and from the import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

import andmask_ext as am
from andmask_ext import _library
from andmask_ext.__main__ import main
from tools import backend

ROOT = Path(__file__).parents[2]


# ---- what a build needs ----

EVERYTHING = (
    "andmask_ext: building needs torch >= 2.10 (found none), setuptools >= 77 (found 65.5.0), "
    "pybind11 >= 2.13 (found none), cmake (not on PATH), ninja (not on PATH) and a C++20 compiler "
    "('c++' is not on PATH) in this environment: run `pip install 'torch>=2.10' 'setuptools>=77' "
    "'pybind11>=2.13' 'cmake>=3.21' ninja`, and install g++ >= 11 or clang++ >= 14, or set CXX."
)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment as Python 3.11 makes it, on a machine without a compiler."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(backend, "version_of", {"setuptools": "65.5.0"}.get)
    monkeypatch.setattr(backend, "find_program", lambda name: None)
    return monkeypatch


def test_all_that_a_build_lacks_is_one_sentence(bare: pytest.MonkeyPatch) -> None:
    assert backend.what_is_missing(editable=True) == EVERYTHING
    message = backend.what_is_missing(editable=False)
    assert message is not None
    assert "pybind11" not in message
    for name in ("prepare_metadata_for_build_wheel", "build_wheel", "build_sdist"):
        with pytest.raises(SystemExit) as stopped:
            getattr(backend, name)("folder")
        assert str(stopped.value) == message


def test_only_what_a_build_lacks_is_named(bare: pytest.MonkeyPatch) -> None:
    bare.setattr(backend, "version_of", {"setuptools": "77.0.1", "torch": "2.9.1+cpu"}.get)
    bare.setattr(backend, "find_program", lambda name: f"/bin/{name}")
    assert backend.what_is_missing(editable=False) == (
        "andmask_ext: building needs torch >= 2.10 (found 2.9.1+cpu) in this environment: run "
        "`pip install 'torch>=2.10'`."
    )
    bare.setattr(backend, "version_of", {"setuptools": "78", "torch": "2.10.0a0"}.get)
    assert backend.what_is_missing(editable=False) is None
    bare.setenv("CXX", "'no such' --option")
    bare.setattr(backend, "find_program", lambda name: None if name == "no such" else name)
    assert backend.what_is_missing(editable=False) == (
        "andmask_ext: building needs a C++20 compiler ('no such' is not on PATH) in this "
        "environment: install g++ >= 11 or clang++ >= 14, or set CXX."
    )


def test_the_backend_needs_what_pip_installs_for_it() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (line,) = re.findall(r"^requires = \[(.*)\]$", text, re.MULTILINE)
    needed = {**backend.PACKAGES, **backend.PROGRAMS, **backend.HARNESS}
    listed = {name + oldest for name, oldest in needed.items()}
    assert {requirement.strip(' "') for requirement in line.split(",")} == listed


@pytest.mark.build
@pytest.mark.parametrize("setuptools", ["65.5.0", "none"])
def test_pip_shows_the_sentence(tmp_path: Path, setuptools: str) -> None:
    """In environments as venv makes them: up to Python 3.11, and since."""
    venv.create(tmp_path / "venv")
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    if setuptools != "none":
        metadata = site / f"setuptools-{setuptools}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: setuptools\nVersion: {setuptools}\n")
    pip = (sys.executable, "-m", "pip", "--python", tmp_path / "venv" / "bin" / "python")
    install = [*pip, "install", "--no-build-isolation", "--no-index", "--no-deps", ROOT]
    environment = {**os.environ, "CXX": "none"}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(install, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    shown = result.stdout + result.stderr
    needed = f"torch >= 2.10 (found none), setuptools >= 77 (found {setuptools})"
    assert f"andmask_ext: building needs {needed}" in shown
    assert "a C++20 compiler ('none' is not on PATH)" in shown
    assert "Traceback" not in shown


# ---- progress ----

STEPS = """
import sys
for step in range(1, 31):
    print(f"[{step}/30] Building CXX object {step}")
    if step == 7:
        print("warning: a comparison")
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("status", [0, 1])
def test_a_log_gets_a_line_for_each_tenth(tmp_path: Path, status: int) -> None:
    """And whatever is not a step, in its place."""
    (tmp_path / "ninja.py").write_text(STEPS)
    code = """
import sys, setuptools
setuptools.setup = lambda **options: None
import setup
setup.run_ninja([sys.executable, *sys.argv[1:]])
"""
    command = [sys.executable, "-c", code, tmp_path / "ninja.py", str(status)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ("CalledProcessError" in result.stderr) is bool(status), result.stderr
    shown = [re.sub(r" .*", "", line) for line in result.stdout.splitlines()]
    tenths = [f"[{step}/30]" for step in range(3, 31, 3)]
    assert shown == [*tenths[:2], "warning:", *tenths[2:]]


# ---- what an import and the command line say ----


def test_torch_too_old_to_run_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    with pytest.raises(ImportError) as error:
        _library._load()
    assert str(error.value) == "andmask_ext needs torch >= 2.10, but found torch 2.9.1."


def test_build_info_is_complete() -> None:
    info = am.build_info()
    assert set(info) == {
        "andmask_ext", "torch", "python", "platform", "libtorch_built", "compiler", "isa",
        "isa_available", "threads", "cuda",
    }  # fmt: skip
    assert re.fullmatch(r"\d+\.\d+\.\d+", str(info["libtorch_built"]))
    assert info["andmask_ext"] == am.__version__


def test_the_command_line_prints_build_info() -> None:
    output = subprocess.check_output(
        [sys.executable, "-m", "andmask_ext", "info"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )
    shown = dict(line.split(maxsplit=1) for line in output.splitlines())
    expected = {key: str(value) for key, value in am.build_info().items()}
    assert shown == {**expected, "threads": "1"}


def test_without_a_command_the_command_line_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "{info}" in capsys.readouterr().out
