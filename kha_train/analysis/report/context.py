"""What the sections of one report share: the runs on every x axis, their styles, and their smoothed curves."""

# N lines of a record

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from kha_train.analysis.compare import Comparison, Pair
from kha_train.analysis.figures import thin
from kha_train.analysis.heads.inspection import Inspection, is_current, read_inspections
from kha_train.analysis.heads.matches import Match, read_matches
from kha_train.analysis.layers import Sampled, read_sampled
from kha_train.analysis.report.content import Axis, Kind, Row, Series, Style, Table
from kha_train.analysis.runs import RunData
from kha_train.analysis.statistics import display_decay, exponential_average
from kha_train.errors import KhaError

AXES = (
    Axis("steps", "optimiser step", whole=True),
    Axis("tokens", "tokens"),
    Axis("flops", "training FLOPs"),
    Axis("hours", "hours of training steps"),
)
RAW_POINTS, LINE_POINTS = 800, 400
"""Points of a curve that are drawn; the drawing is 400 units wide."""
Saved = TypeVar("Saved")
MOST_RUNS = 8
"""More runs than this are drawn and listed by variant."""


@dataclass(frozen=True)
class Context:
    """A comparison that is being written. Runs are numbered as in the comparison."""

    comparison: Comparison

    @property
    def runs(self) -> tuple[RunData, ...]:
        """The compared runs."""
        return self.comparison.runs

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the runs, in order."""
        return tuple(run.label for run in self.runs)

    @cached_property
    def variants(self) -> dict[str, list[int]]:
        """The runs of each variant, that of the first run at the beginning."""
        found: dict[str, list[int]] = {}
        for number, run in enumerate(self.runs):
            found.setdefault(run.variant, []).append(number)
        return found

    @property
    def grouped(self) -> bool:
        """Whether there are too many runs to draw each."""
        return len(self.runs) > MOST_RUNS

    def style(self, run: int) -> Style:
        """A variant has a colour of its own and a run has a dash of its own, so that curves that lie on each other can
        be told apart.
        """
        return Style(list(self.variants).index(self.runs[run].variant), run)

    def variant_style(self, variant: str) -> Style:
        """The style of a variant as a whole."""
        place = list(self.variants).index(variant)
        return Style(place, place)

    @cached_property
    def sampled(self) -> tuple[Sampled, ...]:
        """What the runs recorded by layer, and at probed steps."""
        return tuple(map(read_sampled, self.runs))

    @cached_property
    def inspections(self) -> tuple[tuple[Sequence[Inspection], str], ...]:
        """The results of `kha analyze` of each run, or none and the reason why they cannot be read."""
        return tuple(_saved(read_inspections, run) for run in self.runs)

    @cached_property
    def saved_matches(self) -> tuple[tuple[Sequence[Match], str], ...]:
        """The results of `kha analyze --match` of each run, or none and the reason why they cannot be read."""
        return tuple(_saved(read_matches, run) for run in self.runs)

    @cached_property
    def matches(self) -> tuple[tuple[int, int, Match], ...]:
        """What `kha analyze --match` found of two of these runs: the run, the other, and the result. Results of
        checkpoints that were replaced are left out.
        """
        by_id = {str(run.run.get("run_id", "")): number for number, run in enumerate(self.runs)}
        return tuple(
            (number, by_id[match.reference_id], match)
            for number in range(len(self.runs))
            for match in self.saved_matches[number][0]
            if match.reference_id in by_id
            and is_current(self.runs[by_id[match.reference_id]].path, match.reference_step, match.reference_manifest)
        )

    def run_table(self, rows: Sequence[Row]) -> Table:
        """A table with a column for each run; closed at first where there are too many."""
        return Table(("", *self.labels), tuple(rows), f"All {len(self.runs)} runs" if self.grouped else "")

    def lost(self, run: int) -> bool:
        """Whether the run diverged, or its loss rose and did not recover."""
        honesty = self.comparison.summaries[run].honesty
        return bool(honesty["diverged"] or honesty["unrecovered"])

    def fair(self, pair: Pair) -> bool:
        """Whether the difference of a pair may be emphasised: no caveat, and neither run diverged."""
        return not pair.caveats and not (self.lost(pair.reference) or self.lost(pair.other))

    @cached_property
    def decay(self) -> float:
        """The decay of every smoothed curve of train loss."""
        return display_decay(max(len(run.columns) for run in self.runs))

    @cached_property
    def losses(self) -> tuple[np.ndarray, ...]:
        """The train loss of every run [N]; nan where it is not finite."""
        return tuple(finite(run.column("train/loss")) for run in self.runs)

    @cached_property
    def smoothed(self) -> tuple[np.ndarray, ...]:
        """The smoothed train loss of every run [N]; nan where the loss is."""
        return tuple(self.smooth(loss_N) for loss_N in self.losses)

    def smooth(self, values_N: np.ndarray) -> np.ndarray:
        """The exponential average of `values_N`, with the same gaps."""
        return np.where(np.isfinite(values_N), exponential_average(values_N, self.decay), np.nan)

    @cached_property
    def _x(self) -> tuple[dict[str, np.ndarray], ...]:
        return tuple(map(_axes_of, self.runs, (cost.flops_per_token for cost in self.comparison.costs)))

    def x(self, run: int, steps_N: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """The values of every known axis at the lines of a run, or at some of its `steps_N`."""
        if steps_N is None:
            return self._x[run]
        places = np.searchsorted(self.runs[run].steps, steps_N)
        return {key: values_N[places] for key, values_N in self._x[run].items()}

    def meaning(self, name: str) -> str:
        """What the runs declared a metric to mean, as a sentence; "" where none did."""
        meaning = next(filter(None, (run.meaning(name) for run in self.runs)), "")
        # The rest says how layers are combined, or at which steps.
        told = meaning.partition(";")[0]
        return f"{told[:1].upper()}{told[1:]}." if told else ""

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The axes that at least one run has."""
        return tuple(axis for axis in AXES if any(axis.key in known for known in self._x))


def _saved(read: Callable[[Path], Sequence[Saved]], run: RunData) -> tuple[Sequence[Saved], str]:
    """A damaged result does not stop a comparison, which does not depend on it."""
    try:
        return read(run.path), ""
    except (KhaError, OSError) as error:
        return (), f"{run.label}: {error}"


def _axes_of(run: RunData, flops_per_token: float | None) -> dict[str, np.ndarray]:
    """Steps, tokens, FLOPs and hours at every line, as far as the record has them for all lines."""
    found = {"steps": run.steps.astype(np.float64)}
    tokens_N, seconds_N = run.column("tokens"), run.column("train/step_seconds")
    if np.isfinite(tokens_N).all():
        found["tokens"] = tokens_N
        if flops_per_token:
            found["flops"] = tokens_N * flops_per_token
    if np.isfinite(seconds_N).all():
        found["hours"] = np.cumsum(seconds_N) / 3600
    return found


def series(
    name: str,
    style: Style,
    kind: Kind,
    x: Mapping[str, np.ndarray],
    y_N: np.ndarray,
    band: tuple[np.ndarray, np.ndarray] | None = None,
) -> Series:
    """A series with as many points as can be seen; see `thin`."""
    return thinned(Series(name, style, kind, x, y_N, *(band or (None, None))))


def thinned(one: Series) -> Series:
    """`one` with as many points as can be seen, and what is not finite as nan."""
    y_N = finite(one.y_N)
    places = thin(np.arange(len(y_N)), y_N, RAW_POINTS if one.kind == "raw" else LINE_POINTS)[0]
    return replace(
        one,
        x={key: values_N[places] for key, values_N in one.x.items()},
        y_N=y_N[places],
        low_N=None if one.low_N is None else one.low_N[places],
        high_N=None if one.high_N is None else one.high_N[places],
    )


def finite(values_N: np.ndarray) -> np.ndarray:
    """`values_N` with nan for everything that is not finite."""
    return np.where(np.isfinite(values_N), values_N, np.nan)


def bounds(parts: Sequence[np.ndarray], share: float = 0.0) -> tuple[float, float] | None:
    """The smallest and largest finite value of all `parts`, with a margin; None without any. `share` of the values is
    left out at each end.
    """
    values = np.concatenate([part[np.isfinite(part)] for part in parts]) if parts else np.zeros(0)
    if not len(values):
        return None
    low, high = (float(value) for value in np.quantile(values, (share, 1 - share)))
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin
