"""Identifies the rows that a validation or a task scored. Figures of different rows cannot be compared, so they are
always marked.

`entries` is the prefix of the entries in the record: `validation` for `data.validation`, `validation/NAME` for a named
set, `evaluation/LABEL` for a task.
"""

# N lines of a record

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase
from typing import NamedTuple

import numpy as np

from kha_train.analysis.evaluations import SCORED, VALIDATION
from kha_train.analysis.history import EVALUATIONS, UNKNOWN, VALIDATION_ID, VALIDATION_ROWS, Stretch, brief
from kha_train.analysis.runs import RunData

LOSS, BITS = SCORED
CUT_BY = ("model.seq_len", "data.packing", "data.isolate_documents")
"""Settings that determine, with the dataset, the rows of a validation."""
NOT_RECORDED = "?"


class ScoredSet(NamedTuple):
    """What was scored, in words: the first `rows` rows of the dataset `content_id`, cut according to `cut`. `settings`
    are the settings of a task that decide what its figures mean.
    """

    content_id: str
    rows: str
    cut: tuple[str, ...]
    settings: tuple[str, ...] = ()

    def __str__(self) -> str:
        length, packing, isolated = self.cut
        documents = "documents not isolated" if isolated == str(False) else "isolated documents"
        rows = f"{self.rows} rows" if self.rows else "rows"
        cut = f"content id {brief(self.content_id)}, {rows} of {length} tokens, packing {packing}, {documents}"
        return ", ".join([cut, *self.settings])


class Scored(NamedTuple):
    """A validation of a run, or the scores of a task: its step, its bits per byte (nan without any), and its set (None
    where it was not recorded).
    """

    step: int
    bits_per_byte: float
    scored_set: ScoredSet | None


def validations(run: RunData, entries: str = VALIDATION) -> list[Scored]:
    """The validations of the surviving curve, in order; or what else its `entries` are of."""
    stretches = iter(run.stretches)
    stretch = next(stretches)
    found = []
    for step, bits in sorted(_bits_by_step(run, entries).items()):
        while step > stretch.last:
            stretch = next(stretches)
        found.append(Scored(step, bits, _set_of(stretch, entries)))
    return found


def named_entries(runs: Sequence[RunData]) -> list[str]:
    """The prefixes of the entries of named sets and tasks in any of `runs`, validations first."""
    found = dict.fromkeys(entries for run in runs for entries in run.evaluations)
    return sorted(found, key=lambda entries: not entries.startswith(VALIDATION))


def set_difference(reference: RunData, other: RunData) -> str:
    """How the sets that two runs scored are known to differ, `data.validation` and named ones, and from which step on;
    "" if they are not known to differ.
    """
    both = [VALIDATION, *(name for name in named_entries([reference]) if name.startswith(VALIDATION))]
    found = [_difference(reference, other, entries) for entries in both]
    return "; ".join(filter(None, found))


def _difference(reference: RunData, other: RunData, entries: str) -> str:
    """Judged at every common step where both validated, and at their last validations, which are shown side by
    side.
    """
    left, right = validations(reference, entries), validations(other, entries)
    if not (left and right):
        return ""
    by_step = {one.step: one for one in right}
    pairs = [(one, by_step[one.step]) for one in left if one.step in by_step] + [(left[-1], right[-1])]
    for one, two in pairs:
        if one.scored_set and two.scored_set and one.scored_set != two.scored_set:
            where = f"from step {one.step} on" if one.step == two.step else "at the end"
            named = "" if entries == VALIDATION else f" named {entries.partition('/')[2]}"
            return f"different validation sets{named} {where} ({one.scored_set}; and {two.scored_set})"
    return ""


def marks(runs: Sequence[RunData], entries: str = VALIDATION) -> list[str]:
    """A letter for the set of each run's last validation, `NOT_RECORDED` where it is unknown, "" where the run has
    none. All are "" if no confusion is possible: all sets are the same, or only one run has a validation.
    """
    last = [found[-1].scored_set if (found := validations(run, entries)) else UNKNOWN for run in runs]
    shown = [one for one in last if one is not UNKNOWN]
    if len(shown) < 2 or (len(set(shown)) == 1 and shown[0] is not None):
        return [""] * len(runs)
    letters = dict(zip((one for one in dict.fromkeys(shown) if one), _letters(), strict=False))
    return ["" if one is UNKNOWN else letters.get(one, NOT_RECORDED) for one in last]


def sets_sentence(runs: Sequence[RunData], entries: str = VALIDATION) -> str:
    """Whether the figures of the last validations can be compared; "" where fewer than two runs have one."""
    found = [
        (mark, scored[-1].scored_set)
        for mark, run in zip(marks(runs, entries), runs, strict=True)
        if (scored := validations(run, entries))
    ]
    if len(found) < 2:
        return ""
    what, sets = ("validation", "Validation sets") if entries == VALIDATION else (entries, f"What {entries} scored")
    named = {mark: one for mark, one in found if one}
    if list(named) == [""]:
        return f"Every {what} at the end scored the same rows: {named['']}."
    parts = [f"{mark}: {one}" for mark, one in named.items()]
    if len(named) < len({mark for mark, _ in found}):
        parts.append(f"{NOT_RECORDED}: not recorded, by runs of an older release")
    if entries == VALIDATION:
        warning = "differ, so their figures cannot be compared" if len(named) > 1 else "are not proven to be the same"
    else:
        warning = "differs, so its figures cannot be compared" if len(named) > 1 else "is not proven to be the same"
    return f"{sets} {warning}. {'; '.join(parts)}."


def _letters() -> list[str]:
    return [*ascii_uppercase, *(f"{one}{two}" for one in ascii_uppercase for two in ascii_uppercase)]


def _bits_by_step(run: RunData, entries: str) -> dict[int, float]:
    """The steps at which a run has any of the `entries`, with the bits per byte there, nan where it has none."""
    if entries == VALIDATION:
        scored_N = run.columns.has(LOSS) | run.columns.has(BITS)
        return dict(zip(run.steps[scored_N].tolist(), run.column(BITS)[scored_N].tolist(), strict=True))
    figures = run.evaluations.get(entries, {})
    steps = {step: np.nan for series in figures.values() for step in series.steps_N.tolist()}
    bits = figures.get("bits_per_byte")
    return steps | (dict(zip(bits.steps_N.tolist(), bits.values_N.tolist(), strict=True)) if bits else {})


def _set_of(stretch: Stretch, entries: str) -> ScoredSet | None:
    if stretch.settings is None:
        return None
    cut = tuple(str(stretch.settings.get(key)) for key in CUT_BY)
    if entries == VALIDATION:
        content_id, rows = stretch.value(VALIDATION_ID), stretch.value(VALIDATION_ROWS)
        return None if UNKNOWN in (content_id, rows) else ScoredSet(str(content_id), str(rows), cut)
    begin = f"{EVALUATIONS}{entries}."
    facts = {key.removeprefix(begin): value for key, value in stretch.facts.items() if key.startswith(begin)}
    if "content_id" not in facts:
        return None
    of_a_task = {} if entries.startswith(VALIDATION) else facts
    settings = tuple(f"{key} {value}" for key, value in sorted(of_a_task.items()) if key not in ("content_id", "rows"))
    return ScoredSet(str(facts["content_id"]), str(facts.get("rows", "")), cut, settings)
