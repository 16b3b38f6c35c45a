"""Measures what a checkpoint costs training, in the background and blocking, and what the ring costs
(`checkpoint.ring_steps`), against steps without either.

One engine keeps training. Rounds of a few steps alternate between four modes: none, background, blocking, ring. A round
with a save begins it before its first step and waits for it after its last, so its whole cost lies inside the round;
there are enough steps for the writer to finish by itself. A round of the ring takes a copy after each of its steps.

The cost of a mode is the extra time of its round over a round of none, as a share of the steps that it pays for:
`every` for a save, one for a copy of the ring.
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.synthetic import write_dataset
from kha_train import distributed
from kha_train.bench.protocol import Clock, environment, interleave, told
from kha_train.config.build import to_plain
from kha_train.config.compose import compose
from kha_train.config.constants import RING_COPIES
from kha_train.config.schema import RunConfig
from kha_train.data.stream import open_stream
from kha_train.engine.contract import Engine
from kha_train.engine.default import engine_for
from kha_train.stability.events import Observation
from kha_train.train.ring import Copy
from kha_train.train.saving import Saver
from kha_train.train.step import next_batch, train_step
from kha_train.train.watch import Ruling, Watch

SAVES = ("background", "blocking")


@dataclass(frozen=True)
class Cost:
    """Cost of one mode: seconds that training paused for a save or a copy, and shares of the steps that it pays for.

    `stall_share` is the pause alone; `share` also includes what a thread and cold caches took from the steps.
    """

    stall_seconds: float
    stall_share: float
    share: float


@dataclass(frozen=True)
class Measured:
    """Parameters, bytes per save, median seconds of a step without saves, the costs by mode, and the protocol. `clock`
    is the one that measured rounds; pauses are wall time."""

    parameters: int
    save_bytes: int
    step_seconds: float
    costs: dict[str, Cost]
    every: int
    rounds: int
    steps: int
    clock: Clock
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


class _Rounds:
    """Rounds of `steps` steps of one engine, and the time that training paused in each, by mode."""

    def __init__(self, engine: Engine, config: RunConfig, steps: int) -> None:
        self._engine, self._stream, self._steps = engine, open_stream(config), steps
        self._numbers = itertools.count(1)
        self.stalls: dict[str, list[float]] = {}
        # The detectors' windows are full, as in a run.
        watch = Watch(config)
        for step in range(2000):
            watch.judge(Observation(step, 2.0 + step % 7 / 100, 1.0))
        self._state = {"stability": watch.state(), "config": to_plain(config)}

    def _steps_done(self) -> Iterator[int]:
        for _ in range(self._steps):
            batch, labels = next_batch(self._stream, self._engine.world)
            train_step(self._engine, batch, labels, 1e-4, lambda loss, norm: Ruling(True))
            yield next(self._numbers)

    def none(self) -> None:
        """Train."""
        for _ in self._steps_done():
            pass

    def save(self, mode: str, saver: Saver) -> None:
        """Begin a save, train, wait for the save."""
        saver.begin(next(self._numbers), self._engine, self._state)
        for _ in self._steps_done():
            saver.poll()
        saver.finish()
        self._paused(mode, saver.take_stall())

    def ring(self, copies: deque[Copy]) -> None:
        """Train, with a copy into the older of `copies` after each step."""
        for step in self._steps_done():
            started = time.perf_counter()
            copies[0].take(self._engine, step, self._state)
            copies[0].host.synchronize()
            copies.rotate(-1)
            self._paused("ring", time.perf_counter() - started)

    def _paused(self, mode: str, seconds: float) -> None:
        self.stalls.setdefault(mode, []).append(seconds)


def measure(overrides: Sequence[str], every: int, rounds: int, steps: int, clock: Clock = "wall") -> Measured:
    """Train the configuration of `overrides` on synthetic data in a temporary directory. One process."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as left_last:
        config = compose([*overrides, f"data.train={folder}/data/train", f"data.validation={folder}/data/validation"])
        write_dataset(f"{folder}/data", vocab_size=config.model.vocab_size, documents=800)
        world = distributed.start(config.engine.device, config.engine.collective_timeout_seconds)
        left_last.push(lambda kind, error, trace: distributed.stop(error))
        engine_class = engine_for(config, world.size)
        left_last.push(lambda kind, error, trace: engine_class.leave_world(error))
        engine = engine_class(config, world)
        training = _Rounds(engine, config, steps)
        arms: dict[str, Callable[[], None]] = {"none": training.none}
        for mode in SAVES:
            arms[mode] = partial(training.save, mode, _saver(config, world, Path(folder) / mode, mode))
        arms["ring"] = partial(training.ring, deque(Copy() for _ in range(RING_COPIES)))
        seconds = interleave(arms, blocks=rounds, warmup=1, device=world.device, clock=clock)
        about = environment(world.device)
        save_bytes = sum(path.stat().st_size for path in (Path(folder) / "blocking").rglob("*.safetensors"))
        parameters = sum(math.prod(shape) for shape in engine.shapes.values())
        engine.close()
    step = statistics.median(seconds["none"]) / steps
    costs = {mode: _cost(seconds[mode], seconds["none"], training.stalls[mode][1:], every * step) for mode in SAVES}
    # The first round, which does not count, has a copy for each of its steps.
    costs["ring"] = _cost(seconds["ring"], seconds["none"], training.stalls["ring"][steps:], step, steps)
    return Measured(parameters, save_bytes, step, costs, every, rounds, steps, clock, about)


def _cost(of_mode: list[float], without: list[float], stalls: list[float], paid_by: float, times: int = 1) -> Cost:
    """Medians over rounds; a round pays `times`, each time for steps of `paid_by` seconds."""
    stall = statistics.median(stalls)
    extra = statistics.median(one - other for one, other in zip(of_mode, without, strict=True)) / times
    return Cost(stall, stall / paid_by, extra / paid_by)


def _saver(config: RunConfig, world: distributed.World, run_dir: Path, mode: str) -> Saver:
    checkpoint = replace(config.checkpoint, background=mode == "background", keep_last=1)
    return Saver(
        replace(config, checkpoint=checkpoint), world, run_dir, sync=lambda: None, event=lambda *given, **_: None
    )


def format_measured(found: Measured) -> str:
    """The figures and their protocol, as text."""
    size = f"{found.parameters:,} parameters, {found.save_bytes / 2**20:,.0f} MiB per save"
    lines = [
        told(found.about),
        (
            f"{size}, {found.step_seconds:.3f} s per step; {found.rounds} interleaved rounds of {found.steps} steps "
            "per mode,"
        ),
        f"medians; one save every {found.every} steps:",
    ]
    for mode, cost in found.costs.items():
        what = "copy with checkpoint.ring_steps=1" if mode == "ring" else "save"
        lines.append(
            f"  {mode:<10} pauses {1000 * cost.stall_seconds:7.1f} ms per {what}, {100 * cost.stall_share:5.2f} % of "
            f"step time; with all that it takes from the steps {100 * cost.share:5.2f} % (by the {found.clock} clock)"
        )
    return "\n".join(lines)
