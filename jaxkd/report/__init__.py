"""Reports: the results table of a run and its page of pictures.

`write_report` makes one HTML file of one or more workdirs; the tables print
results as text and Markdown.
"""

from jaxkd.report.page import write_report
from jaxkd.report.run import ReportError
from jaxkd.report.tables import results_markdown, results_table, spread_markdown

__all__ = [
    "ReportError",
    "results_markdown",
    "results_table",
    "spread_markdown",
    "write_report",
]
