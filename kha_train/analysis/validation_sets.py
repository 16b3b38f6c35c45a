"""Identifies the rows that a validation scored. Bits per byte of different rows cannot be compared, so figures of
different sets are always marked.
"""

# N lines of a record

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase
from typing import NamedTuple

from kha_train.analysis.history import UNKNOWN, VALIDATION_ID, VALIDATION_ROWS, Stretch, brief
from kha_train.analysis.runs import RunData

LOSS, BITS = "validation/loss", "validation/bits_per_byte"
CUT_BY = ("model.seq_len", "data.packing", "data.isolate_documents")
"""Settings that determine, with the dataset, the rows of a validation."""
NOT_RECORDED = "?"


class ScoredSet(NamedTuple):
    """The set that a validation scored, in words: the first `rows` rows of the dataset `content_id`, cut according to
    `cut`.
    """

    content_id: str
    rows: str
    cut: tuple[str, ...]

    def __str__(self) -> str:
        length, packing, isolated = self.cut
        documents = "documents not isolated" if isolated == str(False) else "isolated documents"
        return (
            f"content id {brief(self.content_id)}, {self.rows} rows of {length} tokens, packing {packing}, {documents}"
        )


class Scored(NamedTuple):
    """A validation of a run: its step, its bits per byte (nan without any), and its set (None where it was not
    recorded).
    """

    step: int
    bits_per_byte: float
    scored_set: ScoredSet | None


def validations(run: RunData) -> list[Scored]:
    """The validations of the surviving curve, in order."""
    scored_N = run.columns.has(LOSS) | run.columns.has(BITS)
    stretches = iter(run.stretches)
    stretch = next(stretches)
    found = []
    for step, bits in zip(run.steps[scored_N].tolist(), run.column(BITS)[scored_N].tolist(), strict=True):
        while step > stretch.last:
            stretch = next(stretches)
        found.append(Scored(step, bits, _set_of(stretch)))
    return found


def set_difference(reference: RunData, other: RunData) -> str:
    """How the sets that two runs scored are known to differ, and from which step on; "" if they are not known to
    differ.

    Judged at every common step where both validated, and at their last validations, which are shown side by side.
    """
    left, right = validations(reference), validations(other)
    if not (left and right):
        return ""
    by_step = {one.step: one for one in right}
    pairs = [(one, by_step[one.step]) for one in left if one.step in by_step] + [(left[-1], right[-1])]
    for one, two in pairs:
        if one.scored_set and two.scored_set and one.scored_set != two.scored_set:
            where = f"from step {one.step} on" if one.step == two.step else "at the end"
            return f"different validation sets {where} ({one.scored_set}; and {two.scored_set})"
    return ""


def marks(runs: Sequence[RunData]) -> list[str]:
    """A letter for the set of each run's last validation, `NOT_RECORDED` where it is unknown, "" where the run has
    none. All are "" if no confusion is possible: all sets are the same, or only one run has a validation.
    """
    last = [found[-1].scored_set if (found := validations(run)) else UNKNOWN for run in runs]
    shown = [one for one in last if one is not UNKNOWN]
    if len(shown) < 2 or (len(set(shown)) == 1 and shown[0] is not None):
        return [""] * len(runs)
    letters = dict(zip((one for one in dict.fromkeys(shown) if one), _letters(), strict=False))
    return ["" if one is UNKNOWN else letters.get(one, NOT_RECORDED) for one in last]


def sets_sentence(runs: Sequence[RunData]) -> str:
    """Whether the figures of the last validations can be compared; "" where fewer than two runs have one."""
    found = [
        (mark, scored[-1].scored_set)
        for mark, run in zip(marks(runs), runs, strict=True)
        if (scored := validations(run))
    ]
    if len(found) < 2:
        return ""
    named = {mark: one for mark, one in found if one}
    if list(named) == [""]:
        return f"Every validation at the end scored the same rows: {named['']}."
    parts = [f"{mark}: {one}" for mark, one in named.items()]
    if len(named) < len({mark for mark, _ in found}):
        parts.append(f"{NOT_RECORDED}: not recorded, by runs of an older release")
    warning = "differ, so their figures cannot be compared" if len(named) > 1 else "are not proven to be the same"
    return f"Validation sets {warning}. {'; '.join(parts)}."


def _letters() -> list[str]:
    return [*ascii_uppercase, *(f"{one}{two}" for one in ascii_uppercase for two in ascii_uppercase)]


def _set_of(stretch: Stretch) -> ScoredSet | None:
    content_id, rows = stretch.value(VALIDATION_ID), stretch.value(VALIDATION_ROWS)
    if UNKNOWN in (content_id, rows) or stretch.settings is None:
        return None
    return ScoredSet(str(content_id), str(rows), tuple(str(stretch.settings.get(key)) for key in CUT_BY))
