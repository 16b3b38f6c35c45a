"""Everything that `kha compare --certify` adds to a comparison: null, seeds needed, replays, chains."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kha_train.analysis.certify.certificate import chains_of
from kha_train.analysis.certify.certified import Bar, Certified, Replay, SeedsNeeded
from kha_train.analysis.certify.null import nulls_of
from kha_train.analysis.certify.power import seeds_for
from kha_train.analysis.compare import Comparison
from kha_train.analysis.runs import RunData, load_runs
from kha_train.errors import ConfigError


@dataclass(frozen=True)
class Request:
    """What to certify: the A/A runs of `null`, the `effect` that matters (None: the measured one), and `replay`
    stretches drawn with `replay_seed`.
    """

    null: tuple[Path, ...] = ()
    effect: float | None = None
    replay: int = 0
    replay_seed: int = 0

    def __post_init__(self) -> None:
        if self.effect is not None and not (self.effect and math.isfinite(self.effect)):
            raise ConfigError(
                "no number of seeds finds it",
                field="--effect",
                value=self.effect,
                allowed="a finite number of nats per token, not 0",
            )


def certify(
    comparison: Comparison, request: Request, read: Callable[[Path], RunData], tell: Callable[[str], None], bar: Bar
) -> Certified:
    """The parts of a certificate of `comparison`; `read` loads the A/A runs, `tell` receives a line about each
    replay, `bar` shows progress.

    Raises ConfigError and DataError about A/A runs, CheckpointError for a checkpoint that is being removed, OSError
    when a file cannot be read.
    """
    nulls = nulls_of(comparison, load_runs(list(request.null), read)) if request.null else ()
    return Certified(
        chains_of(comparison, bar),
        nulls,
        _needs(comparison, request.effect),
        _replays(comparison, request, tell, bar),
        request.replay_seed,
    )


def _needs(comparison: Comparison, effect: float | None) -> tuple[SeedsNeeded, ...]:
    """An entry for each variant; without fair pairs of a variant, only what was stated is known."""
    measured = {found.variant: found.differences for found in comparison.across_seeds}
    others = dict.fromkeys(run.variant for run in comparison.runs if run.variant != comparison.runs[0].variant)
    return tuple(
        seeds_for(
            variant,
            float(np.mean(measured[variant])) if effect is None else effect,
            effect is not None,
            measured.get(variant, ()),
        )
        for variant in others
        if effect is not None or variant in measured
    )


def _replays(comparison: Comparison, request: Request, tell: Callable[[str], None], bar: Bar) -> tuple[Replay, ...]:
    if not request.replay:
        return ()
    # Training is imported only to train.
    from kha_train.operate.replay import replay_runs

    return replay_runs(comparison.runs, request.replay, request.replay_seed, tell, bar)
