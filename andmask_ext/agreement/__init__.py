"""One backward pass for all environments of a batch."""

from ._agreement import Agreement
from ._report import Line, Report
from ._verify import Deviation, Verification

__all__ = ["Agreement", "Deviation", "Line", "Report", "Verification"]
