"""The report of a run and the comparison of several, as single HTML files that open offline."""

from fedsim.report.compare import Comparison, compared
from fedsim.report.run import write_report

__all__ = ["Comparison", "compared", "write_report"]
