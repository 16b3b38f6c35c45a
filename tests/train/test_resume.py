"""A run that was killed or stopped and resumed, against one that was not interrupted: equal bit for bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kha_train.checkpoint.layout import candidates
from kha_train.config.compose import compose
from kha_train.record import (
    Marker,
    has_marker,
    read_discarded,
    read_events,
    read_metrics,
    read_run,
    set_marker,
    timing_keys,
)
from kha_train.train.resume import attention_backend
from kha_train.train.run import train

pytestmark = pytest.mark.slow

STEPS = 40
RUN = Path("runs/one")


class Runner:
    """Starts one and the same command in a directory, and kills or stops it."""

    def __init__(
        self, where: Path, overrides: list[str], environment: dict[str, str], processes: int, by_torchrun: bool
    ) -> None:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        ranks = ["--ranks", str(processes)]
        ours = ["-m", "kha_train"]
        self.command = [sys.executable, *([*torchrun, *ours] if by_torchrun else [*ours, *ranks]), *overrides]
        self.where, self.environment = where, environment
        self.run_dir = where / RUN
        where.mkdir()

    def to_the_end(self) -> None:
        """Run until it ends by itself, well."""
        self._wait(self._start())

    def ended_by(self, number: signal.Signals, after_step: int) -> int:
        """Start, wait until `after_step` is recorded, send the signal, wait for all ranks; the exit code."""
        process = self._start()
        try:
            while self._recorded() < after_step and process.poll() is None:
                time.sleep(0.01)
            assert process.poll() is None, f"ended by itself:\n{process.communicate()[0]}"
            process.send_signal(number)
            # A rank that outlives its launcher keeps the pipe open.
            process.communicate(timeout=120)
            return process.returncode
        finally:
            process.kill()

    def metrics(self) -> list[dict[str, Any]]:
        """The surviving curve without what depends on the clock."""
        lines, timings = read_metrics(self.run_dir), timing_keys(read_run(self.run_dir))
        return [{key: value for key, value in line.items() if key not in timings} for line in lines]

    def final_state(self) -> dict[str, str]:
        """File name -> SHA-256 of the newest checkpoint."""
        step, path = candidates(self.run_dir / "checkpoints")[0]
        assert step == STEPS
        files = json.loads((path / "manifest.json").read_text())["files"]
        return {name: entry["sha256"] for name, entry in files.items()}

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command,
            cwd=self.where,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _wait(self, process: subprocess.Popen[str]) -> None:
        try:
            output = process.communicate(timeout=240)[0]
        finally:
            process.kill()
        assert process.returncode == 0, output

    def _recorded(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture
def runner(tmp_path: Path, small: list[str], clean_environment: dict[str, str]) -> Callable[..., Runner]:
    """`runner(name, *overrides, processes=1, by_torchrun=False)` in a directory of its own, so that every path in a run
    is the same.
    """

    def make(name: str, *overrides: str, processes: int = 1, by_torchrun: bool = False) -> Runner:
        common = [
            *small,
            f"run.dir={RUN}",
            f"run.steps={STEPS}",
            "checkpoint.every_steps=7",
            "validation.every_steps=10",
        ]
        return Runner(tmp_path / name, [*common, *overrides], clean_environment, processes, by_torchrun)

    return make


def test_a_run_killed_twice_equals_one_that_never_was(runner: Callable[..., Runner]) -> None:
    """Two moments that nobody chose. Chosen ones, with every variant, stage, precision and number of micro-batches, are
    in `tests/faults/test_killed.py`."""
    settings = ["engine=zero1", "attention=kha_mlp", "engine.precision=bf16", "model.layers=1"]
    straight, killed = runner("straight", *settings), runner("killed", *settings)
    straight.to_the_end()
    for after_step in (10, 23):
        assert killed.ended_by(signal.SIGKILL, after_step) == -signal.SIGKILL
    killed.to_the_end()

    assert killed.metrics() == straight.metrics()
    assert len(killed.metrics()) == STEPS
    assert killed.final_state() == straight.final_state()
    attempts = read_run(killed.run_dir)["attempts"]
    assert [attempt["start_step"] % 7 for attempt in attempts] == [0, 0, 0]
    assert attempts[1]["start_step"] >= 7 and attempts[2]["start_step"] >= 21
    undone = read_discarded(killed.run_dir)
    assert all(line["step"] > attempts[1]["start_step"] for line in undone)


def test_two_ranks_save_and_end_when_their_launcher_is_killed_and_resume_bit_for_bit(
    runner: Callable[..., Runner],
) -> None:
    settings = ["attention=kha_mlp", "engine=zero2"]
    straight = runner("straight", *settings, processes=2, by_torchrun=True)
    killed = runner("killed", *settings, processes=2)
    straight.to_the_end()
    killed.ended_by(signal.SIGKILL, 16)
    assert has_marker(killed.run_dir, Marker.REQUEUE)
    assert candidates(killed.run_dir / "checkpoints")[0][0] == killed.metrics()[-1]["step"] < STEPS
    killed.to_the_end()
    assert killed.metrics() == straight.metrics()
    assert killed.final_state() == straight.final_state()


def test_a_stop_signal_saves_first_and_the_same_command_goes_on(runner: Callable[..., Runner]) -> None:
    straight, stopped = runner("straight"), runner("stopped")
    straight.to_the_end()
    assert stopped.ended_by(signal.SIGTERM, 11) == 0
    assert (stopped.run_dir / "REQUEUE").exists() and not (stopped.run_dir / "DONE").exists()
    stopped_at = read_metrics(stopped.run_dir)[-1]["step"]
    stopped.to_the_end()
    assert (stopped.run_dir / "DONE").exists() and not (stopped.run_dir / "REQUEUE").exists()
    assert read_run(stopped.run_dir)["attempts"][1]["start_step"] == stopped_at
    assert read_discarded(stopped.run_dir) == []
    assert stopped.metrics() == straight.metrics()
    assert stopped.final_state() == straight.final_state()


def test_a_finished_run_started_again_changes_nothing(runner: Callable[..., Runner]) -> None:
    run = runner("run", "run.steps=3")
    run.to_the_end()
    before = (run.run_dir / "metrics.jsonl").read_bytes()
    run.to_the_end()
    assert (run.run_dir / "metrics.jsonl").read_bytes() == before
    assert (run.run_dir / "DONE").exists()


def test_a_run_says_what_computes_it_and_when_it_goes_on_with_another_backend_of_attention(
    small: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for backend, computing in (("eager", "eager"), ("eager", "eager"), ("sdpa", "sdpa"), ("auto", "sdpa")):
        set_marker(run_dir, Marker.STOP)
        train(compose([*small, "model.layers=1", "run.steps=9", f"run.dir={run_dir}", f"attention.backend={backend}"]))
        assert attention_backend(run_dir) == computing
    chosen = read_run(run_dir)["provenance"]["chosen"]
    assert chosen[0].startswith("attention ") and "experts grouped (chosen by moe.backend)" in chosen
    (event,) = [event for event in read_events(run_dir) if event["kind"] == "attention_backend_changed"]
    assert (event["step"], event["before"], event["now"]) == (2, "eager", "sdpa")
