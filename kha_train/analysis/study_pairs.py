"""Differences of two arms of a study, paired by seed, and what may be said of one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from kha_train.analysis.statistics import SIGN_SEEDS, SeedInterval, over_seeds, sign_test
from kha_train.analysis.studies import Measure

NO_INTERVAL = {"spikes": "they are counts", "events": "they are counts", "area": "areas of events are skewed"}
"""The kinds of measures without an interval, because Student's does not cover what it says."""
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Compared:
    """An arm against its reference in one measure: the difference for every seed that both have, its mean with the
    95 % Student interval over seeds (None with fewer than two, and for the reason in `no_interval`), in how many seeds
    the arm was better and worse, and the two-sided sign test of these (None without a sign).
    """

    arm: str
    reference: str
    measure: str
    differences: Mapping[int, float]
    interval: SeedInterval | None
    better: int
    worse: int
    sign_test: float | None
    no_interval: str = ""

    @property
    def differs(self) -> bool:
        """Whether the interval excludes zero; without one, whether the sign test has p below 0.05."""
        if self.interval is None:
            return self.sign_test is not None and self.sign_test < SIGNIFICANT
        return self.interval.excludes_zero

    def signs(self) -> str:
        """In how many seeds the arm was better and worse, the sign test, whether it could have said anything, and why
        there is no interval."""
        seeds = counted(len(self.differences), "seed")
        p = f", sign test p = {self.sign_test:.2g}" if self.sign_test is not None else ""
        few = 0 < self.better + self.worse < SIGN_SEEDS
        p += f" (cannot reach {SIGNIFICANT} unless {SIGN_SEEDS} seeds differ)" if few else ""
        return f"better in {self.better}, worse in {self.worse} of {seeds}{p}, no interval: {self.no_interval}"

    @property
    def can_differ(self) -> bool:
        """Whether it is an interval, or a sign test of enough seeds."""
        return self.interval is not None or self.better + self.worse >= SIGN_SEEDS

    def sentence(self) -> str:
        """The result in one line."""
        names, seeds = f"{self.arm} - {self.reference}, {self.measure}", counted(len(self.differences), "seed")
        if self.interval is not None:
            found = self.interval
            verdict = "" if self.differs else ": no difference is shown"
            return f"{names}: {found.mean:+.4g} [{found.low:+.4g}, {found.high:+.4g}] over {seeds}{verdict}"
        if len(self.differences) < 2:
            said = "".join(f"{value:+.4g}, " for value in self.differences.values())
            return f"{names}: {said}no interval: {seeds}, 2 needed"
        return f"{names}: {self.signs()}"


def paired(
    arm: str, reference: str, ours: Mapping[int, float], theirs: Mapping[int, float], measure: Measure
) -> Compared:
    """`ours` against `theirs`, both by seed, under the names of an arm and of its reference."""
    known = {seed: (value, theirs[seed]) for seed, value in ours.items() if seed in theirs}
    # Of two infinite values neither is better.
    differences = {seed: 0.0 if a == b else a - b for seed, (a, b) in known.items()}
    infinite = any(not (math.isfinite(a) and math.isfinite(b)) for a, b in known.values())
    # Student's interval of the difference of small counts, where nominally 95 %, covers 73 to 99 %.
    why = "not all are finite" if infinite else NO_INTERVAL.get(measure.kind, "")
    signs = sign_test(list(differences.values()))
    return Compared(
        arm=arm,
        reference=reference,
        measure=measure.name,
        differences=differences,
        interval=None if why else over_seeds(list(differences.values())),
        better=signs.above if measure.larger_is_better else signs.below,
        worse=signs.below if measure.larger_is_better else signs.above,
        sign_test=signs.p if signs.seeds else None,
        no_interval=why,
    )


def counted(count: int, thing: str) -> str:
    """A number of things in words."""
    return f"{count} {thing}{'s' * (count != 1)}"
