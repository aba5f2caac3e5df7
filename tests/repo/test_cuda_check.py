"""What tools/cuda_check.py reads out of machine code, and what it refuses. Needs no nvcc."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "cuda_check.py"
sys.path.append(str(TOOL.parent))
import cuda_check as check  # noqa: E402
import cuda_sass  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="demangles with libstdc++")

SYMBOL = "_ZN7andmask8run_bodyINS_14MaskedMeanBodyIfLi4EEEEEvT_"
RESOURCES = """
Fatbin elf code:
================
arch = sm_90
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function {symbol}:
  REG:{registers} STACK:{stack} SHARED:32 LOCAL:0 CONSTANT[0]:384 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
Fatbin elf code:
================
arch = sm_90
		Function : {symbol}
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
{lines}
		..........
"""
# Two loads under way, then the first is used; the third has a pointer of its own.
STREAM = [
    "LDC R1, c[0x0][0x28]",
    "LDG.E.128 R8, desc[UR4][R4.64]",
    "IADD3 R6, P0, R4, R2, RZ",
    "LDG.E.128 R12, desc[UR4][R6.64]",
    "FADD R8, R8, R12",
    "@P0 LDG.E R20, desc[UR4][R6.64+0x10]",
    "STG.E.128 desc[UR4][R2.64], R8",
    "EXIT",
]


def sass(lines: list[str], symbol: str = SYMBOL) -> str:
    body = "\n".join(
        f"        /*{16 * i:04x}*/                   {line} ;        /* 0x000e24000c1e1d00 */\n"
        "                                                         /* 0x000fe200078e00ff */"
        for i, line in enumerate(lines)
    )
    return SASS.format(symbol=symbol, lines=body)


def kernel(lines: list[str], registers: int = 40, stack: int = 0, symbol: str = SYMBOL):
    """Return what is read of one kernel of these instructions."""
    resources = RESOURCES.format(symbol=symbol, registers=registers, stack=stack)
    (found,) = cuda_sass.kernels_of(resources, sass(lines, symbol))
    return found


BOUND = check.Bound(registers=64, wide_loads=True, wide_stores=True, bytes_in_flight=32)


def broken(found, bound=BOUND) -> list[str]:
    return check.failures([found], {"MaskedMean": bound})


def test_what_is_read_of_a_kernel_that_streams() -> None:
    found = kernel(STREAM)
    assert (found.name, found.family, found.architecture) == (
        "MaskedMean<float, 4>",
        "MaskedMean",
        "90",
    )
    assert (found.registers, found.shared, found.stack) == (40, 32, 0)
    assert (found.local_stores, found.local_loads) == (0, 0)
    assert (found.wide_loads, found.wide_stores) == (2, 1)
    assert (found.in_flight, found.bytes_in_flight) == (2, 32)
    assert broken(found) == []
    assert check.markdown([found]).splitlines()[2] == (
        "| `MaskedMean<float, 4>` | 90 | 40 | 32 | 0 | 0 / 0 | 2 / 1 | 2 | 32 |"
    )


def test_a_spill_fails() -> None:
    (reason,) = broken(kernel([*STREAM[:2], "STL.64 [R1], R2", *STREAM[2:]]))
    assert reason == (
        "MaskedMean<float, 4>, sm_90: spills: 1 stores and 0 loads of local memory, "
        "and none is allowed"
    )
    (reason,) = broken(kernel([*STREAM[:6], "@!P1 LDL R30, [R1+0x8]", *STREAM[6:]]))
    assert "0 stores and 1 loads" in reason


def test_a_stack_fails() -> None:
    (reason,) = broken(kernel(STREAM, stack=16))
    assert reason == "MaskedMean<float, 4>, sm_90: stack: 16 bytes, and none is allowed"


def test_too_many_registers_fail() -> None:
    assert broken(kernel(STREAM, registers=64)) == []
    (reason,) = broken(kernel(STREAM, registers=65))
    assert reason == "MaskedMean<float, 4>, sm_90: registers: 65, and the bound is 64"


def test_a_kernel_without_a_bound_fails() -> None:
    (reason,) = check.failures([kernel(STREAM)], {"Scale": BOUND})
    assert reason == "MaskedMean<float, 4>, sm_90: no bound for MaskedMean in cuda_bounds.toml"


def test_narrow_loads_and_stores_of_a_kernel_that_streams_fail() -> None:
    narrow = [line.replace(".128", ".64") for line in STREAM]
    assert [reason.split(": ")[1] for reason in broken(kernel(narrow))] == [
        "16-byte loads",
        "16-byte stores",
        "bytes in flight",
    ]
    # Those for single elements are not there to stream.
    assert broken(kernel(narrow, symbol=SYMBOL.replace("Li4", "Li1"))) == []
    assert broken(kernel(narrow), check.Bound(registers=64)) == []


def test_few_loads_in_flight_fail() -> None:
    used_at_once = [*STREAM[:2], "FADD R9, R9, RZ", *STREAM[2:]]
    (reason,) = broken(kernel(used_at_once))
    assert reason == (
        "MaskedMean<float, 4>, sm_90: bytes in flight: 16 a thread, and the bound is 32"
    )


@pytest.mark.parametrize(
    ("between", "in_flight"),
    [
        ("IADD3 R2, R3, R4, RZ", 2),
        ("MOV R11, RZ", 1),  # the last of the four registers
        ("STG.E.64 desc[UR4][R2.64], R10", 1),
        ("STG.E.128 desc[UR4][R6.64], R2", 2),  # the address is R6 and R7
        ("STG.E.128 desc[UR4][R2.64], R6", 1),  # R6 to R9
        ("STG.E desc[UR4][R10.64], R2", 1),  # an address that is loaded
        ("DADD R2, R10, R4", 1),  # reads R10 and R11
        ("IMAD.WIDE R2, R4, R5, R10", 1),
        ("HMMA.16816.F32 R24, R24, R8, R24", 1),
        ("UIADD3 UR8, UR9, UR10, URZ", 2),  # uniform registers are others
        ("BRA 0x100", 1),  # what comes next in the listing is not what runs next
        ("@P0 BRA 0x100", 2),  # but may be here
        ("BRA.U !UP0, 0x100", 2),
        ("BRA.DIV UR4, 0x100", 2),
        ("EXIT", 1),
        ("@!P1 EXIT", 2),
        ("CALL.REL.NOINC 0x400", 1),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", 2),
    ],
)
def test_when_loads_count_as_under_way_at_once(between: str, in_flight: int) -> None:
    lines = [
        "LDG.E.128 R8, desc[UR4][R4.64]",
        between,
        "LDG.E.128 R12, desc[UR4][R6.64]",
        "EXIT",
    ]
    assert kernel(lines).in_flight == in_flight


def test_loads_go_on_where_branches_meet() -> None:
    lines = [
        "LDG.E.128 R8, [R4.64]",  # 0x00
        "@P0 BRA 0x50",
        "LDG.E R12, [R4.64+0x10]",  # 0x20
        "LDG.E R13, [R4.64+0x14]",
        "BRA 0x70",
        "LDG.E.64 R14, [R4.64+0x20]",  # 0x50
        "FADD R14, R14, R15",
        "LDG.E R16, [R4.64+0x30]",  # 0x70: after the first way, 3 more are under way
        "FADD R8, R8, R12",
        "@P1 BRA 0x20",  # a loop: what is under way then is not counted
        "EXIT",
    ]
    found = kernel(lines)
    assert (found.in_flight, found.bytes_in_flight) == (4, 28)


def test_a_register_that_is_loaded_twice_is_waited_for() -> None:
    assert kernel(["LDG.E R8, [R4.64]", "LDG.E R8, [R4.64+0x4]", "EXIT"]).in_flight == 1


def test_a_loaded_pointer_has_to_be_there_first() -> None:
    lines = ["LDG.E.64 R8, [R4.64]", "LDG.E R12, [R8.64]", "EXIT"]
    assert kernel(lines).in_flight == 1


def test_loads_of_unknown_address_space_and_of_32_bytes_count() -> None:
    lines = ["LD.E.128 R8, [R4.64]", "ST.E.128 [R4.64], R8", "EXIT"]
    found = kernel(lines)
    assert (found.wide_loads, found.wide_stores) == (1, 1)
    found = kernel(["LDG.E.ENL2.256 R8, R12, desc[UR4][R4.64]", "EXIT"])
    assert (found.wide_loads, found.bytes_in_flight) == (1, 32)


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        (
            "void andmask::run_body<andmask::MaskedMeanBody<float, 4> >(andmask::x)",
            "MaskedMean<float, 4>",
        ),
        ("void andmask::run_body<andmask::DensityBody>(andmask::DensityBody)", "Density"),
        (
            "void andmask::run_body<andmask::StepBody<andmask::Half, andmask::Adam<float> > >(x)",
            "Step<Half, Adam<float>>",
        ),
        (
            "void andmask::run_body<andmask::(anonymous namespace)::SortBody<float, (int)32> >(x)",
            "Sort<float, 32>",
        ),
        ("void other<float>(float*)", "other<float>"),
    ],
)
def test_short_names(demangled: str, short: str) -> None:
    assert cuda_sass.short_name(demangled) == short


def test_demangling() -> None:
    assert cuda_sass.demangle(SYMBOL).startswith(
        "void andmask::run_body<andmask::MaskedMeanBody<float, 4> >"
    )
    assert cuda_sass.demangle("no_symbol") == "no_symbol"


def test_kernels_of_several_architectures_are_told_apart() -> None:
    resources = RESOURCES.format(symbol=SYMBOL, registers=40, stack=0)
    code = sass(STREAM)
    spilled = sass([*STREAM, "STL [R1], R0"]).replace("sm_90", "sm_100")
    found = cuda_sass.kernels_of(
        resources + resources.replace("sm_90", "sm_100").replace("REG:40", "REG:50"), code + spilled
    )
    assert [(k.architecture, k.registers, k.local_stores) for k in found] == [
        ("90", 40, 0),
        ("100", 50, 1),
    ]


def test_only_the_stable_abi_of_torch_passes() -> None:
    symbols = """
                 U aoti_torch_get_data_ptr
                 U torch_library_impl
                 U memcpy@GLIBC_2.14
                 w __gmon_start__
                 U PyLong_AsLong
                 U cudaMalloc
    """
    assert [line.split(":")[0] for line in check.unstable(symbols)] == [
        "PyLong_AsLong",
        "cudaMalloc",
    ]


def test_every_body_has_a_bound_and_every_bound_a_body() -> None:
    folder = TOOL.parents[1] / "csrc" / "cuda"
    bodies = re.findall(r"struct (\w+)Body\b", "".join(p.read_text() for p in folder.rglob("*.h")))
    assert bodies
    assert set(check.read_bounds(check.BOUNDS)) == set(bodies)


def test_every_bound_is_read(tmp_path: Path) -> None:
    bounds = check.read_bounds(check.BOUNDS)
    assert bounds["MaskedMean"].wide_loads
    assert all(0 < bound.registers <= 255 for bound in bounds.values())
    path = tmp_path / "bounds.toml"
    path.write_text("[MaskedMean]\nregister = 4\n")
    with pytest.raises(TypeError, match="register"):
        check.read_bounds(path)


def programs(tmp_path: Path) -> Path:
    """Stand in for cuobjdump: prints the text that lies beside it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = f'#!/bin/sh\ncat "{tmp_path}/$1"\n'
    for name in ("cuobjdump", "nvdisasm", "nm"):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    return folder


def run_tool(tmp_path: Path, path: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Isolated: packages of this environment may have a cuobjdump of their own.
    code = (
        f"import runpy, sys, sysconfig; sys.path.append({str(TOOL.parent)!r}); "
        f"sysconfig.get_path = lambda name: {str(tmp_path)!r}; "
        f"sys.argv = [{str(TOOL)!r}, *{list(arguments)!r}]; "
        f"runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": path},
        capture_output=True,
        text=True,
    )


def test_exit_status_and_files(tmp_path: Path) -> None:
    folder = programs(tmp_path)
    bounds = tmp_path / "bounds.toml"
    bounds.write_text("[MaskedMean]\nregisters = 64\n")
    arguments = ["--library", "x.so", "--bounds", str(bounds), "--build", str(tmp_path / "build")]
    (tmp_path / "-res-usage").write_text(RESOURCES.format(symbol=SYMBOL, registers=40, stack=0))
    (tmp_path / "-sass").write_text(sass(STREAM))
    (tmp_path / "-D").write_text("                 U aoti_torch_delete_tensor_object\n")
    path = f"{folder}:/usr/bin:/bin"

    result = run_tool(tmp_path, path, *arguments, "--architectures", "90")
    assert (result.returncode, result.stderr.strip()) == (
        0,
        "cuda-check: 1 kernels within their bounds",
    )
    assert (tmp_path / "build" / "kernels.md").read_text().strip() == result.stdout.strip()

    result = run_tool(tmp_path, path, *arguments, "--architectures", "90", "100")
    assert result.returncode == 1
    assert "MaskedMean<float, 4>: not compiled for sm_100" in result.stderr

    bounds.write_text("[MaskedMean]\nregisters = 64\n[Median]\nregisters = 64\n")
    result = run_tool(tmp_path, path, *arguments, "--architectures", "90")
    assert result.returncode == 1
    assert "Median: a bound in cuda_bounds.toml, but no kernel" in result.stderr
    result = run_tool(tmp_path, path, *arguments, "--architectures", "90", "--part")
    assert result.returncode == 0
    bounds.write_text("[MaskedMean]\nregisters = 64\n")

    (tmp_path / "-D").write_text("                 U _ZN3c105ErrorC1E\n")
    result = run_tool(tmp_path, path, *arguments, "--architectures", "90")
    assert result.returncode == 1
    assert "_ZN3c105ErrorC1E: not in torch's stable ABI" in result.stderr

    (tmp_path / "-sass").write_text(sass([*STREAM, "STL [R1], R0"]))
    result = run_tool(tmp_path, path, *arguments, "--architectures", "90")
    assert result.returncode == 1
    assert "MaskedMean<float, 4>, sm_90: spills" in result.stderr


def test_without_cuobjdump_one_sentence_says_what_to_install(tmp_path: Path) -> None:
    result = run_tool(tmp_path, str(tmp_path), "--library", "x.so")
    assert result.returncode == 1
    assert result.stderr.strip() == (
        "cuda-check: reading compiled kernels needs cuobjdump and nvdisasm: "
        "pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm, or put CUDA's bin folder on PATH."
    )
