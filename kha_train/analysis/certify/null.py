"""How large differences are that mean nothing, from A/A runs: pairs that a comparison should find equal.

Runs of one group (see `KINDS`) are exchangeable: their means over the window differ by chance alone. With the squared
differences d of all pairs inside groups of k runs, the variance of the difference of two such runs is estimated by
2 sum(sum(d^2) / k) / sum(k - 1): twice the variance inside groups, since the sum of d^2 is k times that of the squared
deviations. Pairs that share a run are so not counted as independent.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Hashable, Sequence
from itertools import combinations

import numpy as np

from kha_train.analysis.certify.certified import Null, NullPair
from kha_train.analysis.compare import Comparison, loss_difference
from kha_train.analysis.runs import RunData
from kha_train.analysis.sameness import confounders
from kha_train.analysis.statistics import student_975
from kha_train.errors import ConfigError


def _data_seed(run: RunData) -> Hashable:
    own = run.history("data.seed")[0][1]
    return run.seed if own is None else str(own)


KINDS: dict[str, tuple[Callable[[RunData], Hashable], Callable[[RunData], Hashable]]] = {
    "the same seed and data: one function up to rounding": (
        lambda run: (run.seed, _data_seed(run)),
        lambda run: str(run.path),
    ),
    "the same arm and seed, another data.seed": (lambda run: (run.variant, run.seed), _data_seed),
    "the same arm, another run.seed": (lambda run: run.variant, lambda run: run.seed),
}
"""Kind of A/A runs -> what runs of a group have in common, and what tells them apart. Only the first kind is paired."""


def nulls_of(comparison: Comparison, runs: Sequence[RunData]) -> tuple[Null, ...]:
    """The differences between A/A `runs` over the window of `comparison`, one entry for each kind that is among them.

    Raises ConfigError when no two runs are A/A, a run lacks steps of the window, or two have no finite step there.
    """
    first, last = window(comparison)
    for run in runs:
        if int(((run.steps >= first) & (run.steps <= last)).sum()) < last - first + 1:
            raise ConfigError(
                f"has steps {run.steps[0]} to {run.steps[-1]}, and the comparison uses {first} to {last}",
                field="--null",
                value=str(run.path),
                fix="name A/A runs of as many steps",
            )
    found = [_null(kind, comparison.runs[0], _groups(kind, runs), (first, last)) for kind in KINDS]
    if not any(found):
        raise ConfigError(
            "no two of these runs are A/A",
            field="--null",
            value=" ".join(str(run.path) for run in runs),
            allowed="runs of one seed that are the same function, or of one arm with other values of data.seed",
        )
    return tuple(one for one in found if one is not None)


def window(comparison: Comparison) -> tuple[int, int]:
    """The first and last step that every difference of `comparison` covers; for a single run its last half."""
    pairs = [pair for pair in comparison.pairs if pair.difference is not None]
    if not pairs:
        steps = comparison.runs[0].steps
        return int(steps[len(steps) // 2]), int(steps[-1])
    return max(pair.first_step for pair in pairs), min(pair.last_step for pair in pairs)


def command_for_null(run: RunData) -> str:
    """What to type to make an A/A run: the command that started `run`, with another order of the data."""
    seed, place = run.history("data.seed")[0][1], f"{run.path}-aa"
    command = str(run.run.get("provenance", {}).get("command") or "kha train")
    typed = [word for word in shlex.split(command) if not re.match(r"\+*(data\.seed|run\.dir|run\.name)=", word)]
    other = (run.seed or 0) + 1 if seed is None else int(seed) + 1
    return shlex.join([*typed, f"data.seed={other}", f"run.dir={place}", f"run.name={run.path.name}-aa"])


def _groups(kind: str, runs: Sequence[RunData]) -> list[list[RunData]]:
    """The groups of at least two runs; of runs that nothing tells apart, the first."""
    common, apart = KINDS[kind]
    found: dict[Hashable, dict[Hashable, RunData]] = {}
    for run in runs:
        found.setdefault(common(run), {}).setdefault(apart(run), run)
    return [list(group.values()) for group in found.values() if len(group) > 1]


def _null(kind: str, reference: RunData, groups: list[list[RunData]], steps: tuple[int, int]) -> Null | None:
    pairs, squares, freedom = list[NullPair](), 0.0, 0
    for group in groups:
        made = [NullPair(one.label, two.label, _difference(one, two, *steps)) for one, two in combinations(group, 2)]
        pairs += made
        squares += sum(pair.difference**2 for pair in made) / len(group)
        freedom += len(group) - 1
    if not pairs:
        return None
    spread = math.sqrt(2 * squares / freedom)
    bound = student_975(freedom) * spread
    paired = kind == next(iter(KINDS))
    return Null(kind, *steps, tuple(pairs), freedom, spread, bound, paired, tuple(_caveats(reference, groups)))


def _difference(one: RunData, two: RunData, first: int, last: int) -> float:
    """Mean of the train loss of `two` - `one` from step `first` to `last`, where both are finite. Raises ConfigError
    where they never are.
    """
    steps, difference = loss_difference(one, two)
    inside = difference[(steps >= first) & (steps <= last)]
    finite = inside[np.isfinite(inside)]
    if not len(finite):
        raise ConfigError(
            f"no train loss from step {first} to {last} is finite both here and in {one.path}",
            field="--null",
            value=str(two.path),
            fix="name A/A runs that did not diverge, and compare runs of as many steps",
        )
    return float(finite.mean())


def _caveats(reference: RunData, groups: list[list[RunData]]) -> list[str]:
    """Settings in which A/A runs differ among themselves, or from the reference of the comparison."""
    found = []
    for group in groups:
        for other in group[1:]:
            if other.variant != group[0].variant:
                found.append(f"{group[0].variant} and {other.variant} are taken to be the same function")
            found += confounders(group[0], other)
        found += [f"unlike the reference of the comparison: {words}" for words in confounders(reference, group[0])]
    return list(dict.fromkeys(found))
