"""Section: whether the pairs are fair. Same data by step, same start, what differs, and every attempt."""

from __future__ import annotations

from kha_train.analysis.compare import Pair
from kha_train.analysis.report.content import Block, Row, Section, Subtitle, Table, Text
from kha_train.analysis.report.context import Context
from kha_train.analysis.runs import RunData

SAME_START = (
    "Initial values depend on seed, name and shape alone, so an equal seed gives shared parameters the same start. "
    "Before any update, in step 1, the losses of a pair differ by next to nothing where both start as one function, as "
    "an interaction that begins as the identity does."
)


def section(context: Context) -> Section:
    """Each pair with its proofs and caveats, the settings that differ, and the attempts of every run."""
    comparison = context.comparison
    blocks: list[Block] = []
    if comparison.pairs:
        blocks.append(_pairs(context))
        for pair in comparison.pairs:
            names = f"{context.labels[pair.other]} and {context.labels[pair.reference]}"
            blocks += [Text(f"{names}: not a fair pair: {words}", "warning") for words in pair.caveats]
        blocks.append(Text(SAME_START, "soft"))
        proofs = [f"{pair.data_words}. {_first_gap(pair)}" for pair in comparison.pairs]
        if context.grouped:
            rows = tuple(
                Row(context.labels[pair.other], (words,)) for pair, words in zip(comparison.pairs, proofs, strict=True)
            )
            blocks.append(Table(("run", "same data as its reference?"), rows, f"All {len(rows)} pairs"))
        else:
            blocks += [Text(words, "soft") for words in proofs]
    blocks.append(Subtitle("Different settings"))
    if comparison.differences:
        rows = tuple(
            Row(key, tuple("-" if value is None else str(value) for value in values), code=True)
            for key, values in comparison.differences.items()
        )
        blocks.append(context.run_table(rows))
    else:
        blocks.append(Text("Only the run's name and directory."))
    blocks += [Text(f"{words}.") for words in comparison.notes()]
    blocks += [Subtitle("Every attempt"), _attempts(context)]
    return Section("fairness", "Is it a fair comparison?", tuple(blocks))


def _pairs(context: Context) -> Table:
    rows = []
    for pair in context.comparison.pairs:
        gap = "-" if pair.first_gap is None else f"{pair.first_gap:+.2g}"
        data = "yes, at every common step" if pair.same_data else "not proven"
        if pair.different_from is not None:
            data = f"no, from step {pair.different_from} on"
        differs = ", ".join(pair.confounders) or "the variant alone"
        fair = "no" if pair.caveats else "yes"
        values = (fair, "yes" if pair.same_seed else "no", gap, data, differs)
        rows.append(Row(f"{context.labels[pair.other]} against {context.labels[pair.reference]}", values))
    head = ("pair", "fair", "same seed", "loss difference in step 1", "same data", "settings that differ")
    return Table(head, tuple(rows))


def _first_gap(pair: Pair) -> str:
    return (
        "" if pair.first_gap is None else f"Before any update, in step 1, their losses differ by {pair.first_gap:+.2g}."
    )


def _attempts(context: Context) -> Table:
    rows = [row for run in context.runs for row in _of_run(run)]
    head = ("run", "attempt", "from step", "to step", "end", "ranks", "surviving steps", "changed")
    folded = f"{len(rows)} attempts" if len(rows) > 12 else ""
    return Table(head, tuple(rows), folded)


def _of_run(run: RunData) -> list[Row]:
    """A row for each start of a run. An attempt whose lines were all discarded has no surviving steps."""
    numbers = run.columns.whole("attempt", 1)
    found = []
    for attempt in run.run.get("attempts", []):
        number = attempt["attempt"]
        steps = run.steps[numbers == number]
        surviving = f"{steps[0]} to {steps[-1]}" if len(steps) else "none"
        changed = ", ".join(sorted(attempt.get("changed", {}))) or "-"
        values = (number, attempt["start_step"], attempt.get("end_step"), attempt["state"], attempt.get("world_size"))
        shown = ["-" if value is None else str(value) for value in values]
        found.append(Row(run.label, (*shown, surviving, changed)))
    return found or [Row(run.label, ("-",) * 7)]
