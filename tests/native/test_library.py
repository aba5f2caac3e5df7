"""What the compiled library needs from outside, and what its kernels may leak inside."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

import andmask_ext

LIBRARY = Path(andmask_ext.__file__).parent / "lib" / "libandmask.so"
OBJECTS = Path(__file__).parents[2] / "build" / "editable" / "CMakeFiles"


def nm(*args: object) -> list[str]:
    assert shutil.which("nm"), "binutils are needed for this test, as for the build"
    return subprocess.check_output(["nm", *args], text=True).splitlines()


def test_only_the_stable_abi_of_torch_is_used() -> None:
    """No undefined at::, c10:: or Py*: one binary serves every torch >= 2.10 and every Python."""
    symbols = [line.split()[-1] for line in nm("-D", "--undefined-only", LIBRARY)]
    foreign = [name for name in symbols if "@" not in name]  # libc and libstdc++ are versioned
    weak = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
    unstable = [
        name
        for name in foreign
        if not name.startswith(("aoti_torch_", "torch_")) and name not in weak
    ]
    assert unstable == []
    assert any(name.startswith("torch_") for name in foreign)


def test_the_library_needs_no_python() -> None:
    dynamic = subprocess.check_output(["readelf", "-d", LIBRARY], text=True)
    needed = [line for line in dynamic.splitlines() if "NEEDED" in line]
    assert any("libtorch_cpu.so" in line for line in needed)
    assert not any("python" in line for line in needed)
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


X86_64 = platform.machine() in ("x86_64", "AMD64")


@pytest.mark.parametrize("isa", ["baseline", "v3", "v4"] if X86_64 else ["baseline"])
def test_kernel_objects_share_no_code_with_others(isa: str) -> None:
    """A weak (inline) function compiled for AVX-512 might be the copy the linker keeps for all."""
    objects = list((OBJECTS / f"andmask_kernels_{isa}.dir").rglob("*.o"))
    assert objects
    for path in objects:
        kinds = {line.split()[-2] for line in nm(path)}
        assert not kinds & {"W", "V", "u"}, path


def test_no_path_of_the_build_machine_is_in_the_library() -> None:
    assert str(Path(__file__).parents[2]).encode() not in LIBRARY.read_bytes()
