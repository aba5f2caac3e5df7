"""Compile the CUDA kernels and hold what the compiler made of them against bounds. No GPU needed.

    python tools/cuda_check.py                       # builds into build/cuda-check
    python tools/cuda_check.py --library FILE        # one that is already there
    python tools/cuda_check.py --part --library FILE # an object with some of the kernels

Fails if a kernel spills registers or has a stack, takes more registers than its family's bound in
cuda_bounds.toml, or, being there to stream, lacks 16-byte loads or stores or has fewer bytes on
their way than its bound asks for; if a family has no bound, or a bound no kernel; and if the
library needs anything of torch beyond its stable ABI.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from cuda_sass import Kernel, kernels_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "cuda-check"
BOUNDS = Path(__file__).with_name("cuda_bounds.toml")
ARCHITECTURES = ["80", "90", "100"]


def stop(sentence: str) -> NoReturn:
    """End with a sentence that says what to do."""
    sys.exit(f"cuda-check: {sentence}")


@dataclass
class Bound:
    """What the kernels of one family may take and have to have."""

    registers: int
    wide_loads: bool = False
    wide_stores: bool = False
    bytes_in_flight: int = 0
    # Instantiations that move single elements by design: theirs is the register bound alone.
    single: str = r", 1>$"

    def broken(self, kernel: Kernel) -> Iterator[str]:
        """Say what is beyond the bound, with bound and value."""
        if kernel.stack:
            yield f"stack: {kernel.stack} bytes, and none is allowed"
        if kernel.local_stores or kernel.local_loads:
            yield (
                f"spills: {kernel.local_stores} stores and {kernel.local_loads} loads of local "
                "memory, and none is allowed"
            )
        if kernel.registers > self.registers:
            yield f"registers: {kernel.registers}, and the bound is {self.registers}"
        if re.search(self.single, kernel.name):
            return
        if self.wide_loads and not kernel.wide_loads:
            yield "16-byte loads: none, and it is there to stream"
        if self.wide_stores and not kernel.wide_stores:
            yield "16-byte stores: none, and it is there to stream"
        if kernel.bytes_in_flight < self.bytes_in_flight:
            yield (
                f"bytes in flight: {kernel.bytes_in_flight} a thread, "
                f"and the bound is {self.bytes_in_flight}"
            )


def read_bounds(path: Path) -> dict[str, Bound]:
    """Return the bound of each family."""
    return {family: Bound(**entry) for family, entry in tomllib.loads(path.read_text()).items()}


def failures(kernels: Iterable[Kernel], bounds: dict[str, Bound]) -> list[str]:
    """Return a sentence for everything that is beyond its bound."""
    found = []
    for kernel in kernels:
        bound = bounds.get(kernel.family)
        reasons = (
            bound.broken(kernel) if bound else [f"no bound for {kernel.family} in {BOUNDS.name}"]
        )
        found += [f"{kernel.name}, sm_{kernel.architecture}: {reason}" for reason in reasons]
    return found


def absent(kernels: list[Kernel], bounds: Iterable[str], architectures: list[str]) -> list[str]:
    """Return a sentence for every bound and every architecture that has no kernel."""
    families = {kernel.family for kernel in kernels}
    compiled = {(kernel.name, kernel.architecture) for kernel in kernels}
    return [
        f"{family}: a bound in {BOUNDS.name}, but no kernel"
        for family in bounds
        if family not in families
    ] + [
        f"{name}: not compiled for sm_{number}"
        for name in dict.fromkeys(kernel.name for kernel in kernels)
        for number in architectures
        if (name, number) not in compiled
    ]


# Weak symbols of any shared library. What is versioned (has an @) is libc's and libstdc++'s.
WEAK = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}


def unstable(symbols: str) -> list[str]:
    """Read `nm -D --undefined-only`: what is neither the system's nor torch's stable ABI."""
    names = [line.split()[-1] for line in symbols.splitlines() if line.strip()]
    return [
        f"{name}: not in torch's stable ABI"
        for name in names
        if "@" not in name and name not in WEAK and not re.match(r"(aoti_)?torch_", name)
    ]


def markdown(kernels: list[Kernel]) -> str:
    """Return the table."""
    lines = [
        "| kernel | sm | registers | shared | stack | spills: stores / loads "
        "| 16-byte loads / stores | loads in flight | bytes in flight |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| `{k.name}` | {k.architecture} | {k.registers} | {k.shared} | {k.stack} "
        f"| {k.local_stores} / {k.local_loads} | {k.wide_loads} / {k.wide_stores} "
        f"| {k.in_flight} | {k.bytes_in_flight} |"
        for k in kernels
    ]
    return "\n".join(lines)


# ---- Programs ----


def find_cuobjdump() -> str:
    """Return cuobjdump of this environment's packages, or that on PATH."""
    site = Path(sysconfig.get_path("purelib"))
    installed = sorted(site.glob("nvidia/*/bin/cuobjdump"))
    program = str(installed[-1]) if installed else shutil.which("cuobjdump")
    # It runs nvdisasm, and looks for it beside itself and on PATH.
    if program and (
        Path(program).with_name("nvdisasm").exists()
        or shutil.which("nvdisasm")
        or "NVDISASM_PATH" in os.environ
    ):
        return program
    stop(
        "reading compiled kernels needs cuobjdump and nvdisasm: "
        "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm, or put CUDA's bin folder on PATH."
    )


def program(name: str, remedy: str) -> str:
    """Return the path of a build tool; a virtual environment need not be activated."""
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    return path or stop(f"needs {name}, which is not on PATH: {remedy}.")


def build(folder: Path, architectures: list[str]) -> Path:
    """Build the CUDA library with the flags that users get (CMakeLists.txt); return its path."""
    program("nvcc", "install the CUDA toolkit")
    options = {
        "ANDMASK_CUDA": "ON",
        "CMAKE_CUDA_ARCHITECTURES": ";".join(f"{number}-real" for number in architectures),
        "CMAKE_MAKE_PROGRAM": program("ninja", "pip install ninja"),
        "Python_EXECUTABLE": sys.executable,
    }
    defines = [f"-D{key}={value}" for key, value in options.items()]
    cmake = program("cmake", "pip install cmake")
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *defines],
        [cmake, "--build", str(folder), "--target", "andmask_cuda"],
    ):
        if subprocess.run(command, stdout=sys.stderr).returncode:
            stop(f"this failed: {' '.join(command)}")
    return folder / "libandmask_cuda.so"


def output_of(command: list[str]) -> str:
    """Return what a command prints, or stop with its complaint."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        stop(f"{' '.join(command)} failed: {result.stderr.strip()}")
    return result.stdout


def main() -> None:
    """Build, read, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, help="check this one; build nothing")
    parser.add_argument("--part", action="store_true", help="not all kernels need be there")
    parser.add_argument("--build", type=Path, default=BUILD, help="where to build")
    parser.add_argument("--bounds", type=Path, default=BOUNDS)
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, metavar="NUMBER")
    options = parser.parse_args()

    cuobjdump = find_cuobjdump()
    nm = program("nm", "install binutils")
    bounds = read_bounds(options.bounds)
    library = options.library or build(options.build, options.architectures)
    kernels = kernels_of(
        output_of([cuobjdump, "-res-usage", str(library)]),
        output_of([cuobjdump, "-sass", str(library)]),
    )
    table = markdown(kernels)
    print(table)
    options.build.mkdir(parents=True, exist_ok=True)
    (options.build / "kernels.md").write_text(table + "\n")

    found = failures(kernels, bounds)
    if not options.part:
        found += absent(kernels, bounds, options.architectures)
        found += unstable(output_of([nm, "-D", "--undefined-only", str(library)]))
    if found:
        print(f"\ncuda-check: {len(found)} beyond bounds:", *found, sep="\n  ", file=sys.stderr)
        raise SystemExit(1)
    print(f"\ncuda-check: {len(kernels)} kernels within their bounds", file=sys.stderr)


if __name__ == "__main__":
    main()
