"""The library for CUDA is loaded beside a torch with CUDA; else one sentence says why not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from andmask_ext import _library


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there but cannot be loaded."""
    path = tmp_path / "libandmask_cuda.so"
    path.write_text("not a library")
    path.with_suffix(".txt").write_text("13.0\n80-real;90-real;120\n")
    monkeypatch.setattr(_library, "_CUDA_PATH", path)
    return path


def test_it_is_not_built_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_CUDA_PATH", tmp_path / "libandmask_cuda.so")
    assert _library._load_cuda() == (False, "not built")


@pytest.mark.usefixtures("library")
def test_a_torch_without_cuda_does_not_touch_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("loaded"))
    loaded, state = _library._load_cuda()
    assert not loaded
    assert state == "not loaded: built with CUDA 13.0 (80 90 120), but torch has no CUDA"


@pytest.mark.usefixtures("library")
def test_another_cuda_version_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("loaded"))
    loaded, state = _library._load_cuda()
    assert not loaded
    assert state == "not loaded: built with CUDA 13.0, but torch has 12.8"


def test_a_broken_library_is_named(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.1")
    loaded, state = _library._load_cuda()
    assert not loaded
    assert state.startswith("not loaded: ")
    assert str(library) in state


def test_the_same_major_version_is_loaded(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.1")
    found = []
    monkeypatch.setattr(torch.ops, "load_library", found.append)
    assert _library._load_cuda() == (True, "13.0 (80 90 120)")
    assert found == [library]


# Dispatches a CPU tensor as if it lay on a GPU.
CALL = """
import sys, warnings
import torch
torch.version.cuda = {version!r}
from pathlib import Path
{prepare}
import andmask_ext as am
key = torch._C.DispatchKey.CUDA
assert torch.ops.andmask.masked_mean(torch.ones(2, 3)).tolist() == [1, 1, 1]
try:
    torch.ops.andmask.masked_mean.default._op_dk(key, torch.ones(2, 3))
except NotImplementedError as error:
    print(error)
"""


def run(version: str, prepare: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CALL.format(version=version, prepare=prepare)],
        capture_output=True,
        text=True,
        check=True,
    )


HIDE = """
exists = Path.exists
Path.exists = lambda self: "libandmask_cuda" not in self.name and exists(self)
"""


def test_an_op_on_a_gpu_says_that_the_library_is_not_built() -> None:
    result = run("13.0", HIDE)
    assert result.stdout.startswith("andmask_ext: the ops for CUDA tensors are not built; build")
    assert "ANDMASK_CUDA=ON pip install" in result.stdout
    assert result.stderr == ""


MISMATCH = """
exists, read = Path.exists, Path.read_text
Path.exists = lambda self: "libandmask_cuda" in self.name or exists(self)
Path.read_text = lambda self, *a, **k: (
    "13.0\\n90\\n" if "libandmask_cuda" in self.name else read(self, *a, **k)
)
"""


def test_a_mismatch_warns_once_and_the_cpu_works() -> None:
    result = run("12.8", MISMATCH)
    assert result.stdout.startswith(
        "andmask_ext: the ops for CUDA tensors are not loaded: built with CUDA 13.0, "
        "but torch has 12.8"
    )
    assert result.stderr.count("UserWarning: andmask_ext: the library for CUDA is not loaded") == 1
    assert "ops on the CPU work" in result.stderr
