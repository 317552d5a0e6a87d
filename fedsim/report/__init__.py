"""The report of a run and the comparison of several, as single HTML files that open offline."""

from fedsim.report.compare import comparison_table, write_comparison
from fedsim.report.run import write_report

__all__ = ["comparison_table", "write_comparison", "write_report"]
