"""What a checkpoint costs training: written beside it, and blocking it, against steps without any.

One engine trains on; rounds of a few steps follow each other in turn: none, background, blocking. A round with a save
begins it before its first step and waits for it after its last, so all it costs lies inside the round; the steps are
enough for the writer to end by itself. The cost of a mode is its round's extra time over that of the round without,
as a share of `every` steps: the price of one save every so many steps. Medians over rounds.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_tools.synthetic import write_dataset
from kha_train import distributed
from kha_train.config.compose import compose
from kha_train.config.schema import RunConfig
from kha_train.data.stream import TokenStream, open_stream
from kha_train.engine.deepspeed import Engine, leave_world
from kha_train.train.saving import Saver
from kha_train.train.step import next_batch, train_step
from kha_train.train.watch import Ruling

MODES = ("none", "background", "blocking")


@dataclass(frozen=True)
class Cost:
    """Of one mode: seconds training stood still for a save, and the extra time of a round as a share of `every` steps.

    `stall_share` is the stall alone over `every` steps; `share` also holds what the writing thread took from the steps.
    """

    stall_seconds: float
    stall_share: float
    share: float


@dataclass(frozen=True)
class Measured:
    """Parameters, bytes of a save, median seconds of a step without saves, the costs by mode, and the protocol."""

    parameters: int
    save_bytes: int
    step_seconds: float
    costs: dict[str, Cost]
    every: int
    rounds: int
    steps: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def measure(overrides: Sequence[str], every: int, rounds: int, steps: int) -> Measured:
    """Train the configuration of `overrides` on synthetic data in a temporary directory. One process."""
    with tempfile.TemporaryDirectory() as folder:
        config = compose([*overrides, f"data.train={folder}/data/train", f"data.validation={folder}/data/validation"])
        write_dataset(f"{folder}/data", vocab_size=config.model.vocab_size, documents=800)
        world = distributed.start(config.engine.device, config.engine.collective_timeout_seconds)
        engine = Engine(config, world)
        stream = open_stream(config)
        _round(engine, stream, None, 0, steps=2)
        times: dict[str, list[float]] = {mode: [] for mode in MODES}
        stalls: dict[str, list[float]] = {mode: [] for mode in MODES}
        savers = {mode: _saver(config, world, Path(folder) / mode, mode) for mode in MODES[1:]}
        for number in range(1, rounds + 1):
            for mode in MODES:
                saver = savers.get(mode)
                times[mode].append(_round(engine, stream, saver, number, steps))
                stalls[mode].append(saver.take_stall() if saver else 0.0)
        save_bytes = sum(path.stat().st_size for path in (Path(folder) / "blocking").rglob("*.safetensors"))
        parameters = sum(parameter.numel() for parameter in engine.decoder.parameters())
        engine.close()
        leave_world()
    step = statistics.median(times["none"]) / steps
    pairs = {mode: [with_save - without for with_save, without in zip(times[mode], times["none"], strict=True)]
             for mode in MODES[1:]}  # fmt: skip
    costs = {
        mode: Cost(stall := statistics.median(stalls[mode]), stall / (every * step),
                   statistics.median(pairs[mode]) / (every * step))
        for mode in MODES[1:]
    }  # fmt: skip
    return Measured(parameters, save_bytes, step, costs, every, rounds, steps)


def _saver(config: RunConfig, world: distributed.World, run_dir: Path, mode: str) -> Saver:
    checkpoint = replace(config.checkpoint, background=mode == "background", keep_last=1)
    return Saver(
        replace(config, checkpoint=checkpoint), world, run_dir, sync=lambda: None, event=lambda *given, **_: None
    )


def _round(engine: Engine, stream: TokenStream, saver: Saver | None, number: int, steps: int) -> float:
    """Seconds of a round of `steps` steps, with the save `number` in it when there is a saver."""
    started = time.perf_counter()
    if saver:
        saver.begin(number, engine, {"round": number})
    for _ in range(steps):
        batch, labels = next_batch(stream, engine.world)
        train_step(engine, batch, labels, 1e-4, False, lambda loss, norm: Ruling(True))
        if saver:
            saver.poll()
    if saver:
        saver.finish()
    return time.perf_counter() - started


def format_measured(found: Measured) -> str:
    """The figures and how they came about."""
    size = f"{found.parameters:,} parameters, {found.save_bytes / 2**20:,.0f} MiB a save"
    lines = [
        f"{size}, {found.step_seconds:.3f} s a step; {found.rounds} interleaved rounds of {found.steps} steps a mode,",
        f"medians; one save every {found.every} steps:",
    ]
    for mode, cost in found.costs.items():
        lines.append(
            f"  {mode:<10} stands still {1000 * cost.stall_seconds:7.1f} ms a save, {100 * cost.stall_share:5.2f} % of "
            f"step time; with what the writer takes from the steps {100 * cost.share:5.2f} %"
        )
    return "\n".join(lines)
