"""Measures what a checkpoint costs training, in the background and blocking, against steps without saves.

One engine keeps training. Rounds of a few steps alternate between three modes: none, background, blocking. A round with
a save begins it before its first step and waits for it after its last, so its whole cost lies inside the round; there
are enough steps for the writer to finish by itself. The cost of a mode is the extra time of its round over a round
without a save, as a share of `every` steps: the price of one save every `every` steps.
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_tools.synthetic import write_dataset
from kha_train import distributed
from kha_train.bench.protocol import environment, interleave, told
from kha_train.config.build import to_plain
from kha_train.config.compose import compose
from kha_train.config.schema import RunConfig
from kha_train.data.stream import TokenStream, open_stream
from kha_train.engine.contract import Engine
from kha_train.engine.default import engine_for
from kha_train.stability.events import Observation
from kha_train.train.ring import COPIES, Copy
from kha_train.train.saving import Saver
from kha_train.train.step import next_batch, train_step
from kha_train.train.watch import Ruling, Watch

MODES = ("none", "background", "blocking")
RING_COPIES = 20


@dataclass(frozen=True)
class Cost:
    """Cost of one mode: seconds that training paused for a save, and the extra time of a round as a share of `every`
    steps.

    `stall_share` is the pause alone over `every` steps; `share` also includes what the writing thread took from the
    steps.
    """

    stall_seconds: float
    stall_share: float
    share: float


@dataclass(frozen=True)
class Measured:
    """Parameters, bytes per save, median seconds of a step without saves, the costs by mode, and the protocol;
    `ring_seconds` is the median time of one copy into the ring (`checkpoint.ring_steps`)."""

    parameters: int
    save_bytes: int
    step_seconds: float
    costs: dict[str, Cost]
    every: int
    rounds: int
    steps: int
    about: dict[str, Any]
    ring_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


class _Mode:
    """Rounds of `steps` steps, with one save in each if there is a saver, and the time that training paused."""

    def __init__(self, engine: Engine, stream: TokenStream, steps: int, saver: Saver | None) -> None:
        self._engine, self._stream, self._steps, self._saver = engine, stream, steps, saver
        self._numbers = itertools.count(1)
        self.stalls: list[float] = []

    def round(self) -> None:
        """Begin a save, train, wait for the save."""
        if self._saver:
            number = next(self._numbers)
            self._saver.begin(number, self._engine, {"round": number})
        for _ in range(self._steps):
            batch, labels = next_batch(self._stream, self._engine.world)
            train_step(self._engine, batch, labels, 1e-4, lambda loss, norm: Ruling(True))
            if self._saver:
                self._saver.poll()
        if self._saver:
            self._saver.finish()
            self.stalls.append(self._saver.take_stall())


def measure(overrides: Sequence[str], every: int, rounds: int, steps: int) -> Measured:
    """Train the configuration of `overrides` on synthetic data in a temporary directory. One process."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as left_last:
        config = compose([*overrides, f"data.train={folder}/data/train", f"data.validation={folder}/data/validation"])
        write_dataset(f"{folder}/data", vocab_size=config.model.vocab_size, documents=800)
        world = distributed.start(config.engine.device, config.engine.collective_timeout_seconds)
        left_last.push(lambda kind, error, trace: distributed.stop(error))
        engine_class = engine_for(config, world.size)
        left_last.push(lambda kind, error, trace: engine_class.leave_world(error))
        engine = engine_class(config, world)
        stream = open_stream(config)
        savers = {mode: _saver(config, world, Path(folder) / mode, mode) if mode != "none" else None for mode in MODES}
        modes = {mode: _Mode(engine, stream, steps, saver) for mode, saver in savers.items()}
        arms: dict[str, Callable[[], None]] = {name: mode.round for name, mode in modes.items()}
        seconds = interleave(arms, blocks=rounds, warmup=1, device=world.device)
        about = environment(world.device)
        ring_seconds = _ring_seconds(engine, config)
        save_bytes = sum(path.stat().st_size for path in (Path(folder) / "blocking").rglob("*.safetensors"))
        parameters = sum(math.prod(shape) for shape in engine.shapes.values())
        engine.close()
    step = statistics.median(seconds["none"]) / steps
    costs = {name: _cost(seconds[name], seconds["none"], modes[name].stalls[1:], every * step) for name in MODES[1:]}
    return Measured(parameters, save_bytes, step, costs, every, rounds, steps, about, ring_seconds)


def _ring_seconds(engine: Engine, config: RunConfig) -> float:
    """Median over copies, after one into each place of the ring, with detectors whose windows are full."""
    watch, copies, seconds = Watch(config), [Copy() for _ in range(COPIES)], []
    for step in range(2000):
        watch.judge(Observation(step, 2.0 + step % 7 / 100, 1.0))
    for number in range(RING_COPIES + COPIES):
        started = time.perf_counter()
        copies[number % COPIES].take(engine, number, {"stability": watch.state(), "config": to_plain(config)})
        copies[number % COPIES].host.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[COPIES:])


def _cost(with_saves: list[float], without: list[float], stalls: list[float], between_saves: float) -> Cost:
    """Medians over rounds; shares are relative to the seconds `between_saves`."""
    stall = statistics.median(stalls)
    extra = statistics.median(one - other for one, other in zip(with_saves, without, strict=True))
    return Cost(stall, stall / between_saves, extra / between_saves)


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
        lines.append(
            f"  {mode:<10} pauses {1000 * cost.stall_seconds:7.1f} ms per save, {100 * cost.stall_share:5.2f} % of "
            f"step time; including what the writer takes from the steps {100 * cost.share:5.2f} %"
        )
    share = 100 * found.ring_seconds / found.step_seconds
    lines.append(
        f"  ring       pauses {1000 * found.ring_seconds:7.1f} ms per copy (median of {RING_COPIES}): {share:5.2f} % "
        "of step time with checkpoint.ring_steps=1"
    )
    return "\n".join(lines)
