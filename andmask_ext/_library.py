"""Loads the native library and tells what it is."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import NamedTuple

import torch

__version__ = importlib.metadata.version("andmask_ext")

_PATH = Path(__file__).parent / "lib" / "libandmask.so"


def _load() -> None:
    if torch.torch_version.TorchVersion(torch.__version__) < "2.10":
        raise ImportError(f"andmask_ext needs torch >= 2.10, but found torch {torch.__version__}.")
    if not _PATH.exists():
        raise ImportError(
            f"andmask_ext: the native library {_PATH} is missing; "
            "build it with `pip install -e .` in the source folder, or install a wheel."
        )
    try:
        torch.ops.load_library(_PATH)
    except OSError as error:
        raise ImportError(f"andmask_ext: cannot load {_PATH}: {error}") from error


_load()


class RuleFacts(NamedTuple):
    """What the native library says of one of its rules."""

    arguments: int
    noise: bool  # takes random numbers
    rescales: bool  # has a mask to rescale by
    per_tensor: bool  # a coordinate depends on others of its tensor


def _rules() -> dict[str, RuleFacts]:
    lines = [line.split() for line in torch.ops.andmask._rule_table().splitlines()]
    return {
        name: RuleFacts(int(arguments), *(flag == "1" for flag in flags))
        for name, arguments, *flags in lines
    }


RULES = _rules()


def build_info() -> dict[str, str | int]:
    """Tell which versions, compiler, instruction set and threads are in use.

    Returns:
        A dict of plain values:
        ``andmask_ext``, ``torch``, ``python``, ``platform``: versions at run time;
        ``libtorch_built``: the torch that the library was compiled against (it runs with any
        torch >= 2.10); ``compiler``; ``isa``: the instruction set of the CPU kernels in use
        (``baseline``, ``x86-64-v3`` or ``x86-64-v4``; the environment variable
        ``ATEN_CPU_CAPABILITY`` lowers it); ``isa_available``: the best this machine can run;
        ``threads``: intra-op threads (:func:`torch.set_num_threads`); ``cuda``.

    Example:
        >>> import andmask_ext
        >>> andmask_ext.build_info()["isa"] in ("baseline", "x86-64-v3", "x86-64-v4")
        True
    """
    native: dict[str, str] = dict(
        line.split(" ", 1) for line in torch.ops.andmask._native_info().splitlines()
    )
    return {
        "andmask_ext": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **native,
        "threads": torch.get_num_threads(),
        "cuda": "not built",
    }
