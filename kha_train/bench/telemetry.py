"""Measures what monitoring a run costs: detectors, record, console, W&B and probes, against the bare training step.

Three arms train one engine in interleaved blocks of a step: bare (only the check for finite steps, nothing written),
watched (as in `kha train`, W&B offline), probed (bare, and the evidence of a spike is collected). On most machines the
difference between watched and bare is far below the noise of a step. So the code around the step is also timed alone,
on the training thread: by wall time, which is what training waits for, or by the thread's CPU time, which other load
disturbs less. `every` is the number of steps per probe.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict, dataclass
from typing import Any

from data_tools.synthetic import write_dataset
from kha_train import distributed
from kha_train.bench.protocol import Clock, Ratio, compare, environment, interleave, plain, shown, told
from kha_train.bench.spikes import clean_curve
from kha_train.config.compose import compose
from kha_train.engine.default import engine_for
from kha_train.stability.events import Observation
from kha_train.telemetry.startup import Startup
from kha_train.train.opening import Opened, open_attempt
from kha_train.train.session import Attempt
from kha_train.train.step import StepResult, next_batch, train_step
from kha_train.train.watch import Ruling

FULL_WINDOWS = 1100
"""Steps that the detectors have seen before, so that their windows are full, as in a run of useful length."""
RATE = 1e-4


@dataclass(frozen=True)
class Measured:
    """Seconds: of a bare step (median over blocks), of judging a step, of its metrics line, of recording and mirroring
    it, of a probe (medians). `share` is the sum relative to the step, with a probe every `every` steps; `watched` and
    `probed` are the interleaved ratios to a bare step; `about` is the environment.
    """

    step_seconds: float
    judge_seconds: float
    line_seconds: float
    report_seconds: float
    probe_seconds: float
    every: int
    clock: Clock
    share: float
    watched: Ratio
    probed: Ratio
    about: dict[str, Any]
    blocks: int

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


class _Arms:
    """The three kinds of step of one run, and the seconds spent on telemetry."""

    def __init__(self, opened: Opened, clock: Clock) -> None:
        self._session, self._reporter, self._saver, _ = opened
        self._read = time.thread_time if clock == "process" else time.perf_counter
        self.seconds: dict[str, list[float]] = {"judge": [], "line": [], "report": []}

    def bare(self) -> StepResult:
        """Train without monitoring."""
        return self._train(lambda loss, norm: Ruling(True))

    def probed(self) -> StepResult:
        """Train, and collect the evidence of a spike."""
        return self._train(lambda loss, norm: Ruling(True, probe=True))

    def watched(self) -> None:
        """Train as the training loop does, without validation and saves."""
        session, started = self._session, time.perf_counter()
        judge = self._timed("judge", session.judge_at(RATE))
        result = self._train(lambda loss, norm: judge(loss, norm)._replace(probe=False))
        session.advance(result.applied)
        seconds = time.perf_counter() - started
        line = self._timed("line", self._reporter.line)(session, self._saver, result, RATE, seconds)
        self._timed("report", self._reporter.report)(line, session.watch.happenings(None))

    def _train(self, judge: Callable[[float, float], Ruling]) -> StepResult:
        session = self._session
        batch, labels = next_batch(session.stream, session.world)
        return train_step(session.engine, batch, labels, RATE, judge)

    def _timed(self, name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            started = self._read()
            answer = act(*given)
            self.seconds[name].append(self._read() - started)
            return answer

        return call


def measure(overrides: Sequence[str], blocks: int, clock: Clock = "wall") -> Measured:
    """Train the configuration of `overrides` on synthetic data in a temporary directory. One process, W&B offline."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), ExitStack() as left_last:
        there = {"run.dir": "run", "data.train": "data/train", "data.validation": "data/validation"}
        mirrors = ["telemetry.console=lines", "telemetry.wandb.mode=offline"]
        config = compose([*overrides, *mirrors, *(f"{key}={folder}/{place}" for key, place in there.items())])
        write_dataset(f"{folder}/data", vocab_size=config.model.vocab_size, documents=800)
        world = distributed.start(config.engine.device, config.engine.collective_timeout_seconds)
        left_last.push(lambda kind, error, trace: distributed.stop(error))
        with open_attempt(config, world, Startup(), engine_for(config, world.size), Attempt()) as opened:
            assert isinstance(opened, Opened), "the directory is new"
            for step, loss in enumerate(clean_curve(0, FULL_WINDOWS, "normal").losses):
                opened.session.watch.judge(Observation(step, loss, 1.0 + 0.1 * loss))
            arms = _Arms(opened, clock)
            kinds = {"bare": arms.bare, "watched": arms.watched, "probed": arms.probed}
            seconds = interleave(kinds, blocks=blocks, device=world.device, clock=clock)
            about = environment(world.device)
    every = config.stability.probe_every
    bare = statistics.median(seconds["bare"])
    judge, line, report = (statistics.median(arms.seconds[name][1:]) for name in ("judge", "line", "report"))
    pairs = zip(seconds["probed"], seconds["bare"], strict=True)
    probe = statistics.median(probed - bare for probed, bare in pairs)
    share = (judge + line + report + (probe / every if every else 0.0)) / bare
    watched, probed = (compare(seconds[name], seconds["bare"]) for name in ("watched", "probed"))
    return Measured(bare, judge, line, report, probe, every, clock, share, watched, probed, about, blocks)


def format_measured(found: Measured) -> str:
    """The figures and their protocol, as text."""
    parts = {
        "judge (detectors, policy)": found.judge_seconds,
        "metrics line (balance among it)": found.line_seconds,
        "record, console, W&B": found.report_seconds,
        f"probe, one in {found.every} steps": found.probe_seconds / found.every if found.every else 0.0,
    }
    lines = [f"{told(found.about)}; {found.clock} time, medians over blocks of one step", ""]
    lines += [f"  {name:<32} {1e6 * seconds:9.0f} us a step" for name, seconds in parts.items()]
    lines.append(f"  together {100 * found.share:.3f} % of a bare step of {found.step_seconds:.3f} s")
    watched, probed = (shown(plain(ratio), found.blocks, digits=4) for ratio in (found.watched, found.probed))
    lines.append(f"  time of a watched step over a bare one {watched}, of a probed one {probed} (95 %)")
    return "\n".join(lines)
