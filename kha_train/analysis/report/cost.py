"""Section: what the runs cost."""

from __future__ import annotations

import numpy as np

from kha_train.analysis.compare import OF_A_VALIDATION_SET
from kha_train.analysis.cost import COSTS
from kha_train.analysis.report.content import Block, Row, Section, Table, Text
from kha_train.analysis.report.context import Context
from kha_train.analysis.rows import result_rows
from kha_train.analysis.summary import RESULTS, UNKNOWN_FIGURE, Quantity, printed


def section(context: Context) -> Section:
    """The costs by variant against the reference, and all figures of every run."""
    blocks: list[Block] = []
    if len(context.variants) > 1:
        blocks.append(_variants(context))
        words = "Means over the runs of a variant; in brackets, the change against the first variant."
        blocks.append(Text(words, "soft"))
    hidden = {id(RESULTS[name]) for name in OF_A_VALIDATION_SET}
    rows = [
        Row(one.name, tuple(values), one.definition)
        for one, values in result_rows(context.comparison)
        if id(one) not in hidden
    ]
    rows += [
        Row(one.name, _values(context, key, one), one.definition) for key, one in COSTS.items() if key not in RESULTS
    ]
    blocks.append(context.run_table(rows))
    return Section("cost", "Results and cost", tuple(blocks))


def _values(context: Context, key: str, quantity: Quantity) -> tuple[str, ...]:
    return tuple(printed(quantity, cost.figures[key]) for cost in context.comparison.costs)


def _variants(context: Context) -> Table:
    rows = []
    for key, quantity in COSTS.items():
        means = [_mean(context, key, runs) for runs in context.variants.values()]
        values = [printed(quantity, mean) for mean in means]
        first = means[0]
        if first:
            values[1:] = [
                shown if mean is None else f"{shown} ({mean / first - 1:+.2%})"
                for shown, mean in zip(values[1:], means[1:], strict=True)
            ]
        if set(values) != {UNKNOWN_FIGURE}:
            rows.append(Row(quantity.name, tuple(values), quantity.definition))
    return Table(("", *context.variants), tuple(rows))


def _mean(context: Context, key: str, runs: list[int]) -> float | None:
    known = [value for run in runs if (value := context.comparison.costs[run].figures[key]) is not None]
    return float(np.mean(known)) if known else None
