"""One backward pass for all environments of a batch."""

from ._agreement import Agreement

__all__ = ["Agreement"]
