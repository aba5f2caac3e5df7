"""Reads what cuobjdump prints of compiled kernels."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from typing import NamedTuple


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
    in_flight: int = 0  # loads under way before one of them is waited for
    bytes_in_flight: int = 0  # the most at any place

    @property
    def family(self) -> str:
        """What the bound stands under."""
        return self.name.split("<")[0]


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
    """Make "MaskedMean<float, 4>" of "void andmask::run_body<andmask::MaskedMeanBody<...> >()"."""
    name = re.sub(r"\(anonymous namespace\)::|andmask::|^void ", "", demangled)
    name = re.sub(r"\((?:int|long|bool)\)(?=-?\d)", "", name)
    if not name.startswith("run_body<"):
        return name.split("(")[0].replace(" >", ">")
    depth = 0
    for end in range(len("run_body"), len(name)):
        depth += {"<": 1, ">": -1}.get(name[end], 0)
        if depth == 0:
            break
    name = name[len("run_body<") : end].strip().replace(" >", ">")
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
    r"\s+/\*(?P<place>[0-9a-f]{4,})\*/\s+(?P<condition>@!?U?P\w+\s+)?"
    r"(?P<opcode>[A-Z][A-Z0-9_.]*)\s*(?P<operands>[^;]*);"
)


class Instruction(NamedTuple):
    """One line of machine code."""

    place: int
    opcode: str
    operands: str
    conditional: bool

    @property
    def base(self) -> str:
        """The opcode without its variant."""
        return self.opcode.split(".")[0]

    @property
    def leaves(self) -> bool:
        """Whether the next line is never what runs next."""
        if self.base not in ("EXIT", "RET", "BRA", "JMP", "BRX", "CALL"):
            return False
        # A branch may have its condition among the operands, or be taken where threads diverge.
        return not (self.conditional or "P" in self.operands or self.opcode == "BRA.DIV")

    @property
    def target(self) -> int | None:
        """Where a branch leads."""
        found = re.search(r"\b0x([0-9a-f]+)$", self.operands.strip())
        return int(found[1], 16) if found and self.base == "BRA" else None


def parse_sass(text: str) -> dict[tuple[str, str], list[Instruction]]:
    """Read `cuobjdump -sass`: (symbol, architecture) to instructions."""
    found: dict[tuple[str, str], list[Instruction]] = {}
    architecture = ""
    instructions: list[Instruction] = []
    for line in text.splitlines():
        if match := INSTRUCTION.match(line):
            place, opcode, operands = int(match["place"], 16), match["opcode"], match["operands"]
            instructions.append(Instruction(place, opcode, operands, bool(match["condition"])))
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
    for match in re.finditer(r"\bR(\d+)(\.64)?|\[[^]]*]", operands):
        if match[1] is None:  # an address, however much lies there
            named |= registers_named("MOV", match[0][1:-1])
        else:
            first = int(match[1])
            named.update(range(first, first + max(width, 2 if match[2] else 1)))
    return named


class Flight(NamedTuple):
    """Loads under way, until one of their registers is touched."""

    bytes: int = 0
    loads: int = 0
    pending: frozenset[int] = frozenset()

    def after(self, line: Instruction) -> Flight:
        """Return what is under way behind an instruction."""
        if line.base not in GLOBAL_LOADS:
            named = registers_named(line.opcode, line.operands)
            return Flight() if self.pending & named else self
        size = access_bytes(line.opcode)
        target, _, address = line.operands.partition("[")
        count = 4 if size > 16 else max(1, size // 4)
        loaded = {int(first) + i for first in re.findall(r"\bR(\d+)", target) for i in range(count)}
        # The address may be loaded itself.
        before = Flight() if self.pending & (loaded | registers_named("MOV", address)) else self
        return Flight(before.bytes + size, before.loads + 1, before.pending | loaded)


def most_in_flight(instructions: list[Instruction]) -> Flight:
    """Return the largest of all paths that only jump ahead; of two that meet the larger goes on."""
    arriving: dict[int, Flight] = {}
    flight = most = Flight()
    for line in instructions:
        flight = max(flight, arriving.pop(line.place, Flight()), key=lambda each: each[:2])
        flight = flight.after(line)
        most = max(most, flight, key=lambda each: each[:2])
        if line.target is not None and line.target > line.place:
            arriving[line.target] = max(
                flight, arriving.get(line.target, Flight()), key=lambda each: each[:2]
            )
        if line.leaves:
            flight = Flight()
    return most


def count_instructions(kernel: Kernel, instructions: list[Instruction]) -> None:
    """Fill in what the instructions tell of a kernel."""
    for line in instructions:
        wide = access_bytes(line.opcode) >= 16
        kernel.local_stores += line.base == "STL"
        kernel.local_loads += line.base == "LDL"
        kernel.wide_loads += line.base in GLOBAL_LOADS and wide
        kernel.wide_stores += line.base in GLOBAL_STORES and wide
    kernel.bytes_in_flight, kernel.in_flight, _ = most_in_flight(instructions)


def kernels_of(resources: str, sass: str) -> list[Kernel]:
    """Join both printouts of cuobjdump; one kernel a line of the table, in its order."""
    code = parse_sass(sass)
    kernels = []
    for (symbol, architecture), usage in parse_resources(resources).items():
        if (symbol, architecture) not in code:
            raise ValueError(f"no code of {demangle(symbol)} for sm_{architecture}")
        kernel = Kernel(short_name(demangle(symbol)), architecture)
        kernel.registers, kernel.shared = usage["REG"], usage["SHARED"]
        kernel.stack = usage["STACK"] + usage["LOCAL"]
        count_instructions(kernel, code[symbol, architecture])
        kernels.append(kernel)
    return sorted(
        kernels, key=lambda kernel: (kernel.name, int(re.sub(r"\D", "", kernel.architecture)))
    )
