"""Checks step by step whether two runs differ only in the variant: compares their data and their settings.

Each common step is judged by the attempts that made it. What an attempt of an older release did not record is unknown,
never equal.
"""

# N common steps

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import numpy as np

from kha_train.analysis.history import (
    DATA_ID,
    FACTS,
    NOTED_FACTS,
    ORIGINS,
    UNKNOWN,
    Difference,
    Meeting,
    Stretch,
    brief,
    changes,
    differences,
    meetings_of,
    shown,
    unrecorded,
)
from kha_train.analysis.runs import UNTOLD, Forebear, RunData
from kha_train.analysis.variant import is_variant
from kha_train.config.constants import FREE_TO_CHANGE, may_differ
from kha_train.foreign.documents import Json

NEUTRAL_KEYS = (*(key for key in FREE_TO_CHANGE if key not in ORIGINS), "run.seed", "data.seed")
"""Settings, or prefixes of settings, in which a fair pair may differ besides the variant: they change a loss only by
rounding. The content of the data is compared by its id, its order and the seed separately.
"""
ORDER_KEYS = (
    "data.seed", "model.seq_len",
    "data.isolate_documents", "data.packing", "data.shuffle", "data.sources", "data.phases",
)  # fmt: skip
"""Settings that determine, with the content of the shards and the sample numbers, which tokens a step reads."""
RATE = "train/lr"


def common_steps(reference: RunData, other: RunData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(common steps, indices of their lines in `reference`, in `other`), int64 [N] each."""
    return np.intersect1d(reference.steps, other.steps, return_indices=True)


def meetings(reference: RunData, other: RunData) -> list[Meeting]:
    """The common steps of two runs, cut wherever either run starts another attempt."""
    return meetings_of(common_steps(reference, other)[0], reference.stretches, other.stretches)


def confounders(reference: RunData, other: RunData, varied: Sequence[str] = ()) -> tuple[str, ...]:
    """The differing settings other than the variant, with both values, in order, and the steps if not all. Settings in
    `varied` differ by design.

    Where the settings of a step were not recorded, its recorded learning rate is compared.
    """
    met = meetings(reference, other)
    changed = {change.key for run in (reference, other) for change in changes(run.stretches)}
    shared = shared_until(reference, other)
    neutral = (*NEUTRAL_KEYS, *varied, *(("run.branch_from",) if shared else ()))
    found = differences(
        met,
        lambda key, one: not (key.startswith(FACTS) or _is_free(key, neutral, one) or is_variant(key, one, changed)),
    )
    apart = (reference.begun_after or other.begun_after) and met and met[0].first > shared + 1
    until = f"one run until step {shared:.0f} alone" if shared else "not known to come from one checkpoint"
    states = [f"their states before step {met[0].first}: {until}"] if apart else []
    return tuple(map(str, [*states, *found, *_other_rates(reference, other, met)]))


def shared_until(reference: RunData, other: RunData) -> float:
    """The step until which both are one run, of which one of them or both are branches; 0 where there is none.

    A run may go back before a checkpoint that was branched off, and save another one of that step, so the manifests
    decide where both left at one step.
    """
    until = 0.0
    if reference.begun_after or other.begun_after:
        for one, two in zip(reference.lineage, other.lineage, strict=False):
            first, last = sorted((one, two), key=lambda forebear: forebear.left)
            if one.run_id != two.run_id or not one.run_id or math.isinf(first.left):
                break
            if not _is_one(first, last, reference, other):
                break
            until = first.left
            if first.left != last.left:
                break
    return until


def _is_one(first: Forebear, last: Forebear, *runs: RunData) -> bool:
    """Whether the curve that `last` went on with passes the checkpoint that was left at `first`, both of one run."""
    if math.isinf(last.left):
        itself = next(run for run in runs if run.lineage[-1] == last)
        return itself.passes(int(first.left), first.manifest)
    return first.left != last.left or "" in (first.manifest, last.manifest) or first.manifest == last.manifest


def unknown_settings(reference: RunData, other: RunData) -> tuple[str, ...]:
    """For which common steps the settings were not recorded, in words, for each of the two runs."""
    met = meetings(reference, other)
    found = []
    for run, of_run in ((reference, [one.reference for one in met]), (other, [one.other for one in met])):
        parts = unrecorded(met, of_run)
        found += [f"the settings of {run.label} {', '.join(parts)} were not recorded"] if parts else []
    return tuple(found)


def notes(reference: RunData, other: RunData) -> tuple[str, ...]:
    """Sentences about differences that are no caveats (ranks, ZeRO stage, other free settings): until when both are one
    run, what both changed alike, what only one changed, and the rest.
    """
    free = differences(
        meetings(reference, other),
        lambda key, one: key.startswith(NOTED_FACTS) or (_is_free(key, FREE_TO_CHANGE, one) and not _is_named(key)),
    )
    mine, theirs = (changes(run.stretches) for run in (reference, other))
    alike = {(change.step, change.key, str(change.now)) for change in theirs}
    both: dict[int, list[str]] = {}
    for change in mine:
        if (change.step, change.key, str(change.now)) in alike and not may_differ(change.key, UNTOLD):
            both.setdefault(change.step, []).append(f"{change.key} to {brief(change.now)}")
    told = _branches(reference, other)
    told += [f"both changed {', '.join(keys)} from step {step} on" for step, keys in both.items()]
    for run, changed, unchanged in ((reference, mine, theirs), (other, theirs, mine)):
        keys = {change.key for change in changed} - {change.key for change in unchanged}
        alone = [one for one in free if one.key in keys and not one.everywhere]
        free = [one for one in free if one not in alone]
        told += [f"only {run.label} changed {', '.join(map(str, alone))}"] if alone else []
    return (*told, *([f"they differ in {', '.join(map(str, free))}"] if free else []))


def _branches(reference: RunData, other: RunData) -> list[str]:
    """Which of two runs are branches, and until which step both are one run."""
    branches = [run for run in (reference, other) if run.begun_after]
    told = [f"{run.label} is a branch: it goes on from step {run.begun_after} of another run" for run in branches]
    shared = shared_until(reference, other)
    return [*told, *([f"until step {shared:.0f} both are one run"] if shared else [])]


def data_difference(reference: RunData, other: RunData) -> tuple[int, str] | None:
    """The first common step at which two runs are known to have read different tokens, and how; None without any."""
    by_attempt = next((found for meeting in meetings(reference, other) if (found := _told_apart(meeting))), None)
    steps, left, right = common_steps(reference, other)
    ranges = [_sample_ranges(run)[places] for run, places in ((reference, left), (other, right))]
    known = ~np.isnan(np.concatenate(ranges, axis=1)).any(axis=1)
    unequal = steps[known & (ranges[0] != ranges[1]).any(axis=1)]
    if len(unequal) and (by_attempt is None or unequal[0] < by_attempt[0]):
        return int(unequal[0]), "read the same shards, but different samples"
    return by_attempt


def data_proof(reference: RunData, other: RunData) -> tuple[bool, str]:
    """Whether both runs read the same tokens at every common step, and the reason in words."""
    names = f"{reference.label} and {other.label}"
    different = data_difference(reference, other)
    if different is not None:
        step, how = different
        return False, f"{names} {how} from step {step} on"
    missing = _missing_proof(reference, other)
    if missing:
        return False, f"{names}: not proven to have read the same data ({'; '.join(missing)})"
    steps = common_steps(reference, other)[0]
    return True, (
        f"{names} read the same data: content id {shown(reference.history(DATA_ID))}, seed "
        f"{_data_seed(reference.stretches[-1])}, and equal sample numbers at each of the {len(steps)} common steps up "
        f"to step {steps[-1]}"
    )


def _is_free(key: str, allowed: Sequence[str], meeting: Meeting) -> bool:
    return may_differ(key, allowed, meeting.reference.settings or {}, meeting.other.settings or {})


def _is_named(key: str) -> bool:
    """Whether the comparison shows a free setting elsewhere (in the variant, or as its origin), or not at all."""
    return may_differ(key, UNTOLD) or key.startswith(("attention.", *ORIGINS))


def _other_rates(reference: RunData, other: RunData, met: Sequence[Meeting]) -> list[Difference]:
    """Where the recorded learning rates differ at steps whose settings are unknown."""
    steps, left, right = common_steps(reference, other)
    rates_N = [run.column(RATE)[places] for run, places in ((reference, left), (other, right))]
    found = []
    for unknown, group in groupby(met, lambda one: None in (one.reference.settings, one.other.settings)):
        if not unknown:
            continue
        blind = list(group)
        inside = (steps >= blind[0].first) & (steps <= blind[-1].last)
        unequal = np.flatnonzero(inside & np.isfinite(rates_N[0] + rates_N[1]) & (rates_N[0] != rates_N[1]))
        if len(unequal):
            before, after = (float(rates[unequal[0]]) for rates in rates_N)
            first, last = int(steps[unequal[0]]), int(steps[unequal[-1]])
            found.append(Difference(f"the recorded {RATE}", first, last, (before, after), False, last == steps[-1]))
    return found


def _told_apart(meeting: Meeting) -> tuple[int, str] | None:
    """The first step of `meeting`, and what shows that its attempts read different tokens; None if nothing does."""
    contents = meeting.values(DATA_ID)
    if UNKNOWN not in contents and contents[0] != contents[1]:
        return meeting.first, f"read different data: content ids {contents[0]} and {contents[1]}"
    for key in ORDER_KEYS:
        values = meeting.values(key)
        if key == "data.seed":
            key = "run.seed" if values == (None, None) else key
            values = _data_seed(meeting.reference), _data_seed(meeting.other)
        if UNKNOWN not in values and values[0] != values[1]:
            shards = "their shards" if UNKNOWN in contents else "the same shards"
            return meeting.first, f"read {shards} differently: {key} is {values[0]} and {values[1]}"
    return None


def _data_seed(stretch: Stretch) -> Json:
    own = stretch.value("data.seed")
    return stretch.value("run.seed") if own is None else own


def _missing_proof(reference: RunData, other: RunData) -> list[str]:
    """Records needed to prove that two runs read the same data but missing, in words."""
    steps, left, right = common_steps(reference, other)
    met = meetings(reference, other)
    found = [*unknown_settings(reference, other)]
    if any(UNKNOWN in meeting.values(DATA_ID) for meeting in met):
        found.append("a run recorded no data content id")
    ranges = [_sample_ranges(run)[places] for run, places in ((reference, left), (other, right))]
    if not len(steps) or np.isnan(ranges).any():
        found.append("sample numbers are missing")
    elif len(steps) < steps[-1] - (begun := max(reference.begun_after, other.begun_after)):
        absent = int(np.setdiff1d(np.arange(begun + 1, steps[-1]), steps)[0])
        found.append(f"a run has no line for step {absent}")
    return found


def _sample_ranges(run: RunData) -> np.ndarray:
    return np.stack([run.column("samples_first"), run.column("samples_last")], axis=1)
