"""The result of a study as Markdown: the sentence first, then arms, comparisons, rates and the published figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal

from kha_train.analysis.studies import Published
from kha_train.analysis.study_results import ArmResult, StudyResult
from kha_train.literal import visible
from kha_train.record.redact import Redactor


def study_page(result: StudyResult, reports: Mapping[str, str], given: Sequence[str] = ()) -> str:
    """The page; `reports` are the comparison reports by reference, as paths relative to it, and `given` the settings
    from the command line.
    """
    text = "\n".join(line for line in _lines(result, reports, given))
    return Redactor.from_environment().text(text + "\n")


def arm_rows(result: StudyResult) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the table of arms: rate, seeds, divergences, and every measure with its interval."""
    measures = [measure.name for measure in result.scaled.measures]
    head = ["arm", "against", "rate", "seeds", "diverged", *measures]
    rows = []
    for arm in result.arms.values():
        rate = f"{arm.chosen.rate:g}{' (edge)' if arm.chosen.at_edge else ''}" if arm.chosen else "not chosen yet"
        cells = [_figure(arm, name) for name in measures]
        rows.append([arm.name, arm.reference or "-", rate, str(len(arm.runs)), str(arm.diverged), *cells])
    return head, rows


def rate_rows(result: StudyResult) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the table of rates: the mean of the measure that chooses rates, and divergences."""
    rates = sorted({rate for arm in result.arms.values() for rate in arm.by_rate})
    rows = [[arm.name, *(_at_rate(arm, rate) for rate in rates)] for arm in result.arms.values()]
    return ["arm", *(f"{rate:g}" for rate in rates)], rows


def _lines(result: StudyResult, reports: Mapping[str, str], given: Sequence[str]) -> Iterator[str]:
    scaled, study = result.scaled, result.scaled.study
    yield f"# Study {scaled.name}, scale {scaled.scale_name}\n"
    yield f"**{study.question}** ({study.source})\n"
    yield f"**{result.sentence}**\n"
    yield f"Learning rates: {result.how_chosen}."
    yield from (f"- {caveat}" for caveat in result.caveats())
    yield "\n## Arms\n"
    yield from table_lines(*arm_rows(result))
    yield "\nMean over seeds with its 95 % Student interval (counts: none). `inf`: a run diverged or never got there."
    yield "\n## Against the reference, paired by seed\n"
    yield from (f"- {one.sentence()}" for one in (*result.compared, *result.gains))
    yield f"\n## {result.scaled.rate_measure.name} by learning rate\n"
    yield from table_lines(*rate_rows(result))
    if study.published:
        yield "\n## What the paper prints\n"
        rows = [[p.what, p.arm, printed(p, study.published), result.ours(p)] for p in study.published]
        yield from table_lines(["figure", "arm", "printed", "here"], rows)
    yield "\n## Overrides\n"
    if given:
        yield f"- every arm, from the command line: `{' '.join(given)}`"
    yield from (f"- {arm.name}: `{' '.join(arm.overrides)}`" for arm in result.arms.values())
    if reports:
        yield "\n## Reports\n"
        yield from (f"- [{reference} and the arms against it]({path})" for reference, path in reports.items())
    yield from (f"\n{note}" for note in study.notes)
    if study.not_shown:
        yield f"\n**What this does not show**: {study.not_shown}"


def printed(found: Published, published: Sequence[Published]) -> str:
    """A figure with as many decimals as the others of its kind: a paper prints 50.00 beside 48.38."""
    if found.value is None:
        return f"better than {found.better_than}"
    alike = [one.value for one in published if one.what == found.what and one.value is not None]
    return f"{found.value:.{max(map(_decimals, alike))}f}"


def _decimals(value: float) -> int:
    """The digits behind the point, as the value was typed."""
    exponent = Decimal(repr(value)).normalize().as_tuple().exponent
    assert isinstance(exponent, int), "published figures are finite"
    return max(0, -exponent)


def table_lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table in Markdown."""
    for cells in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(visible(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _figure(arm: ArmResult, measure: str) -> str:
    mean, interval = arm.mean(measure), arm.interval(measure)
    if interval is not None:
        return f"{interval.mean:.4g} [{interval.low:.4g}, {interval.high:.4g}]"
    if mean is None:
        return "-"
    reached = [value for value in arm.values[measure].values() if value is not None and math.isfinite(value)]
    return f"{mean:.4g}" if math.isfinite(mean) else f"inf ({len(reached)} of {len(arm.runs)} finite)"


def _at_rate(arm: ArmResult, rate: float) -> str:
    values = list(arm.by_rate.get(rate, {}).values())
    if not values:
        return "-"
    known = [value for value in values if value is not None]
    diverged = arm.diverged_by_rate.get(rate, 0)
    mean = f"{sum(known) / len(known):.4g}" if known else "-"
    return mean + (f" ({diverged} diverged)" if diverged else "")
