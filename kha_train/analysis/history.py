"""The settings and facts in force at each step of a run, taken from the attempts that made the lines of its curve.

A run directory may be restarted with other settings or data, and only surviving lines are compared. So every line is
judged by its own attempt, and attempts whose lines were all discarded do not matter.
"""

# N common steps, or lines of a record

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from kha_train.config.build import flatten, without_places, without_seeds
from kha_train.config.compose import load_plain
from kha_train.config.constants import PRECISION_OF
from kha_train.foreign.documents import Json
from kha_train.record import Attempt, read_attempts
from kha_train.record.attempts import CONFIG_FILE
from kha_train.record.columns import Columns

UNKNOWN = object()
"""The value of a setting or a fact that was not recorded."""
DATA_ID, VALIDATION_ID, VALIDATION_ROWS = "data_content_id", "validation_content_id", "validation_rows"
EVALUATIONS = "evaluations."
"""What the facts begin with that tell what a named validation set or a task scored."""
NOTED_FACTS = ("world_size", "device", "attention_backend", "git.", "versions.")
"""Facts, or prefixes of facts, that change a loss only by rounding."""
FACTS = (DATA_ID, VALIDATION_ID, VALIDATION_ROWS, EVALUATIONS, *NOTED_FACTS)
"""The facts of an attempt that matter besides its settings."""
PRECISION = "engine.precision"
ORIGINS = ("run.init_from", "run.branch_from")
"""Settings that affect only the first start: a resumed attempt begins from the run's own checkpoint."""


@dataclass(frozen=True)
class Stretch:
    """Consecutive lines of a surviving curve, steps `first` to `last`, made by one attempt.

    `settings` is its configuration by dotted keys, None where it was not recorded. `facts` are its facts by dotted
    keys, including the number of ranks as `world_size`.
    """

    first: int
    last: int
    settings: Mapping[str, Any] | None
    facts: Mapping[str, Any]

    def value(self, key: str) -> Json:
        """A setting (None where the configuration has no such key) or a fact; `UNKNOWN` where it was not recorded."""
        if key.startswith(FACTS):
            found = self.facts.get(key)
            return UNKNOWN if found is None else found
        return UNKNOWN if self.settings is None else self.settings.get(key)

    def keys(self) -> set[str]:
        """Every setting and every fact that matters."""
        return {*(self.settings or {}), *(key for key in self.facts if key.startswith(FACTS))}


@dataclass(frozen=True)
class Meeting:
    """Consecutive common steps of two runs, `first` to `last`, made by one attempt of either run."""

    first: int
    last: int
    reference: Stretch
    other: Stretch

    def values(self, key: str) -> tuple[Json, Json]:
        """The value of `key` in the two runs."""
        return self.reference.value(key), self.other.value(key)


@dataclass(frozen=True)
class Difference:
    """A setting or fact that had different `values` at the common steps `first` to `last` (`to_the_end`: up to the last
    one).
    """

    key: str
    first: int
    last: int
    values: tuple[Json, Json]
    everywhere: bool
    to_the_end: bool

    def __str__(self) -> str:
        where = "" if self.everywhere else f" {steps_words(self.first, self.last, self.to_the_end)}"
        return f"{self.key} ({self.values[0]} and {self.values[1]}{where})"


@dataclass(frozen=True)
class Change:
    """A setting or fact that an attempt, whose first line is that of `step`, changed."""

    step: int
    key: str
    before: Json
    now: Json

    def __str__(self) -> str:
        return f"{self.key} {brief(self.before)} -> {brief(self.now)} from step {self.step} on"


def stretches_of(columns: Columns, attempts: Mapping[int, Attempt]) -> tuple[Stretch, ...]:
    """The stretches of a curve, which is not empty, in order."""
    only = next(iter(attempts)) if len(attempts) == 1 else None
    found: list[Stretch] = []
    for number, first, last in _by_attempt(columns, only):
        attempt = None if number is None else attempts.get(number)
        facts = {**flatten(attempt.facts), "world_size": attempt.world_size} if attempt else {}
        settings = _settings(attempt, found) if attempt and attempt.config is not None else None
        found.append(Stretch(first, last, settings, facts))
    return tuple(found)


def history(stretches: Sequence[Stretch], key: str) -> list[tuple[int, Json]]:
    """(first step, value) of a setting or fact, with equal neighbours merged; stretches where it is unknown are
    skipped.
    """
    known = [(stretch.first, value) for stretch in stretches if (value := stretch.value(key)) is not UNKNOWN]
    return [known[index] for index in range(len(known)) if index == 0 or known[index][1] != known[index - 1][1]]


def shown(values: Sequence[tuple[int, Json]]) -> Json:
    """A `history` for people: the value itself where it never changed, None where there is none."""
    if len(values) < 2:
        return values[0][1] if values else None
    return ", then ".join([str(values[0][1]), *(f"{value} from step {step} on" for step, value in values[1:])])


def changes(stretches: Sequence[Stretch]) -> list[Change]:
    """Everything that an attempt is known to have changed from the attempt before, in order."""
    return [
        Change(now.first, key, before.value(key), now.value(key))
        for before, now in pairwise(stretches)
        for key in sorted(before.keys() | now.keys())
        if UNKNOWN not in (before.value(key), now.value(key)) and before.value(key) != now.value(key)
    ]


def meetings_of(steps_N: np.ndarray, reference: Sequence[Stretch], other: Sequence[Stretch]) -> list[Meeting]:
    """The meetings of two runs over their common steps, int64 in order."""
    left_N, right_N = _places(steps_N, reference), _places(steps_N, other)
    cuts = np.flatnonzero((np.diff(left_N) != 0) | (np.diff(right_N) != 0)) + 1
    starts = [0, *cuts.tolist()] if len(steps_N) else []
    return [
        Meeting(int(steps_N[start]), int(steps_N[end - 1]), reference[left_N[start]], other[right_N[start]])
        for start, end in zip(starts, [*cuts.tolist(), len(steps_N)], strict=False)
    ]


def differences(meetings: Sequence[Meeting], wanted: Callable[[str, Meeting], bool]) -> list[Difference]:
    """Where the settings and facts selected by `wanted` are known to differ, sorted by key and then by step."""
    keys = {key for meeting in meetings for key in meeting.reference.keys() | meeting.other.keys()}
    found = []
    for key in sorted(keys):
        for values, group in groupby(meetings, partial(_values_if, wanted, key)):
            if values is not None and UNKNOWN not in values and values[0] != values[1]:
                inside = list(group)
                everywhere, to_the_end = len(inside) == len(meetings), inside[-1] is meetings[-1]
                found.append(Difference(key, inside[0].first, inside[-1].last, values, everywhere, to_the_end))
    return found


def _values_if(wanted: Callable[[str, Meeting], bool], key: str, meeting: Meeting) -> tuple[Any, Any] | None:
    return meeting.values(key) if wanted(key, meeting) else None


def phase_steps(run_dir: Path, columns: Columns) -> set[int]:
    """The steps of a curve that begin a phase of the data mixture. Each is judged by the settings of its own attempt
    or, where those were not recorded, by those of the last start. Steps without a loss are not part of the curve.
    """
    last = load_plain(run_dir / CONFIG_FILE)
    configs = {number: attempt.config or last for number, attempt in read_attempts(run_dir).items()}
    chosen_N = columns.has("train/loss")
    steps_N, samples_N = columns.steps[chosen_N], columns.whole("samples_first", -1)[chosen_N]
    attempts_N = columns.whole("attempt", -1)[chosen_N]
    before_N = np.concatenate([[-1], samples_N[:-1]])
    found: set[int] = set()
    for number in np.unique(attempts_N).tolist():
        for phase in configs.get(number, last).get("data", {}).get("phases", []):
            start = phase["start_sample"]
            begins_N = (attempts_N == number) & (before_N < start) & (start <= samples_N)
            found |= set(steps_N[begins_N].tolist())
    return found


def unrecorded(spans: Sequence[Stretch | Meeting], parts: Sequence[Stretch]) -> list[str]:
    """The steps whose settings were not recorded, in words, with neighbours merged; `parts` are the stretches of
    `spans`.
    """
    told = groupby(zip(spans, parts, strict=True), lambda one: one[1].settings is None)
    blind = [[span for span, _ in group] for unknown, group in told if unknown]
    return [steps_words(group[0].first, group[-1].last) for group in blind]


def steps_words(first: int, last: int, to_the_end: bool = False) -> str:
    """Steps `first` to `last` in words."""
    if to_the_end:
        return f"from step {first} on"
    return f"at step {first}" if first == last else f"at steps {first} to {last}"


def brief(value: object) -> str:
    """`value` in few characters: only the beginning of a content id."""
    text = str(value)
    return text[:12] if len(text) == 64 and all(digit in "0123456789abcdef" for digit in text) else text


def _settings(attempt: Attempt, earlier: Sequence[Stretch]) -> dict[str, Any]:
    """The settings of an attempt as they took effect: free settings such as the device resolve `auto`."""
    settings = without_seeds(without_places(attempt.config or {}))
    dtype = attempt.facts.get("dtype")
    if settings.get(PRECISION) == "auto" and dtype in PRECISION_OF:
        settings[PRECISION] = PRECISION_OF[dtype]
    return {**settings, **{key: earlier[0].value(key) for key in ORIGINS}} if earlier else settings


def _by_attempt(columns: Columns, absent: int | None) -> Iterator[tuple[int | None, int, int]]:
    """(attempt, first step, last step) of consecutive lines of one attempt; `absent` where the lines do not name it."""
    numbers_N, steps_N = columns.whole("attempt", 0 if absent is None else absent), columns.steps
    known_N = columns.has("attempt") | (absent is not None)
    cuts = (np.flatnonzero((np.diff(numbers_N) != 0) | (np.diff(known_N) != 0)) + 1).tolist()
    for start, end in zip([0, *cuts], [*cuts, len(columns)], strict=True):
        yield int(numbers_N[start]) if known_N[start] else None, int(steps_N[start]), int(steps_N[end - 1])


def _places(steps_N: np.ndarray, stretches: Sequence[Stretch]) -> np.ndarray:
    """The index of the stretch of every step."""
    return np.searchsorted([stretch.first for stretch in stretches], steps_N, side="right") - 1
