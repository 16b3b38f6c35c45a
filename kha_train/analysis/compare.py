"""Comparing runs from their directories alone: what they reached, how they differ, and what that is worth."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kha_train.analysis.runs import RunData, load_runs
from kha_train.analysis.statistics import Interval, SeedInterval, block_bootstrap, over_seeds
from kha_train.analysis.summary import Summary, summarise
from kha_train.config.constants import FREE_TO_CHANGE, may_differ

IDENTITY_KEYS = ("run.dir", "run.name")
"""Configuration keys that always differ and say nothing."""
NEUTRAL_KEYS = (*(key for key in FREE_TO_CHANGE if key != "run.init_from"), "run.seed", "attention.")
"""Settings, or beginnings of settings, in which a fair pair may differ: the variant itself, and what changes a loss by
rounding at most. The content of the data is compared by its id, the seed by itself."""
ORDER_KEYS = (
    "run.seed", "model.seq_len",
    "data.isolate_documents", "data.packing", "data.shuffle", "data.sources", "data.phases",
)  # fmt: skip
"""Settings that, with the content of the shards and the sample numbers, fix which tokens a step reads."""


@dataclass(frozen=True)
class Pair:
    """Train loss of `other` - `reference` at equal steps over the last half of the steps both have (nats per token).

    `interval` is None when fewer than 10 steps are finite in both. `same_data` says whether the two read the same
    tokens at every common step, and `data_words` why that is known or not. `confounders` are settings beside the
    variant in which the two differ: budget, schedule, initialisation, policy; any of them may be what is seen.
    `first_gap` is the difference of the losses of step 1 (None where one is not known): before any update, so about 0
    where both start as one function.
    """

    reference: int
    other: int
    first_step: int
    last_step: int
    interval: Interval | None
    same_seed: bool
    same_data: bool
    data_words: str
    confounders: tuple[str, ...]
    first_gap: float | None

    @property
    def caveats(self) -> tuple[str, ...]:
        """Why the difference may not be the variant's doing, in words."""
        found = [] if self.same_seed else ["other seeds, so other initial values and another order of the data"]
        found += [] if self.same_data or not self.same_seed else ["not proven to have read the same data"]
        found += [f"they also differ in {', '.join(self.confounders)}"] if self.confounders else []
        return tuple(found)


@dataclass(frozen=True)
class AcrossSeeds:
    """The differences of all fair pairs (no caveat) of one variant and the reference, one a seed: `interval` over the
    seeds, None for fewer than two."""

    variant: str
    reference: str
    differences: tuple[float, ...]
    interval: SeedInterval | None


@dataclass(frozen=True)
class Comparison:
    """Everything the table and the report print. Runs are numbered as they were named."""

    runs: tuple[RunData, ...]
    summaries: tuple[Summary, ...]
    differences: dict[str, tuple[Any, ...]]
    pairs: tuple[Pair, ...]
    across_seeds: tuple[AcrossSeeds, ...]
    evidence: str

    def sentence(self, pair: Pair) -> str:
        """The result of a pair in one line, with what it is worth."""
        names = f"{self.runs[pair.other].label} - {self.runs[pair.reference].label}"
        if pair.interval is None:
            return f"{names}: too few common steps for a difference; {self.evidence}"
        found = f"{pair.interval.mean:+.4f} [{pair.interval.low:+.4f}, {pair.interval.high:+.4f}] nats per token"
        warned = "".join(f"; NOT A FAIR PAIR: {caveat}" for caveat in pair.caveats)
        return f"{names}: {found} over steps {pair.first_step}-{pair.last_step}{warned}; {self.evidence}"

    @staticmethod
    def seeds_sentence(found: AcrossSeeds) -> str:
        """What all seeds together say of a variant, in one line."""
        names = f"{found.variant} - {found.reference} over {len(found.differences)} seeds"
        if found.interval is None:
            return f"{names}: no interval"
        interval = found.interval
        return f"{names}: {interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}] nats per token (Student)"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; non-finite numbers do not occur, unknown ones are None."""
        runs = [
            {"label": run.label, "path": str(run.path), "variant": run.variant, "seed": run.seed}
            | {**summary.results, **summary.honesty, "end_state": summary.end_state}
            for run, summary in zip(self.runs, self.summaries, strict=True)
        ]
        differences = {key: list(values) for key, values in self.differences.items()}
        pairs = [asdict(pair) | {"caveats": list(pair.caveats), "sentence": self.sentence(pair)} for pair in self.pairs]
        seeds = [asdict(found) | {"sentence": self.seeds_sentence(found)} for found in self.across_seeds]
        answer = {"runs": runs, "config_differences": differences, "pairs": pairs, "across_seeds": seeds}
        return answer | {"evidence": self.evidence}


def compare_runs(run_dirs: list[Path]) -> Comparison:
    """Compares the runs in `run_dirs`; the variant of the first is the reference.

    Raises ConfigError for a directory that is missing, empty, not a run, or named twice; DataError for a damaged one.
    """
    runs = load_runs(run_dirs)
    pairs = tuple(_pair(runs, reference, other) for reference, other in partners(runs))
    seeds = across_seeds(runs, pairs)
    return Comparison(
        runs=runs,
        summaries=tuple(summarise(run) for run in runs),
        differences=config_differences(runs),
        pairs=pairs,
        across_seeds=seeds,
        evidence=evidence(runs, seeds),
    )


def config_differences(runs: tuple[RunData, ...]) -> dict[str, tuple[Any, ...]]:
    """Flattened configuration keys that are not equal in all runs -> the value in each (None where it is absent)."""
    keys = sorted({key for run in runs for key in run.config} - set(IDENTITY_KEYS))
    values = {key: tuple(run.config.get(key) for run in runs) for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def partners(runs: tuple[RunData, ...]) -> list[tuple[int, int]]:
    """(reference, other) for every run of another variant than the first run's: the reference run of the same seed,
    else the first run. When all runs are of one variant, each is paired with the first.
    """
    reference = [index for index, run in enumerate(runs) if run.variant == runs[0].variant]
    others = [index for index in range(len(runs)) if index not in reference] or reference[1:]
    same_seed = {runs[index].seed: index for index in reversed(reference)} if len(reference) < len(runs) else {}
    return [(same_seed.get(runs[other].seed, 0), other) for other in others]


def confounders(reference: RunData, other: RunData) -> tuple[str, ...]:
    """The settings that differ beside the variant, with both values, in order."""
    both = reference.config, other.config
    keys = sorted(key for key in both[0].keys() | both[1].keys() if not may_differ(key, NEUTRAL_KEYS, *both))
    values = {key: (both[0].get(key), both[1].get(key)) for key in keys}
    return tuple(f"{key} ({one} and {two})" for key, (one, two) in values.items() if one != two)


def across_seeds(runs: tuple[RunData, ...], pairs: tuple[Pair, ...]) -> tuple[AcrossSeeds, ...]:
    """For every variant but the reference's, the differences of its fair pairs, the first of each seed."""
    found: dict[str, dict[Any, float]] = {}
    for pair in pairs:
        if pair.interval is not None and not pair.caveats:
            other = runs[pair.other]
            found.setdefault(other.variant, {}).setdefault(other.seed, pair.interval.mean)
    return tuple(
        AcrossSeeds(variant, runs[0].variant, tuple(by_seed.values()), over_seeds(list(by_seed.values())))
        for variant, by_seed in found.items()
        if variant != runs[0].variant
    )


def evidence(runs: tuple[RunData, ...], seeds: tuple[AcrossSeeds, ...]) -> str:
    """What the number of seeds allows one to say: the seeds of fair pairs of the variant that has the fewest."""
    counts = {run.variant: 0 for run in runs if run.variant != runs[0].variant}
    fewest = min((counts | {found.variant: len(found.differences) for found in seeds}).values(), default=0)
    if fewest < 2:
        return "1 seed: not evidence" if fewest else "a variant without a fair pair: not evidence"
    return "fewer than 3 seeds: weak evidence" if fewest < 3 else f"{fewest} seeds of every variant"


def loss_difference(reference: RunData, other: RunData) -> tuple[np.ndarray, np.ndarray]:
    """(steps [N], train loss of `other` - `reference` [N]) at the steps both have; nan where either is not finite."""
    steps, left, right = np.intersect1d(reference.steps, other.steps, return_indices=True)
    reference_loss, other_loss = reference.column("train/loss")[left], other.column("train/loss")[right]
    finite = np.isfinite(reference_loss) & np.isfinite(other_loss)
    difference = np.full(len(steps), np.nan)
    difference[finite] = other_loss[finite] - reference_loss[finite]
    return steps, difference


def _pair(runs: tuple[RunData, ...], reference: int, other: int) -> Pair:
    steps, difference = loss_difference(runs[reference], runs[other])
    half = len(steps) // 2
    late = difference[half:]
    same_data, words = data_proof(runs[reference], runs[other])
    first, last = (int(steps[half]), int(steps[-1])) if len(steps) else (0, 0)
    same_seed = runs[reference].seed == runs[other].seed
    return Pair(
        reference,
        other,
        first,
        last,
        block_bootstrap(late[np.isfinite(late)]),
        same_seed,
        same_data,
        words,
        confounders(runs[reference], runs[other]),
        float(difference[0]) if len(steps) and steps[0] == 1 and np.isfinite(difference[0]) else None,
    )


def data_proof(reference: RunData, other: RunData) -> tuple[bool, str]:
    """Whether both runs read the same tokens at every common step, and the reason in words."""
    names = f"{reference.label} and {other.label}"
    contents = reference.provenance("data_content_id"), other.provenance("data_content_id")
    if None in contents:
        return False, f"{names}: not proven to have read the same data (a run recorded no data content id)"
    if contents[0] != contents[1]:
        return False, f"{names} read different data: content ids {contents[0]} and {contents[1]}"
    for key in ORDER_KEYS:
        if reference.config.get(key) != other.config.get(key):
            values = f"{reference.config.get(key)} and {other.config.get(key)}"
            return False, f"{names} read the same shards differently: {key} is {values}"
    steps, left, right = np.intersect1d(reference.steps, other.steps, return_indices=True)
    ranges = [_sample_ranges(run)[index] for run, index in ((reference, left), (other, right))]
    if not len(steps) or np.isnan(ranges).any():
        return False, f"{names}: not proven to have read the same data (sample numbers are missing)"
    unequal = np.flatnonzero((ranges[0] != ranges[1]).any(axis=1))
    if len(unequal):
        return False, f"{names} read the same shards, but other samples from step {steps[unequal[0]]} on"
    return True, (
        f"{names} read the same data: content id {contents[0]}, seed {reference.seed}, and equal sample numbers at "
        f"each of the {len(steps)} common steps up to step {steps[-1]}"
    )


def _sample_ranges(run: RunData) -> np.ndarray:
    return np.stack([run.column("samples_first"), run.column("samples_last")], axis=1)
