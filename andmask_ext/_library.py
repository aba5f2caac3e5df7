"""Loads the native library and describes its build."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

_NAME = "libandmask.so"
_WITHOUT_TENSORS = ("_check_aggregate", "_native_info", "_rule_table")  # of no device


def _find(package: Path) -> tuple[str, Path]:
    """Return the version and the path of the native library.

    The library is in this package, or in an installed wheel of the same version: the source folder
    shadows an installed wheel, but may have no library.
    """
    beside = package / "lib" / _NAME
    if beside.exists():
        return importlib.metadata.version("andmask_ext"), beside
    version = _source_version(package)
    others = []
    for distribution in importlib.metadata.distributions(name="andmask_ext"):
        path = Path(str(distribution.locate_file(f"andmask_ext/lib/{_NAME}")))
        if path.exists() and distribution.version == version:
            return version, path
        if path.exists():
            others.append(f"{distribution.version} in {path.parents[2]}")
    raise ImportError(
        f"andmask_ext: the native library {beside} is missing, and andmask_ext {version} is not "
        f"installed elsewhere (found: {', '.join(others) or 'no other version'}); build it with "
        "`pip install -v --no-build-isolation .` in the source folder, or install a wheel of this "
        "version."
    )


def _source_version(package: Path) -> str:
    """Return the version in ``pyproject.toml`` of the source folder."""
    project = package.with_name("pyproject.toml")
    text = project.read_text(encoding="utf-8") if project.exists() else ""
    line = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    return line[1] if line else "of unknown version"


def _load() -> None:
    if torch.torch_version.TorchVersion(torch.__version__) < "2.10":
        raise ImportError(f"andmask_ext needs torch >= 2.10, but found torch {torch.__version__}.")
    try:
        torch.ops.load_library(_PATH)
    except OSError as error:
        raise ImportError(f"andmask_ext: cannot load {_PATH}: {error}") from error


def _load_cuda() -> tuple[bool, str]:
    """Load the CUDA library. Return whether that worked, and its version or the reason."""
    if not _CUDA_PATH.exists():
        return False, "not built"
    version, architectures = _CUDA_PATH.with_suffix(".txt").read_text().split()
    described = f"{version} ({architectures.replace('-real', '').replace(';', ' ')})"
    if torch.version.cuda is None:
        return False, f"not loaded: built with CUDA {described}, but torch has no CUDA"
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return False, f"not loaded: built with CUDA {version}, but torch has {torch.version.cuda}"
    try:
        torch.ops.load_library(_CUDA_PATH)
    except OSError as error:
        return False, f"not loaded: {error}"
    return True, described


def _explain_missing_cuda(state: str) -> None:
    """Make ops on CUDA tensors raise an error that states the reason and the remedy."""
    message = (
        f"andmask_ext: the ops for CUDA tensors are {state}; build them with "
        "`ANDMASK_CUDA=ON pip install --no-build-isolation .` in the source folder (needs nvcc), "
        "or move the tensors to the CPU"
    )
    for name in torch._C._dispatch_get_all_op_names():
        op = name.removeprefix("andmask::")
        if op != name and op not in _WITHOUT_TENSORS:
            _EXPLANATIONS.impl(op, _raiser(message), "CUDA")


def _raiser(message: str) -> Callable[..., NoReturn]:
    def explain(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(message)

    return explain


__version__, _PATH = _find(Path(__file__).parent)
_CUDA_PATH = _PATH.with_name("libandmask_cuda.so")
_load()
_EXPLANATIONS = torch.library.Library("andmask", "IMPL")
_CUDA_LOADED, _CUDA_STATE = _load_cuda()
if not _CUDA_LOADED and torch.version.cuda is not None:
    _explain_missing_cuda(_CUDA_STATE)
    if _CUDA_PATH.exists():
        warnings.warn(
            f"andmask_ext: the library for CUDA is {_CUDA_STATE}; ops on the CPU work, those on "
            "CUDA tensors do not. Rebuild it in this environment: "
            "`ANDMASK_CUDA=ON pip install --no-build-isolation .`",
            stacklevel=2,
        )


class RuleFacts(NamedTuple):
    """Properties of a rule in the native library."""

    arguments: int
    noise: bool  # takes random numbers
    rescales: bool  # has a mask to rescale by
    per_tensor: bool  # a coordinate depends on other coordinates of its tensor


def _rules() -> dict[str, RuleFacts]:
    lines = [line.split() for line in torch.ops.andmask._rule_table().splitlines()]
    return {
        name: RuleFacts(int(arguments), *(flag == "1" for flag in flags))
        for name, arguments, *flags in lines
    }


RULES = _rules()


def build_info() -> dict[str, str | int]:
    """Return the versions, compiler, instruction set and threads in use.

    Returns:
        A dict of plain values.

        - ``andmask_ext``, ``torch``, ``python``, ``platform``: versions at run time.
        - ``libtorch_built``: the torch that the library was compiled against. The library runs with
          any torch >= 2.10.
        - ``compiler``: the compiler of the library.
        - ``isa``: the instruction set of the CPU kernels in use: ``baseline``, ``x86-64-v3`` or
          ``x86-64-v4``. The environment variable ``ATEN_CPU_CAPABILITY`` lowers it.
        - ``isa_available``: the best instruction set that this machine can run.
        - ``threads``: the number of intra-op threads (:func:`torch.set_num_threads`).
        - ``cuda``: the CUDA version and the architectures of the library for CUDA tensors, or the
          reason why it is not loaded.

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
        "cuda": _CUDA_STATE,
    }
