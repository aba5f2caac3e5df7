"""What is left in the gradient, over the threshold: the mechanism, the shortcut, or neither."""

from .study import main

__all__ = ["main"]
