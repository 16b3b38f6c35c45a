"""Compares runs from their directories alone: results, differences, and how strong the evidence is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kha_train.analysis.certify.certified import Certified
from kha_train.analysis.cost import Cost, cost_of
from kha_train.analysis.domains import DomainDifference, domain_differences
from kha_train.analysis.rates import VariantEvents, variant_events
from kha_train.analysis.runs import UNTOLD, RunData, load_run, load_runs
from kha_train.analysis.sameness import (
    common_steps,
    confounders,
    data_difference,
    data_proof,
    notes,
    unknown_settings,
)
from kha_train.analysis.scored import Evaluated, evaluated
from kha_train.analysis.statistics import (
    Interval,
    SeedInterval,
    SignTest,
    StepMean,
    mean_of_steps,
    over_seeds,
    sign_test,
)
from kha_train.analysis.summary import Summary, summarise
from kha_train.analysis.validation_sets import marks, named_entries, set_difference, sets_sentence
from kha_train.config.constants import may_differ
from kha_train.foreign.documents import Json
from kha_train.record.jsonl import words

OF_A_VALIDATION_SET = ("validation_loss", "bits_per_byte")
"""Results that cannot be compared across different validation sets."""


@dataclass(frozen=True)
class Pair:
    """Train loss of `other` - `reference` at equal steps over the last half of the common steps (nats per token).

    `difference` is None when no step is finite in both, or when the two are known to have read different data: losses
    on different tokens are not paired. `same_data` says whether both read the same tokens at every common step,
    `data_words` gives the reason, and `different_from` is the first step at which they are known to differ.
    `confounders` are settings, other than the variant, that differ at the same step: budget, schedule, initialisation,
    policy. Any of them may cause the difference. `unknown` names steps whose settings were not recorded. `validation`
    says how the validation sets differ ("": not known to differ). `notes` are differences that are not caveats: ranks,
    ZeRO stage and other free settings, and what both changed at the same step. `first_gap` is the difference of the
    losses of step 1 (None where one is unknown). It is taken before any update, so it is about 0 where both start as
    the same function.
    """

    reference: int
    other: int
    first_step: int
    last_step: int
    difference: StepMean | None
    same_seed: bool
    same_data: bool
    data_words: str
    confounders: tuple[str, ...]
    first_gap: float | None
    different_from: int | None
    unknown: tuple[str, ...]
    validation: str
    notes: tuple[str, ...]

    @property
    def interval(self) -> Interval | None:
        """The interval of the difference, if there are enough blocks of steps."""
        return self.difference.interval if self.difference else None

    @property
    def caveats(self) -> tuple[str, ...]:
        """The reasons, in words, why the difference may not be due to the variant."""
        since = "" if self.different_from is None else f" from step {self.different_from} on"
        order = "" if self.same_data else f" and data order{since}"
        found = [] if self.same_seed else [f"different seeds, so different initial values{order}"]
        if self.same_seed and not self.same_data:
            found.append(f"they read different data{since}" if since else "not proven to have read the same data")
        found += self.unknown
        found += [f"they also differ in {', '.join(self.confounders)}"] if self.confounders else []
        return tuple([*found, self.validation] if self.validation else found)


@dataclass(frozen=True)
class AcrossSeeds:
    """The differences of all fair pairs (no caveat) of one variant and the reference, one per seed; `interval` (None
    for fewer than two) and `sign_test` are over the seeds.
    """

    variant: str
    reference: str
    differences: tuple[float, ...]
    interval: SeedInterval | None
    sign_test: SignTest


@dataclass(frozen=True)
class Comparison:
    """Everything that the table and the report print. Runs are numbered in the order they were named. `passed_over`
    lists what was named but left out, and why. `domains` has the differences of validation sets and tasks, `events` the
    loss events of each variant. Settings in `varied` differ by design. `certified` is None without a certificate.
    """

    runs: tuple[RunData, ...]
    summaries: tuple[Summary, ...]
    differences: dict[str, tuple[Json, ...]]
    pairs: tuple[Pair, ...]
    across_seeds: tuple[AcrossSeeds, ...]
    evidence: str
    validation_marks: tuple[str, ...]
    validation_words: str
    evaluations: tuple[Evaluated, ...]
    domains: tuple[DomainDifference, ...]
    events: tuple[VariantEvents, ...]
    costs: tuple[Cost, ...]
    passed_over: tuple[str, ...] = ()
    varied: tuple[str, ...] = ()
    certified: Certified | None = None

    def notes(self) -> list[str]:
        """What differs by design, the notes of each pair, one per line, and why MFU is not shown."""
        designed = [key for key in self.varied if key in self.differences]
        noted = [f"{', '.join(designed)}: differs by design, each variant has its own"] if designed else []
        noted += [
            f"{self.runs[pair.reference].label} and {self.runs[pair.other].label}: {note}"
            for pair in self.pairs
            for note in pair.notes
        ]
        differing = peaks(self.runs)
        if len(set(differing)) < 2:
            return noted
        told = "; ".join(f"{run.label}: {peak}" for run, peak in zip(self.runs, differing, strict=True))
        return [*noted, f"MFU is not shown, because the runs have different peaks ({told})"]

    def sentence(self, pair: Pair) -> str:
        """The result of a pair in one line, with the strength of the evidence."""
        names = f"{self.runs[pair.other].label} - {self.runs[pair.reference].label}"
        warned = "".join(f"; NOT A FAIR PAIR: {caveat}" for caveat in pair.caveats)
        difference, interval, steps = pair.difference, pair.interval, f"steps {pair.first_step}-{pair.last_step}"
        if difference is None:
            said = no_difference(pair)
        elif interval is None:
            said = f"no claim from {steps} (mean {difference.mean:+.4f} nats per token; {difference.no_interval})"
        else:
            said = f"{interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}] nats per token over {steps}"
        return f"{names}: {said}{warned}; {self.evidence}"

    @staticmethod
    def seeds_sentence(found: AcrossSeeds) -> str:
        """The result of a variant over all seeds, in one line."""
        count = len(found.differences)
        names = f"{found.variant} - {found.reference} over {count} seed{'s' * (count != 1)}"
        if found.interval is None:
            return f"{names}: no interval: {count} seed{'s' * (count != 1)}, 2 needed"
        interval, sign = found.interval, found.sign_test.words
        given = f"{interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}] nats per token (Student)"
        return f"{names}: {given}; {sign}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for strict JSON; unknown ones are None, an infinite setting is a word."""
        runs = [
            {"label": run.label, "path": str(run.path), "variant": run.variant, "seed": run.seed}
            | {**summary.results, **summary.honesty, **summary.told, "end_state": summary.end_state}
            | {"validation_mark": mark, "cost": dict(cost.figures)}
            for run, summary, mark, cost in zip(
                self.runs, self.summaries, self.validation_marks, self.costs, strict=True
            )
        ]
        differences = {key: list(values) for key, values in self.differences.items()}
        pairs = [self._pair_to_dict(pair) for pair in self.pairs]
        seeds = [asdict(found) | {"sentence": self.seeds_sentence(found)} for found in self.across_seeds]
        answer = {"runs": runs, "config_differences": differences, "pairs": pairs, "across_seeds": seeds}
        told = {"evidence": self.evidence, "validation_sets": self.validation_words}
        scored: dict[str, Any] = {"evaluations": {one.entries: asdict(one) for one in self.evaluations}}
        scored |= {"domains": [asdict(one) for one in self.domains], "events": [asdict(one) for one in self.events]}
        scored |= {"certificate": self.certified.to_dict()} if self.certified else {}
        plain: dict[str, Any] = words(answer | told | scored | {"passed_over": list(self.passed_over)})
        return plain

    def _pair_to_dict(self, pair: Pair) -> dict[str, Any]:
        """`interval` is null where there are too few blocks; `no_interval` gives the reason."""
        found = pair.difference
        return asdict(pair) | {
            "interval": asdict(pair.interval) if pair.interval else None,
            "no_interval": found.no_interval if found else no_difference(pair),
            "caveats": list(pair.caveats),
            "sentence": self.sentence(pair),
        }


def compare_runs(
    run_dirs: list[Path],
    read: Callable[[Path], RunData] = load_run,
    summarised: Callable[[RunData], Summary] = summarise,
    varied: tuple[str, ...] = (),
) -> Comparison:
    """Compares the runs in `run_dirs`. `read` loads each run and `summarised` gives its figures; the variant of the
    first run is the reference. Settings in `varied` differ by design, such as the rate that is best for each variant:
    they are noted, and no caveat.

    Raises ConfigError for a directory that is missing, empty, not a run, or named twice; DataError for a damaged one.
    """
    runs = load_runs(run_dirs, read)
    pairs = tuple(_pair(runs, reference, other, varied) for reference, other in partners(runs))
    seeds, summaries = across_seeds(runs, pairs), _summaries(runs, summarised)
    return Comparison(
        runs=runs,
        summaries=summaries,
        differences=config_differences(runs),
        pairs=pairs,
        across_seeds=seeds,
        evidence=evidence(runs, seeds),
        validation_marks=tuple(marks(runs)),
        validation_words=sets_sentence(runs),
        evaluations=tuple(evaluated(runs, entries) for entries in named_entries(runs)),
        domains=domain_differences(runs, [(pair.reference, pair.other) for pair in pairs if not pair.caveats]),
        events=variant_events(runs, summaries),
        costs=tuple(map(cost_of, runs, summaries)),
        varied=varied,
    )


def peaks(runs: tuple[RunData, ...]) -> list[str]:
    """For each run the peaks behind its MFU, in words. Attempts that measure the peak get different values."""
    found = [dict.fromkeys(str(stretch.facts.get("peak", "not recorded")) for stretch in run.stretches) for run in runs]
    return [", then ".join(each) for each in found]


def _summaries(runs: tuple[RunData, ...], summarised: Callable[[RunData], Summary]) -> tuple[Summary, ...]:
    """The figures of all runs. MFU values of different peaks are dropped: they cannot be compared and may rank the runs
    wrongly.
    """
    found = [summarised(run) for run in runs]
    if len(set(peaks(runs))) > 1:
        found = [replace(summary, results=summary.results | {"mfu": None}) for summary in found]
    return tuple(found)


def config_differences(runs: tuple[RunData, ...]) -> dict[str, tuple[Json, ...]]:
    """Flattened configuration keys that differ between runs -> the value in each (None where it is absent; in words
    where it changed during the run).
    """
    settings = [stretch.settings or run.config for run in runs for stretch in run.stretches]
    keys = sorted({key for one in settings for key in one if not may_differ(key, UNTOLD)})
    values = {key: tuple(run.shown(key) for run in runs) for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def partners(runs: tuple[RunData, ...]) -> list[tuple[int, int]]:
    """(reference, other) for every run of another variant than the first run's: the reference run with the same seed,
    else the first run. If all runs are of one variant, each is paired with the first.
    """
    reference = [index for index, run in enumerate(runs) if run.variant == runs[0].variant]
    others = [index for index in range(len(runs)) if index not in reference] or reference[1:]
    same_seed = {runs[index].seed: index for index in reversed(reference)} if len(reference) < len(runs) else {}
    return [(same_seed.get(runs[other].seed, 0), other) for other in others]


def across_seeds(runs: tuple[RunData, ...], pairs: tuple[Pair, ...]) -> tuple[AcrossSeeds, ...]:
    """For every variant except the reference's, the differences of its fair pairs, the first pair of each seed."""
    found: dict[str, dict[Any, float]] = {}
    for pair in pairs:
        if pair.difference is not None and not pair.caveats:
            other = runs[pair.other]
            found.setdefault(other.variant, {}).setdefault(other.seed, pair.difference.mean)
    by_variant = {variant: tuple(by_seed.values()) for variant, by_seed in found.items()}
    return tuple(
        AcrossSeeds(variant, runs[0].variant, values, over_seeds(values), sign_test(values))
        for variant, values in by_variant.items()
        if variant != runs[0].variant
    )


def evidence(runs: tuple[RunData, ...], seeds: tuple[AcrossSeeds, ...]) -> str:
    """The strength of the evidence, from the number of seeds with fair pairs in the variant that has the fewest."""
    if len(runs) == 1:
        return "one run: nothing to compare"
    counts = {run.variant: 0 for run in runs if run.variant != runs[0].variant}
    fewest = min((counts | {found.variant: len(found.differences) for found in seeds}).values(), default=0)
    if fewest < 2:
        return "1 seed: not evidence" if fewest else "a variant without a fair pair: not evidence"
    return "fewer than 3 seeds: weak evidence" if fewest < 3 else f"{fewest} seeds of every variant"


def loss_difference(reference: RunData, other: RunData) -> tuple[np.ndarray, np.ndarray]:
    """(steps [N], train loss of `other` - `reference` [N]) at the common steps; nan where either is not finite."""
    steps, left, right = common_steps(reference, other)
    reference_loss, other_loss = reference.column("train/loss")[left], other.column("train/loss")[right]
    finite = np.isfinite(reference_loss) & np.isfinite(other_loss)
    difference = np.full(len(steps), np.nan)
    difference[finite] = other_loss[finite] - reference_loss[finite]
    return steps, difference


def no_difference(pair: Pair) -> str:
    """The reason, in words, why a pair has no difference."""
    if pair.different_from is not None:
        return f"no paired difference, because they read different data from step {pair.different_from} on"
    return "no step in the last half of the common steps has a finite loss in both"


def _pair(runs: tuple[RunData, ...], reference: int, other: int, varied: tuple[str, ...]) -> Pair:
    one, two = runs[reference], runs[other]
    steps, difference = loss_difference(one, two)
    half = len(steps) // 2
    before, late = (part[np.isfinite(part)] for part in (difference[half // 2 : half], difference[half:]))
    same_data, words = data_proof(one, two)
    different = data_difference(one, two)
    begins_alike = len(steps) and steps[0] == 1 and np.isfinite(difference[0]) and (not different or different[0] > 1)
    return Pair(
        reference,
        other,
        first_step=int(steps[half]) if len(steps) else 0,
        last_step=int(steps[-1]) if len(steps) else 0,
        difference=None if different else mean_of_steps(late, before),
        same_seed=one.seed == two.seed,
        same_data=same_data,
        data_words=words,
        confounders=confounders(one, two, varied),
        first_gap=float(difference[0]) if begins_alike else None,
        different_from=different[0] if different else None,
        unknown=unknown_settings(one, two),
        validation=set_difference(one, two),
        notes=notes(one, two),
    )
