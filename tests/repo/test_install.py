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
    with pytest.raises(ImportError, match=r"found: no other version.*`pip install -e \.`"):
        _library._find(clone)
    clone.with_name("pyproject.toml").unlink()
    with pytest.raises(ImportError, match="andmask_ext of unknown version is not installed"):
        _library._find(clone)


# ---- what is built ----


def run(*command: object, **options: object) -> str:
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.build
def test_a_source_distribution_has_all_that_the_build_reads(tmp_path: Path) -> None:
    """It builds as the source folder does: its files are the same, to the byte."""
    base = tmp_path / "egg"
    base.mkdir()
    run(
        sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", base,
        "sdist", "--dist-dir", tmp_path, cwd=ROOT,
    )  # fmt: skip
    (archive,) = tmp_path.glob("andmask_ext-*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    needed = [ROOT / name for name in ("CMakeLists.txt", "LICENSE", "README.md", "setup.py")]
    needed += [ROOT / "pyproject.toml", ROOT / "andmask_ext" / "py.typed"]
    needed += (ROOT / "andmask_ext").rglob("*.py")
    for folder in ("cmake", "csrc"):
        needed += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert len(needed) > 100
    for path in needed:
        copy = unpacked / path.relative_to(ROOT)
        assert copy.exists(), f"{path.relative_to(ROOT)} is not in the source distribution"
        assert copy.read_bytes() == path.read_bytes(), path
    assert not list(unpacked.rglob("*.so"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the wheel is installed, beside the wheel itself."""
    folder = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    run(*pip, "install", "--no-deps", "--target", folder / "site", wheel)
    return folder / "site"


@pytest.mark.build
def test_one_wheel_serves_every_python_and_holds_only_the_library(installed: Path) -> None:
    (wheel,) = installed.parent.glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"andmask_ext"}
    libraries = [name for name in names if name.endswith(".so")]
    assert libraries == ["andmask_ext/lib/libandmask.so"]
    metadata = next(installed.glob("*.dist-info")) / "METADATA"
    required = [line for line in metadata.read_text().splitlines() if "Requires-Dist" in line]
    assert [line for line in required if "extra ==" not in line] == ["Requires-Dist: torch>=2.10"]


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
def test_the_wheel_works_outside_the_source_folder(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    ignore = ("-W", "ignore")  # of torch, about a missing numpy
    run(sys.executable, *ignore, "-c", USE, installed, cwd=tmp_path, env=environment)
    program = (installed / "bin" / "andmask").read_text()
    assert "from andmask_ext.__main__ import main" in program


@pytest.mark.build
def test_the_source_folder_uses_the_library_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    no_library = shutil.ignore_patterns("*.so", "__pycache__", "lib")
    shutil.copytree(ROOT / "andmask_ext", clone / "andmask_ext", ignore=no_library)
    shutil.copy(ROOT / "pyproject.toml", clone)
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    code = "from andmask_ext import _library as l, build_info; print(l.__file__, l._PATH)"
    loaded = run(sys.executable, "-c", code, cwd=clone, env=environment)
    library = installed / "andmask_ext" / "lib" / "libandmask.so"
    assert loaded.split() == [str(clone / "andmask_ext" / "_library.py"), str(library)]
    assert "libtorch_built" in run(
        sys.executable, "-m", "andmask_ext", "info", cwd=clone, env=environment
    )
