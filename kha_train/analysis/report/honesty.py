"""Section: what happened during the runs that a curve does not show."""

from __future__ import annotations

from kha_train.analysis.report.content import Row, Section
from kha_train.analysis.report.context import Context
from kha_train.analysis.rows import honesty_rows

END = "running: still training, or killed without a word"


def section(context: Context) -> Section:
    """The honesty table of every run."""
    rows = [Row(one.name, tuple(values), one.definition) for one, values in honesty_rows(context.comparison)]
    ends = tuple(summary.end_state for summary in context.comparison.summaries)
    rows.append(Row("end of the last attempt", ends, END))
    return Section("honesty", "During the runs", (context.run_table(rows),))
