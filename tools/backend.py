"""The build backend: that of setuptools, once the environment has all that a build needs.

It imports no package before. So it can name all that is missing in one sentence.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# As in pyproject.toml: without build isolation pip does not look whether they are there.
PACKAGES = {"torch": ">=2.10", "setuptools": ">=77"}
PROGRAMS = {"cmake": ">=3.21", "ninja": ""}
HARNESS = {"pybind11": ">=2.13"}  # the test harness of an editable build


def find_program(name: str) -> str | None:
    """Return the path of a program, or None."""
    # A virtual environment that is not activated is not on PATH.
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def compiler() -> str:
    """Return the command of the compiler. CMake reads CXX, which may hold options, by itself."""
    return os.environ.get("CXX", "").strip() or "c++"


def version_of(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> list[int]:
    """Return the leading numbers of a version: ``">=2.10"`` and ``"2.10.1+cpu"`` as [2, 10]."""
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


def what_is_missing(editable: bool) -> str | None:
    """Return one sentence about all that a build lacks, with the remedy, or None."""
    needs, requirements, remedies = [], [], []
    for package, oldest in {**PACKAGES, **(HARNESS if editable else {})}.items():
        found = version_of(package)
        if found is None or numbers(found) < numbers(oldest):
            needs.append(f"{package} {oldest.replace('>=', '>= ')} (found {found or 'none'})")
            requirements.append(f"'{package}{oldest}'")
    for name, oldest in PROGRAMS.items():
        if find_program(name) is None:
            needs.append(f"{name} (not on PATH)")
            requirements.append(f"'{name}{oldest}'" if oldest else name)
    if requirements:
        remedies.append(f"run `pip install {' '.join(requirements)}`")
    command = shlex.split(compiler())[0]
    if find_program(command) is None:
        needs.append(f"a C++20 compiler ({command!r} is not on PATH)")
        remedies.append("install g++ >= 11 or clang++ >= 14, or set CXX")
    if not needs:
        return None
    listed = " and ".join(filter(None, [", ".join(needs[:-1]), needs[-1]]))
    return f"andmask_ext: building needs {listed} in this environment: {', and '.join(remedies)}."


def hook(name: str) -> Callable[..., Any]:
    """Return a hook of setuptools that checks the environment first."""

    def run(*arguments: Any) -> Any:
        if message := what_is_missing("editable" in name):
            sys.exit(message)
        from setuptools import build_meta

        return getattr(build_meta, name)(*arguments)

    return run


build_sdist = hook("build_sdist")
build_wheel = hook("build_wheel")
build_editable = hook("build_editable")
prepare_metadata_for_build_wheel = hook("prepare_metadata_for_build_wheel")
prepare_metadata_for_build_editable = hook("prepare_metadata_for_build_editable")
