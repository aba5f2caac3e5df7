"""What a user sees who lacks something: one clear sentence, from the build and from the import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import andmask_ext as am
from andmask_ext import _library
from andmask_ext.__main__ import main

ROOT = Path(__file__).parents[2]


def build(tmp_path: Path, **environment: str) -> str:
    """Run the build driver and return the last line of its output."""
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "lib"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    return result.stderr.strip().splitlines()[-1]


def fake_torch(tmp_path: Path, version: str) -> str:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"__version__ = '{version}'\n")
    metadata = tmp_path / f"torch-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    return str(tmp_path)


def hide(tmp_path: Path, module: str, function: str, name: str) -> str:
    """Make ``module.function(name)`` return None in the build's process."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import {module} as m\n"
        f"find = m.{function}\n"
        f"m.{function} = lambda name, *a, **k: None if name == {name!r} else find(name, *a, **k)\n"
    )
    return str(tmp_path)


def test_torch_too_old_to_build_with(tmp_path: Path) -> None:
    message = build(tmp_path, PYTHONPATH=fake_torch(tmp_path, "2.9.1"))
    assert message == "andmask_ext: building needs torch >= 2.10, and found torch 2.9.1."


def test_no_torch_to_build_with(tmp_path: Path) -> None:
    message = build(tmp_path, PYTHONPATH=hide(tmp_path, "importlib.util", "find_spec", "torch"))
    assert message.startswith("andmask_ext: building needs torch >= 2.10 in this environment")
    assert "pip install" in message


def test_no_cmake(tmp_path: Path) -> None:
    message = build(tmp_path, PYTHONPATH=hide(tmp_path, "shutil", "which", "cmake"))
    assert message.startswith("andmask_ext: building needs 'cmake', which is not on PATH")
    assert "pip install cmake" in message


def test_no_compiler(tmp_path: Path) -> None:
    message = build(tmp_path, CXX="no-such-compiler")
    assert message.startswith("andmask_ext: building needs 'no-such-compiler'")
    assert "C++20 compiler" in message


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
