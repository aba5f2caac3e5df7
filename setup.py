"""Drives CMake; metadata stands in pyproject.toml, compiler flags in CMakeLists.txt."""

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
sys.path.insert(0, str(ROOT / "tools"))

from backend import compiler, find_program, what_is_missing  # noqa: E402


def run_ninja(command: list[str]) -> None:
    """Build. Where nobody sees a line change, print one for each tenth of the steps."""
    if sys.stdout.isatty():
        subprocess.check_call(command)
        return
    shown = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            step = re.match(r"\[(\d+)/(\d+)\] ", line)
            tenth = 10 * int(step[1]) // int(step[2]) if step else 0
            if not step or tenth > shown:  # what is no step is a warning or an error
                print(line, end="", flush=True)
            shown = max(shown, tenth)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


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
        if message := what_is_missing(in_place):
            sys.exit(message)
        cmake = find_program("cmake")
        options = {
            # torch is found, but not imported.
            "ANDMASK_TORCH_DIR": importlib.util.find_spec("torch").submodule_search_locations[0],
            "CMAKE_MAKE_PROGRAM": find_program("ninja"),
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
        content = f"{ROOT} {sys.executable} {compiler()} {defines} {architectures}"
        build = build_folder(in_place, content)
        if not made_for(build, content):
            shutil.rmtree(build, ignore_errors=True)
            build.mkdir(parents=True)
            (build / "stamp").write_text(content)
        subprocess.check_call([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *defines, *harness])
        run_ninja([cmake, "--build", build])
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
