"""Coverage of every 95 % interval that a report prints, on simulated data whose true value is known.

An interval holds if it covers the true value in at least 92 % of the simulations in which it is printed, and in at most
97 % where the quantity is continuous; exact intervals of counts may cover more. Each row is one setting of the
simulation. A row fails if the number covered would occur with probability below 0.001 at the bound (exact binomial).
The functions measured are those that the commands call; `PRINTED` lists who prints which.
"""

# C simulated curves, pools or sets of seeds  N values of each

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from kha_train.analysis.certify.power import spread_limits
from kha_train.analysis.statistics import mean_of_steps, over_seeds, pooled_rate, sign_test
from kha_train.bench.protocol import compare
from kha_train.stability.statistics import reported_rate

LOWEST, HIGHEST = 0.92, 0.97
SURE = 0.001
"""The probability, at a bound, below which a row fails."""
JUDGED = 500
"""Rows with fewer printed intervals are left out of the extremes of the summary: their shares are too uncertain."""
CORRELATIONS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
VARIATIONS = (0.0, 0.7, 1.0)
STEPS = (200, 600, 1000, 2000, 5000, 10_000, 40_000)
SEEDS = (2, 3, 5, 10, 20)
EVENTS = (0.3, 1.0, 3.0, 10.0, 20.0)
BLOCKS = (6, 7, 10, 20, 40)
CHUNK = 4_000_000
"""Numbers drawn at a time."""

PRINTED: dict[str, tuple[str, ...]] = {
    "mean over seeds": (
        "analysis/answer.py", "analysis/compare.py", "analysis/report/answer.py", "analysis/report/validation.py",
        "analysis/study_collection.py", "analysis/study_page.py", "analysis/study_picture.py",
        "analysis/study_results.py",
    ),
    "sign test over seeds": ("analysis/answer.py", "analysis/compare.py", "analysis/study_results.py"),
    "spread over seeds": ("analysis/report/certificate.py",),
    "mean over steps": ("analysis/compare.py", "analysis/report/difference.py"),
    "rate of one run": ("cli/spikes.py", "bench/spikes.py", "bench/spike_thresholds.py", "stability/benchmark.py"),
    "pooled rate": ("analysis/report/spikes.py", "cli/spikes.py"),
    "ratio of times": (
        "bench/attention.py", "bench/decode.py", "bench/gpu.py", "bench/moe.py", "bench/protocol.py", "bench/scale.py",
        "bench/step.py", "bench/telemetry.py",
    ),
}  # fmt: skip
"""The interval, by its name in the table -> the files under `kha_train` that print it. A test compares this with the
files that contain "95 %".
"""


class Trial(NamedTuple):
    """One simulated interval: `printed`, and if so whether it covers the true value."""

    printed: bool
    covered: bool = False


@dataclass(frozen=True)
class Row:
    """How often an interval was printed and covered the true value in `simulated` simulations of one setting."""

    interval: str
    setting: str
    continuous: bool
    simulated: int
    printed: int
    covered: int

    @property
    def coverage(self) -> float | None:
        """Share of the printed intervals that cover the true value; None where none was printed."""
        return self.covered / self.printed if self.printed else None

    @property
    def holds(self) -> bool:
        """Whether the counts agree with the bounds."""
        missed = self.printed - self.covered
        low = binomial_tail(self.covered, self.printed, LOWEST) >= SURE
        high = not self.continuous or binomial_tail(missed, self.printed, 1 - HIGHEST) >= SURE
        return low and high

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        counts = {"simulated": self.simulated, "printed": self.printed, "covered": self.covered}
        named = {"interval": self.interval, "setting": self.setting, "continuous": self.continuous}
        return {**named, **counts, "coverage": self.coverage, "holds": self.holds}


def binomial_tail(count: int, trials: int, probability: float) -> float:
    """P(N <= count) of a binomial distribution, exact but for rounding."""
    yes, no, all_ways = math.log(probability), math.log1p(-probability), math.lgamma(trials + 1)
    logs = (
        all_ways - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * yes + (trials - k) * no
        for k in range(count + 1)
    )
    return math.fsum(map(math.exp, logs))


def autoregressive(source: np.random.Generator, curves: int, steps: int, correlation: float) -> np.ndarray:
    """Stationary AR(1) curves [C, N] of mean 0 and variance 1, with this correlation between neighbours."""
    if not correlation:
        return source.standard_normal((curves, steps))
    values_NC = source.standard_normal((steps, curves)) * math.sqrt(1 - correlation**2)
    values_NC[0] /= math.sqrt(1 - correlation**2)
    for step in range(1, steps):
        values_NC[step] += correlation * values_NC[step - 1]
    return np.ascontiguousarray(values_NC.T)


def measure(seed: int, simulations: int, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """All rows, each from up to `simulations` simulations (fewer for long curves), and a summary by interval."""
    rows = []
    for name, (continuous, settings) in SIMULATIONS.items():
        say(name)
        source = np.random.default_rng([seed, list(SIMULATIONS).index(name)])
        for setting, trials in settings(source, simulations):
            found = list(trials)
            printed, covered = sum(one.printed for one in found), sum(one.covered for one in found)
            rows.append(Row(name, setting, continuous, len(found), printed, covered))
    return {
        "seed": seed,
        "simulations": simulations,
        "bounds": {"lowest": LOWEST, "highest": HIGHEST},
        "printed_by": {name: list(files) for name, files in PRINTED.items()},
        "rows": [row.to_dict() for row in rows],
        "summary": {name: _summary([row for row in rows if row.interval == name]) for name in SIMULATIONS},
        "holds": all(row.holds for row in rows),
    }


def _summary(rows: Sequence[Row]) -> dict[str, Any]:
    shares = [row.coverage for row in rows if row.coverage is not None and row.printed >= JUDGED]
    return {
        "rows": len(rows),
        "judged": len(shares),
        "least": min(shares, default=None),
        "most": max(shares, default=None),
        "failed": [row.setting for row in rows if not row.holds],
    }


Settings = Iterator[tuple[str, Iterator[Trial]]]


def _seeds(source: np.random.Generator, simulations: int) -> Settings:
    """Differences of a variant with an effect of 1 that varies from seed to seed, each a mean of an AR(1) curve."""
    steps = 100
    for seeds in SEEDS:
        for correlation, variation in [*((one, 0.0) for one in CORRELATIONS), *((0.8, one) for one in VARIATIONS[1:])]:
            noise_C = autoregressive(source, simulations * seeds, steps, correlation).mean(axis=1)
            effects_C = 1 + variation * source.standard_normal(simulations * seeds)
            values_CN = (noise_C + effects_C).reshape(simulations, seeds)
            yield f"{seeds} seeds, AR(1) {correlation}, effect varies by {variation}", map(_of_seeds, values_CN)


def _of_seeds(values_N: np.ndarray) -> Trial:
    found = over_seeds(values_N.tolist())
    return Trial(True, found.low <= 1 <= found.high) if found else Trial(False)


def _signs(source: np.random.Generator, simulations: int) -> Settings:
    """No effect: p must not fall to 0.05 in more than 5 %. Not printed where it cannot."""
    for seeds in (3, 5, 6, 8, 10, 20):
        for heavy in (False, True):
            drawn = source.standard_t(2, (simulations, seeds)) if heavy else source.normal(size=(simulations, seeds))
            found = (sign_test(values_N.tolist()) for values_N in drawn)
            trials = (Trial(one.least <= 0.05, one.least <= 0.05 < one.p) for one in found)
            yield f"{seeds} seeds, {'t(2)' if heavy else 'normal'} differences", trials


def _spreads(source: np.random.Generator, simulations: int) -> Settings:
    """The standard deviation of normal differences, as `kha compare --certify` limits it."""
    for seeds in SEEDS:
        low, high = spread_limits(seeds - 1)
        spreads_C = source.standard_normal((simulations, seeds)).std(axis=1, ddof=1)
        yield f"{seeds} seeds", (Trial(True, spread * low <= 1 <= spread * high) for spread in spreads_C.tolist())


def _steps(source: np.random.Generator, simulations: int) -> Settings:
    """Differences of curves, AR(1), and independent ones whose size varies from step to step."""
    for steps in STEPS:
        curves = max(min(simulations, 50), min(simulations, 40 * CHUNK // steps))
        for correlation in CORRELATIONS:
            yield f"{steps} steps, AR(1) {correlation}", _of_curves(source, curves, steps, correlation, 0.0)
        for variation in VARIATIONS[1:]:
            yield (
                f"{steps} steps, independent, size varies by {variation}",
                _of_curves(source, curves, steps, 0.0, variation),
            )


def _of_curves(
    source: np.random.Generator, curves: int, steps: int, correlation: float, variation: float
) -> Iterator[Trial]:
    """The interval of the last half of each curve, from the quarter before it, as `kha compare` takes them."""
    half, chunk = steps // 2, max(1, CHUNK // steps)
    for first in range(0, curves, chunk):
        values_CN = autoregressive(source, min(chunk, curves - first), steps - half // 2, correlation)
        if variation:
            values_CN *= source.gamma(1 / variation**2, variation**2, values_CN.shape)
        for values_N in values_CN:
            found = mean_of_steps(values_N[half - half // 2 :], values_N[: half - half // 2])
            interval = found.interval if found else None
            yield Trial(True, interval.low <= 0 <= interval.high) if interval else Trial(False)


def _rates_of(source: np.random.Generator, variation: float, shape: tuple[int, ...], mean: float) -> np.ndarray:
    if not variation:
        return np.full(shape, mean)
    return source.gamma(1 / variation**2, mean * variation**2, shape)


def _single(source: np.random.Generator, simulations: int) -> Settings:
    """Events of one run. Its interval is for its own rate, however much the rates of runs vary."""
    limits = cache(lambda count: reported_rate(count, 1.0))
    for mean in EVENTS:
        for variation in VARIATIONS:
            rates_C = _rates_of(source, variation, (simulations,), mean)
            pairs = zip(rates_C.tolist(), source.poisson(rates_C).tolist(), strict=True)
            trials = (_covers(limits(count), rate) for rate, count in pairs)
            yield f"{mean:g} events, rates vary by {variation}", trials


def _pools(source: np.random.Generator, simulations: int) -> Settings:
    """Events of several runs with gamma-distributed rates; the true value is the mean of the rates of all such runs."""
    limits = cache(lambda counts: pooled_rate(counts, [1.0] * len(counts)))
    for seeds in SEEDS:
        for mean in EVENTS:
            for variation in VARIATIONS:
                counts_CN = np.sort(source.poisson(_rates_of(source, variation, (simulations, seeds), mean)), axis=1)
                trials = (_covers(limits(tuple(counts_N)), mean) for counts_N in counts_CN.tolist())
                yield f"{seeds} runs of {mean:g} events, rates vary by {variation}", trials


def _covers(found: Mapping[str, float | None], truth: float) -> Trial:
    low, high = found["low"], found["high"]
    return Trial(False) if low is None or high is None else Trial(True, low <= truth <= high)


def _ratios(source: np.random.Generator, simulations: int) -> Settings:
    """Independent times of two arms by block, with a true ratio of their medians of 1."""
    for blocks in BLOCKS:
        for spread in (0.02, 0.5):
            times_CN = np.exp(spread * source.standard_normal((simulations, 2 * blocks)))
            found = (compare(row[:blocks].tolist(), row[blocks:].tolist()) for row in times_CN)
            trials = (_covers({"low": one.low, "high": one.high}, 1.0) for one in found)
            yield f"{blocks} blocks, times vary by {spread}", trials


SIMULATIONS: dict[str, tuple[bool, Callable[[np.random.Generator, int], Settings]]] = {
    "mean over seeds": (True, _seeds),
    "sign test over seeds": (False, _signs),
    "mean over steps": (True, _steps),
    "rate of one run": (False, _single),
    "pooled rate": (False, _pools),
    "ratio of times": (False, _ratios),
    "spread over seeds": (True, _spreads),
}
"""The interval -> whether its quantity is continuous, and its simulations by setting."""


def format_measured(found: Mapping[str, Any]) -> str:
    """The protocol, a summary by interval, every row of curves and the rows that failed, as Markdown."""
    summary = [
        f"| {name} | {one['rows']} | {_percent(one['least'])} | {_percent(one['most'])} | {len(one['failed'])} |"
        for name, one in found["summary"].items()
    ]
    rows = [
        f"| {row['interval']} | {row['setting']} | {_percent(row['printed'] / row['simulated'])} | "
        f"{_percent(row['coverage'])} | {'' if row['holds'] else 'FAILS'} |"
        for row in found["rows"]
    ]
    heading = (
        f"Coverage of nominal 95 % intervals, seed {found['seed']}, up to {found['simulations']} simulations a row. A "
        f"row holds from {LOWEST:.0%} on, and up to {HIGHEST:.0%} where the quantity is continuous. Least and most: of "
        f"rows with {JUDGED} or more printed."
    )
    first = ["\n| interval | rows | least | most | failed |", "|---|---|---|---|---|", *summary]
    second = ["\n| interval | simulation | printed | covers | |", "|---|---|---|---|---|", *rows]
    return "\n".join([heading, *first, *second])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
