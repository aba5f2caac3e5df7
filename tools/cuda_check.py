"""Compile the CUDA kernels and hold what the compiler made of them against bounds. No GPU needed.

    python tools/cuda_check.py                       # builds into build/cuda-check
    python tools/cuda_check.py --library FILE        # a library or object that is already there

Fails if a kernel spills registers or has a stack, takes more registers than its family's bound in
cuda_bounds.toml, has no bound there, or, being there to stream, lacks 16-byte loads or stores or
has fewer loads on their way than its bound asks for.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import tomllib

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "cuda-check"
BOUNDS = Path(__file__).with_name("cuda_bounds.toml")
ARCHITECTURES = ["80", "90", "100"]


def stop(sentence: str) -> NoReturn:
    """End with a sentence that says what to do."""
    sys.exit(f"cuda-check: {sentence}")


@dataclass
class Kernel:
    """What is known of one kernel on one architecture."""

    name: str  # such as MaskedMean<float, 4>
    architecture: str
    registers: int = 0
    shared: int = 0  # bytes, without what a launch asks for
    stack: int = 0
    local_stores: int = 0  # instructions: spills, and arrays that are not in registers
    local_loads: int = 0
    wide_loads: int = 0  # instructions of 16 bytes or more
    wide_stores: int = 0
    in_flight: int = 0  # most loads under way before one of them is waited for
    bytes_in_flight: int = 0

    @property
    def family(self) -> str:
        """What the bound stands under."""
        return self.name.split("<")[0]


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


# ---- Names ----


def demangle(symbol: str) -> str:
    """Return the C++ name of a symbol, or the symbol."""
    library = ctypes.CDLL("libstdc++.so.6")
    function = library.__cxa_demangle
    function.restype = ctypes.c_void_p
    status = ctypes.c_int()
    text = function(symbol.encode(), None, None, ctypes.byref(status))
    if status.value or not text:
        return symbol
    name = ctypes.string_at(text).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(text))
    return name


def short_name(demangled: str) -> str:
    """Make "MaskedMean<float, 4>" of "void andmask::run<andmask::MaskedMeanBody<float, 4> >()"."""
    name = re.sub(r"\(anonymous namespace\)::|andmask::|^void ", "", demangled)
    name = re.sub(r"\((?:int|long|bool)\)(?=-?\d)", "", name)
    if not name.startswith("run<"):
        return name.split("(")[0].replace(" >", ">")
    depth = 0
    for end in range(len("run"), len(name)):
        depth += {"<": 1, ">": -1}.get(name[end], 0)
        if depth == 0:
            break
    name = name[len("run<") : end].strip().replace(" >", ">")
    return re.sub(r"^(\w+?)Body\b", r"\1", name)


# ---- What cuobjdump prints ----


def parse_resources(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """Read `cuobjdump -res-usage`: (symbol, architecture) to REG, STACK, SHARED and so on."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    architecture = symbol = ""
    for line in text.splitlines():
        if match := re.match(r"arch = sm_(\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            symbol = match[1]
        elif symbol and "REG:" in line:
            values = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
            found[symbol, architecture] = values
            symbol = ""
    return found


INSTRUCTION = re.compile(
    r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][A-Z0-9_.]*)\s*(?P<operands>[^;]*);"
)


def parse_sass(text: str) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """Read `cuobjdump -sass`: (symbol, architecture) to instructions, each opcode and operands."""
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    architecture = ""
    instructions: list[tuple[str, str]] = []
    for line in text.splitlines():
        if match := INSTRUCTION.match(line):
            instructions.append((match["opcode"], match["operands"]))
        elif match := re.match(r"\s*Function : (\S+)", line):
            instructions = found.setdefault((match[1], architecture), [])
        elif match := re.match(r"arch = sm_(\w+)", line):
            architecture = match[1]
    return found


def access_bytes(opcode: str) -> int:
    """Return how many bytes a memory instruction moves for each thread."""
    parts = opcode.split(".")
    for bits in (256, 128, 64):
        if str(bits) in parts:
            return bits // 8
    return 1 if {"U8", "S8"} & set(parts) else 2 if {"U16", "S16"} & set(parts) else 4


# LD and ST: of an address that the compiler does not know to be global memory.
GLOBAL_LOADS, GLOBAL_STORES = ("LDG", "LD"), ("STG", "ST")
# After these the next line is not what runs next.
LEAVES = ("EXIT", "RET", "BRA", "JMP", "BRX", "CALL")


def registers_named(opcode: str, operands: str) -> set[int]:
    """Return all registers that an instruction may touch, those after a named first one too."""
    base = opcode.split(".")[0]
    if base.endswith("MMA"):
        width = 4
    elif base[0] == "D" or "WIDE" in opcode or "F64" in opcode:
        width = 2
    else:
        width = max(1, access_bytes(opcode) // 4) if base.startswith(("ST", "LD", "CS2R")) else 1
    named = set()
    for match in re.finditer(r"\bR(\d+)(\.64)?", operands):
        first = int(match[1])
        named.update(range(first, first + max(width, 2 if match[2] else 1)))
    return named


@dataclass
class Flight:
    """Loads under way, in the order of the listing, until one of their registers is touched."""

    most: int = 0
    most_bytes: int = 0
    loads: int = 0
    bytes: int = 0
    pending: set[int] = field(default_factory=set)

    def land(self) -> None:
        """One of them is waited for: begin anew."""
        self.loads = self.bytes = 0
        self.pending = set()

    def take_off(self, opcode: str, operands: str) -> None:
        """Add a load."""
        size = access_bytes(opcode)
        target, _, address = operands.partition("[")
        if self.pending & registers_named("MOV", address):  # a pointer that is itself loaded
            self.land()
        self.loads += 1
        self.bytes += size
        for first in re.findall(r"\bR(\d+)", target):
            count = 4 if size > 16 else max(1, size // 4)
            self.pending.update(range(int(first), int(first) + count))
        self.most = max(self.most, self.loads)
        self.most_bytes = max(self.most_bytes, self.bytes)


def count_instructions(kernel: Kernel, instructions: list[tuple[str, str]]) -> None:
    """Fill in what the instructions tell of a kernel."""
    flight = Flight()
    for opcode, operands in instructions:
        base = opcode.split(".")[0]
        wide = access_bytes(opcode) >= 16
        kernel.local_stores += base == "STL"
        kernel.local_loads += base == "LDL"
        kernel.wide_loads += base in GLOBAL_LOADS and wide
        kernel.wide_stores += base in GLOBAL_STORES and wide
        if base in GLOBAL_LOADS:
            flight.take_off(opcode, operands)
        elif base in LEAVES or flight.pending & registers_named(opcode, operands):
            flight.land()
    kernel.in_flight, kernel.bytes_in_flight = flight.most, flight.most_bytes


def kernels_of(resources: str, sass: str) -> list[Kernel]:
    """Join both printouts of cuobjdump; one kernel a line of the table, in its order."""
    code = parse_sass(sass)
    kernels = []
    for (symbol, architecture), usage in parse_resources(resources).items():
        if (symbol, architecture) not in code:
            stop(f"cuobjdump printed no code of {demangle(symbol)} for sm_{architecture}.")
        kernel = Kernel(short_name(demangle(symbol)), architecture)
        kernel.registers, kernel.shared = usage["REG"], usage["SHARED"]
        kernel.stack = usage["STACK"] + usage["LOCAL"]
        count_instructions(kernel, code[symbol, architecture])
        kernels.append(kernel)
    return sorted(
        kernels, key=lambda kernel: (kernel.name, int(re.sub(r"\D", "", kernel.architecture)))
    )


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
    parser.add_argument("--build", type=Path, default=BUILD, help="where to build")
    parser.add_argument("--bounds", type=Path, default=BOUNDS)
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, metavar="NUMBER")
    options = parser.parse_args()

    cuobjdump = find_cuobjdump()
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
    compiled = {kernel.architecture for kernel in kernels}
    for missing in [number for number in options.architectures if number not in compiled]:
        found.append(f"{library.name} holds no kernel for sm_{missing}")
    if not options.library:
        families = {kernel.family for kernel in kernels}
        found += [
            f"{options.bounds.name}: no kernel {name}" for name in bounds if name not in families
        ]
    if found:
        print(f"\ncuda-check: {len(found)} beyond bounds:", *found, sep="\n  ", file=sys.stderr)
        raise SystemExit(1)
    print(f"\ncuda-check: {len(kernels)} kernels within their bounds", file=sys.stderr)


if __name__ == "__main__":
    main()
