"""What users install: the source distribution, the wheel, and the wheel beside the source folder.

The library is built once for all of it: a wheel takes the objects of `make build`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from andmask_ext import _library

ROOT = Path(__file__).parents[2]


# ---- which library is loaded ----


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source folder without a native library; nothing is installed."""
    package = tmp_path / "clone" / "andmask_ext"
    package.mkdir(parents=True)
    package.with_name("pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    monkeypatch.setattr(sys, "path", [str(package.parent)])
    return package


def install(folder: Path, version: str, library: bool = True) -> Path:
    """Make a folder look as if a wheel were installed there."""
    metadata = folder / f"andmask_ext-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: andmask_ext\nVersion: {version}\n")
    path = folder / "andmask_ext" / "lib" / "libandmask.so"
    if library:
        path.parent.mkdir(parents=True)
        path.touch()
    sys.path.append(str(folder))
    return path


def test_the_library_beside_the_package_comes_first(clone: Path, tmp_path: Path) -> None:
    install(tmp_path / "other", "1.2.3")
    beside = install(clone.parent, "1.2.3")
    assert _library._find(clone) == ("1.2.3", beside)


def test_a_source_folder_takes_the_library_of_its_version(clone: Path, tmp_path: Path) -> None:
    install(tmp_path / "old", "1.2.2")
    install(tmp_path / "editable", "1.2.3", library=False)
    path = install(tmp_path / "new", "1.2.3")
    assert _library._find(clone) == ("1.2.3", path)


def test_a_library_of_another_version_is_refused(clone: Path, tmp_path: Path) -> None:
    install(tmp_path / "old", "1.2.2")
    with pytest.raises(ImportError) as error:
        _library._find(clone)
    assert str(clone / "lib" / "libandmask.so") in str(error.value)
    assert "andmask_ext 1.2.3 is not installed elsewhere" in str(error.value)
    assert f"found: 1.2.2 in {tmp_path / 'old'}" in str(error.value)


def test_nothing_is_installed(clone: Path) -> None:
    with pytest.raises(ImportError, match=r"found: no other version.*`pip install -v --no-"):
        _library._find(clone)
    clone.with_name("pyproject.toml").unlink()
    with pytest.raises(ImportError, match="andmask_ext of unknown version is not installed"):
        _library._find(clone)


# ---- what is built ----


def run(*command: object, **options: object) -> str:
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


BUILT_FROM = ["CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"]
no_library = shutil.ignore_patterns("*.so", "__pycache__", "lib")


@pytest.mark.build
def test_a_source_distribution_has_all_that_the_build_reads(tmp_path: Path) -> None:
    """Its files are those of the source folder, to the byte: it builds as the folder does."""
    source = tmp_path / "source"
    for folder in ("andmask_ext", "cmake", "csrc"):
        shutil.copytree(ROOT / folder, source / folder, ignore=no_library)
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, source)
    (source / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "backend.py", source / "tools")
    needed = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    assert len(needed) > 150
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path, cwd=source)
    (archive,) = tmp_path.glob("andmask_ext-*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    for path in needed:
        assert (unpacked / path).exists(), f"{path} is not in the source distribution"
        assert (unpacked / path).read_bytes() == (source / path).read_bytes(), path


USE = """
import sys
for extra in ("numpy", "scipy", "pandas", "matplotlib"):
    sys.modules[extra] = None
import torch
import andmask_ext as am

assert am.__file__.startswith(sys.argv[1]), am.__file__
grads = torch.tensor([[1.0, -2.0, 3.0], [3.0, 4.0, 5.0]])
assert torch.ops.andmask.masked_mean(grads, 1.0).tolist() == [2.0, 0.0, 4.0]
weight = torch.ones(2, requires_grad=True)
am.backward([(weight * k).sum() for k in (1.0, 3.0)], am.AndMask(1.0))
assert weight.grad.tolist() == [2.0, 2.0]
assert am.metrics.vote_histogram(grads).counts.tolist() == [1, 0, 2]
losses = [lambda x: x.square().sum(), lambda x: 3 * x.square().sum()]
assert am.metrics.inconsistency_score(losses, torch.zeros(2), 0.1).bound == "exact"
"""


@pytest.mark.build
def test_the_wheel_works_alone_and_beside_the_source_folder(tmp_path: Path) -> None:
    """One test, so that no two processes of pytest build in one folder."""
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "site"
    run(*pip, "install", "--no-deps", "--target", installed, wheel)

    assert "-py3-none-linux_" in wheel.name  # one wheel for every Python
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"andmask_ext"}
    libraries = [name for name in names if name.endswith(".so")]
    assert libraries == ["andmask_ext/lib/libandmask.so"]  # and no test harness
    metadata = (next(installed.glob("*.dist-info")) / "METADATA").read_text()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert [line for line in required if "extra ==" not in line] == ["Requires-Dist: torch>=2.10"]

    environment = {**os.environ, "PYTHONPATH": str(installed)}
    ignore = ("-W", "ignore")  # torch warns of a missing numpy
    run(sys.executable, *ignore, "-c", USE, installed, cwd=tmp_path, env=environment)
    assert "from andmask_ext.__main__ import main" in (installed / "bin" / "andmask").read_text()

    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "andmask_ext", clone / "andmask_ext", ignore=no_library)
    shutil.copy(ROOT / "pyproject.toml", clone)
    code = """
from andmask_ext import _library, __main__
print(_library.__file__, _library._PATH)
__main__.main(["info"])
"""
    printed = run(sys.executable, "-c", code, cwd=clone, env=environment)
    loaded, *info = printed.splitlines()
    library = installed / "andmask_ext" / "lib" / "libandmask.so"
    assert loaded.split() == [str(clone / "andmask_ext" / "_library.py"), str(library)]
    assert any(line.startswith("libtorch_built") for line in info)
