"""Stopping amid a step of many micro-batches, and a warning before one that takes long.

A step that ends soon is finished. One that would go on for longer is given up: all ranks agree on it before the same
micro-batch, that one is the last, and the step is discarded like one that the gate refuses.

Asking costs a collective of two integers on the host. Ranks ask before micro-batches 2, 3, 5, 9, ... of the first
step, which tells all of them how long a micro-batch takes; from then on so often as `PATIENCE_SECONDS` have passed by
that measure, and in a step that is shorter never.
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
"""A stop waits so long for the end of a step; one that needs more is given up."""


class Patience:
    """What the steps of an attempt ask before each micro-batch. `begin` a step, then ask `gives_up`; every rank does
    so with the same numbers, and all get the same answers.
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
        """A micro-batch takes so long, as all ranks know it; 0: not known yet."""
        self._step, self._started, self._next = 0, 0.0, 2
        self._compiled = (0, 0.0)
        """Micro-batches of this step that may have waited for a compiler, and their seconds."""
        self._has_warned = False
        words = long_step_warning(config, config.data.global_batch_size // world.size)
        self._has_advised = bool(words)
        if words:
            warn(words)

    def begin(self, step: int) -> None:
        """The micro-batches of `step` follow."""
        self._step, self._started, self._compiled = step, self._clock(), (0, 0.0)
        self._next = 2 if not self._seconds else 1 + max(1, round(PATIENCE_SECONDS / self._seconds))

    def pending(self) -> bool:
        """Whether this rank was asked to stop; at the end of a step."""
        return self._stops.pending()

    def gives_up(self, number: int, of: int) -> bool:
        """Before micro-batch `number` (from 1) of `of`: whether it is to be the last one and the step is discarded.

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
