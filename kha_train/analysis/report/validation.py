"""Section: validation sets and tasks, by domain."""

# N steps at which a figure was measured

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kha_train.analysis.compare import OF_A_VALIDATION_SET
from kha_train.analysis.evaluations import VALIDATION
from kha_train.analysis.report.content import Block, Figure, Row, Section, Series, Subtitle, Table, Text
from kha_train.analysis.report.context import Context, bounds
from kha_train.analysis.report.curves import grouped_points
from kha_train.analysis.rows import result_rows
from kha_train.analysis.scored import scored_series
from kha_train.analysis.summary import RESULTS
from kha_train.analysis.validation_sets import ScoredSet, validations

NOT_KNOWN_TO_BE_EQUAL = (
    "The rows were not recorded: the runs are of an older release, and may have scored different rows."
)
BITS = (
    "Cross-entropy on held-out rows in bits, divided by the bytes of the text that was predicted. The y axis leaves "
    "out the first quarter of the points, so that it shows what differs."
)


def section(context: Context) -> Section | None:
    """The differences by domain, the last figures of every run, and the curves of bits per byte."""
    comparison = context.comparison
    blocks: list[Block] = [*_differences(context)]
    chosen = {id(RESULTS[name]) for name in OF_A_VALIDATION_SET}
    last = [(one, values) for one, values in result_rows(comparison) if id(one) in chosen]
    rows = [Row(one.name, tuple(values), one.definition) for one, values in last]
    if any(set(row.values) != {"-"} for row in rows):
        blocks += [Subtitle("Last figures of every run"), context.run_table(rows)]
    blocks += [Text(comparison.validation_words)] if comparison.validation_words else []
    for found in comparison.evaluations:
        table = [Row(one.name, tuple(values), one.definition) for one, values in found.rows()]
        blocks += [Subtitle(found.entries), context.run_table(table)]
        blocks += [Text(found.words)] if found.words else []
    blocks += _figures(context, VALIDATION, "Validation", VALIDATION)
    for number, found in enumerate(comparison.evaluations):
        name, title = f"{found.entries.partition('/')[0]}-{number}", found.entries.partition("/")[2]
        if found.entries.startswith(VALIDATION):
            blocks += _figures(context, found.entries, f"Validation: {title}", name)
        else:
            blocks += _task_figures(context, found.entries, f"Task: {title}", name)
    return Section("validation", "Validation and tasks by domain", tuple(blocks)) if blocks else None


def _differences(context: Context) -> Iterator[Block]:
    """The difference of every figure, one a seed, and its interval over seeds."""
    rows = []
    for found in context.comparison.domains:
        singles = ", ".join(f"{one:+.4f}" for one in found.differences)
        interval = found.interval
        over = f"{interval.low:+.4f} to {interval.high:+.4f}" if interval else "1 seed: not evidence"
        mean = f"{float(np.mean(found.differences)):+.4f}"
        steps = sorted(set(found.steps))
        at = str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
        names = f"{found.variant} \N{MINUS SIGN} {found.reference}"
        rows.append(Row(f"{found.entries}/{found.figure}", (names, mean, over, singles, at), code=True))
    if rows:
        head = ("domain", "variants", "mean difference", "95 % over seeds", "one a seed", "at step")
        yield Table(head, tuple(rows))
        words = (
            "Fair pairs, at the last step that both scored; those known to have scored different rows are left out. "
            "Student's t over seeds. Of many such intervals, one in twenty leaves out zero by chance."
        )
        yield Text(words, "soft")


def _figures(context: Context, entries: str, title: str, name: str) -> Iterator[Figure]:
    """One figure for each set of scored rows: curves of different sets are not drawn together."""
    by_set: dict[ScoredSet | None, list[Series]] = {}
    for number, run in enumerate(context.runs):
        scored = [one for one in validations(run, entries) if np.isfinite(one.bits_per_byte)]
        for scored_set in dict.fromkeys(one.scored_set for one in scored):
            points = [one for one in scored if one.scored_set == scored_set]
            steps = np.array([point.step for point in points])
            bits = np.array([point.bits_per_byte for point in points])
            style = context.style(number)
            curve = Series(run.label, style, "points", context.x(number, steps), bits)
            by_set.setdefault(scored_set, []).append(curve)
    for number, (scored_set, curves) in enumerate(by_set.items()):
        rows = NOT_KNOWN_TO_BE_EQUAL if scored_set is None else f"Scored here: {scored_set}."
        rows = f"The same rows at every point: {scored_set}." if scored_set and len(by_set) == 1 else rows
        heading = title if len(by_set) == 1 else f"{title}, set {number + 1}"
        yield _figure(context, f"{name}-{number}", heading, f"{BITS} {rows}", "bits per byte", curves)


def _task_figures(context: Context, entries: str, title: str, name: str) -> Iterator[Figure]:
    """One figure for each figure of a task, over the run."""
    of_runs = [scored_series(run, entries) for run in context.runs]
    for place, figure in enumerate(dict.fromkeys(figure for one in of_runs for figure in one)):
        curves = [
            Series(run.label, context.style(number), "points", context.x(number, found.steps_N), found.values_N)
            for number, (run, one) in enumerate(zip(context.runs, of_runs, strict=True))
            if (found := one.get(figure)) is not None
        ]
        if any(len(one.y_N) > 1 for one in curves):
            yield _figure(context, f"{name}-{place}", f"{title}, {figure}", "", figure, curves)


def _figure(context: Context, name: str, title: str, caption: str, label: str, curves: list[Series]) -> Figure:
    curves = grouped_points(context, curves)
    late = [one.y_N[len(one.y_N) // 4 :] for one in curves]
    return Figure(name, title, caption, label, context.axes, tuple(curves), bounds(late))
