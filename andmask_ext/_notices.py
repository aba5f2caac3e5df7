"""Warnings about what cannot be refused: each is given once for each object."""

from __future__ import annotations

import sys
import warnings
import weakref
from pathlib import Path

_PACKAGE = str(Path(__file__).parent)
_given: weakref.WeakKeyDictionary[object, set[str]] = weakref.WeakKeyDictionary()


def warn_once(owner: object, message: str) -> None:
    """Warn at the caller's line outside of this package, unless ``owner`` has said the same.

    Args:
        owner: the object that the warning is about, such as an optimizer.
        message: names the argument, what is wrong, and the remedy.
    """
    given = _given.setdefault(owner, set())
    if message in given:
        return
    given.add(message)
    frame, depth = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, stacklevel=depth)
