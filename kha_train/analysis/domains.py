"""The differences between variants in each validation set and task, one a seed, with their interval over seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kha_train.analysis.evaluations import VALIDATION
from kha_train.analysis.runs import RunData
from kha_train.analysis.scored import last_common, scored_series
from kha_train.analysis.statistics import SeedInterval, over_seeds
from kha_train.analysis.validation_sets import marks, named_entries


@dataclass(frozen=True)
class DomainDifference:
    """`figure` of the entries `entries`: `variant` - `reference` in every fair pair, one a seed, at the last step that
    both scored. Pairs known to have scored different rows are left out. `interval` is over the seeds, None for fewer
    than two.
    """

    entries: str
    figure: str
    variant: str
    reference: str
    steps: tuple[int, ...]
    differences: tuple[float, ...]
    interval: SeedInterval | None


def domain_differences(runs: tuple[RunData, ...], fair: Sequence[tuple[int, int]]) -> tuple[DomainDifference, ...]:
    """The differences of all validation sets and tasks over the pairs `fair` (reference, other). Pairs whose marks say
    that they scored different rows are left out, and so are further pairs of one seed.
    """
    return tuple(
        found
        for entries in (VALIDATION, *named_entries(runs))
        for found in _of_entries(runs, fair, entries, marks(runs, entries))
    )


def _of_entries(
    runs: tuple[RunData, ...], fair: Sequence[tuple[int, int]], entries: str, told: Sequence[str]
) -> Iterator[DomainDifference]:
    series = [scored_series(run, entries) for run in runs]
    found: dict[tuple[str, str], dict[Any, tuple[int, float]]] = {}
    for reference, other in fair:
        if told[reference] != told[other] or runs[reference].variant == runs[other].variant:
            continue
        for figure in (name for name in series[reference] if name in series[other]):
            difference = last_common(series[reference][figure], series[other][figure])
            if difference is not None:
                by_seed = found.setdefault((figure, runs[other].variant), {})
                by_seed.setdefault(runs[other].seed, difference)
    for (figure, variant), by_seed in found.items():
        steps, differences = zip(*by_seed.values(), strict=True)
        yield DomainDifference(
            entries, figure, variant, runs[0].variant, steps, differences, over_seeds(list(differences))
        )
