"""Linear models: the authors' regression, and the linear unit tests in two bases."""

from .study import main

__all__ = ["main"]
