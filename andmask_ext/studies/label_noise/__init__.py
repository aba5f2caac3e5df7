"""Random and noisy labels: what no other example agrees with is not to be memorised."""

from .study import main

__all__ = ["main"]
