"""Drives CMake; metadata stands in pyproject.toml, compiler flags in CMakeLists.txt."""

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
OLDEST_TORCH = (2, 10)


def torch_dir() -> str:
    """Return the folder of the torch package to build against, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            "andmask_ext: building needs torch >= 2.10 in this environment, and found none: "
            "pip install torch (or build without --no-build-isolation)."
        )
    version = importlib.metadata.version("torch")
    major, minor = re.match(r"(\d+)\.(\d+)", version).groups()
    if (int(major), int(minor)) < OLDEST_TORCH:
        sys.exit(f"andmask_ext: building needs torch >= 2.10, and found torch {version}.")
    return spec.submodule_search_locations[0]


def program(name: str, remedy: str) -> str:
    """Return the path of a build tool, or stop with the sentence that helps."""
    # A virtual environment that is not activated is not on PATH.
    path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if path is None:
        sys.exit(f"andmask_ext: building needs {name!r}, which is not on PATH: {remedy}.")
    return path


def check_compiler() -> str:
    """Return the compiler command; CMake reads CXX (which may hold options) by itself."""
    command = os.environ.get("CXX", "c++")
    program(
        (shlex.split(command) or ["c++"])[0],
        "install a C++20 compiler (g++ >= 11 or clang++ >= 14), or set CXX",
    )
    return command


def made_for(build: Path, options: str) -> bool:
    """Tell whether a build folder is one of these options."""
    stamp = build / "stamp"
    return stamp.exists() and stamp.read_text() == options


def build_folder(in_place: bool, options: str) -> Path:
    """Return where to build: a wheel takes the objects of an editable build of its options."""
    editable = ROOT / "build" / "editable"
    return editable if in_place or made_for(editable, options) else ROOT / "build" / "wheel"


class CMakeBuild(build_ext):
    """Builds the native libraries into the package folder."""

    def run(self) -> None:
        in_place = self.editable_mode or self.inplace
        package = (ROOT if in_place else Path(self.build_lib).resolve()) / "andmask_ext"
        cmake = program("cmake", "pip install cmake")
        compiler = check_compiler()
        options = {
            "ANDMASK_TORCH_DIR": torch_dir(),
            "CMAKE_MAKE_PROGRAM": program("ninja", "pip install ninja"),
            "ANDMASK_CUDA": os.environ.get("ANDMASK_CUDA", "AUTO"),
        }
        defines = [f"-D{key}={value}" for key, value in options.items()]
        defines += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        harness = ["-DANDMASK_HARNESS=OFF"]
        if in_place:  # the harness alone needs Python
            import pybind11

            harness = [
                "-DANDMASK_HARNESS=ON",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            ]
        # CMake cannot change compiler, source folder or torch in an existing build folder.
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST")
        content = f"{ROOT} {sys.executable} {compiler} {defines} {architectures}"
        build = build_folder(in_place, content)
        if not made_for(build, content):
            shutil.rmtree(build, ignore_errors=True)
            build.mkdir(parents=True)
            (build / "stamp").write_text(content)
        subprocess.check_call([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *defines, *harness])
        subprocess.check_call([cmake, "--build", build])
        for stale in (package / "lib").glob("libandmask_cuda.*"):  # of a build with other options
            stale.unlink()
        subprocess.check_call([cmake, "--install", build, "--prefix", package])

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class StableWheel(bdist_wheel):
    """One wheel serves every Python: the library uses only the LibTorch stable ABI."""

    def run(self) -> None:
        # What an earlier build left there would get into the wheel.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("andmask_ext.libandmask", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": StableWheel},
)
