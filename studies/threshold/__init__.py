"""Thresholds that set themselves: by a false discovery rate, by a level of significance."""

from .study import main

__all__ = ["main"]
