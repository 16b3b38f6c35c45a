"""Stops within a step of many micro-batches, and warns before very long steps.

A step that ends soon is finished. A longer one is abandoned: all ranks agree on it before the same micro-batch, which
is the last one, and the step is discarded like one that the gate refuses.

Each agreement is a collective of two integers on the host. In the first step, ranks agree before micro-batches 2, 3, 5,
9, ..., so that all of them know how long a micro-batch takes. After that they agree every `PATIENCE_SECONDS` by that
measure, and never in a shorter step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from kha_train.config.schema import RunConfig
from kha_train.estimate.long_step import LONG_STEP_SECONDS, long_step_warning, many_micro_batches
from kha_train.telemetry.format import duration
from kha_train.train.preempt import StopRequests

if TYPE_CHECKING:
    from kha_train.distributed import World

PATIENCE_SECONDS = 2.0
"""A stop waits this long for the end of a step; a step that needs longer is abandoned."""


class Patience:
    """Whether to stop, checked by the steps of an attempt before each micro-batch. Call `begin` for a step, then
    `gives_up`; every rank calls them with the same numbers, and all get the same results.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        stops: StopRequests,
        warn: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._world, self._stops, self._warn, self._clock = config, world, stops, warn, clock
        self._seconds = 0.0
        """Seconds per micro-batch, as agreed by all ranks; 0: unknown."""
        self._step, self._started, self._next = 0, 0.0, 2
        self._compiled = (0, 0.0)
        """Micro-batches of this step that may have waited for a compiler, and their seconds."""
        self._has_warned = False
        rows = config.data.batch_sizes.largest * config.engine.context_parallel // world.size
        words = long_step_warning(config, rows)
        self._has_advised = bool(words)
        if words:
            warn(words)

    def begin(self, step: int) -> None:
        """Begin the micro-batches of `step`."""
        self._step, self._started, self._compiled = step, self._clock(), (0, 0.0)
        self._next = 2 if not self._seconds else 1 + max(1, round(PATIENCE_SECONDS / self._seconds))

    def pending(self) -> bool:
        """Whether this rank was asked to stop, checked at the end of a step."""
        return self._stops.pending()

    def gives_up(self, number: int, of: int) -> bool:
        """Before micro-batch `number` (from 1) of `of`: whether it is the last one and the step will be discarded.

        Raises KeyboardInterrupt after a second Ctrl-C or SIGTERM.
        """
        self._stops.check()
        self._stops.place = f"micro-batch {number:,} of {of:,} of step {self._step:,}"
        if number < self._next or number == of:
            return False
        passed = max(1, round(1000 * (self._clock() - self._started)))
        asked, milliseconds = self._world.max_ints(int(self._stops.pending()), passed)
        done, elapsed = number - 1, milliseconds / 1000
        self._seconds = elapsed / done
        self._next = number + max(1, min(done, round(PATIENCE_SECONDS / self._seconds)))
        if asked:
            self._stops.tell_of_another()
        self._warn_if_long(done, of, elapsed)
        return bool(asked) and (of - number) * self._seconds > PATIENCE_SECONDS

    def _warn_if_long(self, done: int, of: int, elapsed: float) -> None:
        if done == 1:
            self._compiled = done, elapsed
            return
        counted, seconds = self._compiled
        estimate = (elapsed - seconds) / (done - counted) * of
        if estimate > LONG_STEP_SECONDS and not self._has_warned:
            self._has_warned = True
            advice = "" if self._has_advised else f": {many_micro_batches(self._config, of)}"
            self._warn(f"a step takes about {duration(estimate)}{advice}")
