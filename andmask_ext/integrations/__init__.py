"""Training loops of others: Lightning, Hugging Face Trainer, Accelerate, TorchJD.

Each module needs its framework, and is imported when it is asked for:
``from andmask_ext.integrations.lightning import AgreementCallback``.
"""

from __future__ import annotations

import importlib
from types import ModuleType

_MODULES = ("accelerate", "lightning", "torchjd", "transformers")

__all__ = list(_MODULES)


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_MODULES)
