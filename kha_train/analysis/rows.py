"""The rows of the tables that the terminal and the report share."""

from __future__ import annotations

from kha_train.analysis.compare import OF_A_VALIDATION_SET, Comparison
from kha_train.analysis.scored import marked
from kha_train.analysis.summary import HONESTY, RESULTS, TOLD, Quantity, Summary, printed


def result_rows(comparison: Comparison) -> list[tuple[Quantity, list[str]]]:
    """Each quantity of `RESULTS` with its printed value in every run. If validations scored different sets, each
    validation figure is followed by the mark of its set. The figures of tasks: `Evaluated.rows`.
    """
    rows = []
    for name, quantity in RESULTS.items():
        found = [summary.results[name] for summary in comparison.summaries]
        told = comparison.validation_marks if name in OF_A_VALIDATION_SET else ("",) * len(found)
        rows.append((quantity, marked(quantity, found, told)))
    return rows


def honesty_rows(comparison: Comparison) -> list[tuple[Quantity, list[str]]]:
    """Each quantity of `HONESTY` and `TOLD` with its printed value in every run."""
    counted = [(one, [_counted(name, summary) for summary in comparison.summaries]) for name, one in HONESTY.items()]
    told = [(one, [printed(one, summary.told[name]) for summary in comparison.summaries]) for name, one in TOLD.items()]
    return [*counted, *told]


def spikes_words(summary: Summary) -> str:
    """The number of spikes of a run. That of a run which diverged, or whose loss rose and stayed up, is no merit, so it
    never stands alone.
    """
    count = printed(HONESTY["spikes"], summary.honesty["spikes"])
    if summary.honesty["diverged"]:
        return f"diverged (spikes before: {count})"
    if summary.honesty["unrecovered"]:
        return f"not recovered (spikes: {count})"
    return count


def _counted(name: str, summary: Summary) -> str:
    return spikes_words(summary) if name == "spikes" else printed(HONESTY[name], summary.honesty[name])
