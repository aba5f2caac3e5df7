"""One backward pass for all environments of a batch."""

from ._agreement import Agreement
from ._report import ParameterReport, Report
from ._verify import Deviation, Verification

__all__ = ["Agreement", "Deviation", "ParameterReport", "Report", "Verification"]
