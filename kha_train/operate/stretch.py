"""Computes a stretch of a run again, from one saved state to a later step, in a directory of its own.

The run is only read: the stretch begins as a branch of its first checkpoint, which continues as the run would have, bit
for bit, or as the run itself began. The settings are those of the attempt that made its lines. A caller may change them
(one thing, to see what it causes), and may train in this process instead of new ones.

`python -m kha_train.operate.stretch JOB` is what every rank runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from kha_train.analysis.runs import RunData
from kha_train.checkpoint.layout import FOLDER, RING, candidates
from kha_train.checkpoint.reader import verify
from kha_train.config.build import flatten, to_plain
from kha_train.config.compose import from_plain
from kha_train.config.constants import WITHOUT_EFFECT, may_differ
from kha_train.config.schema import RunConfig
from kha_train.distributed import SRUN, TORCHRUN
from kha_train.errors import CheckpointError, DivergedError, KhaError, MachineError
from kha_train.foreign.documents import parse_json
from kha_train.operate.ahead import processors
from kha_train.record import Attempt, config_of, read_attempts, read_last_metrics
from kha_train.record.files import write_json
from kha_train.record.jsonl import decode

POLL_SECONDS = 0.5
MEASURING = ("validation.", "evaluation.", "stability.probe_every", "telemetry.layer_statistics_every")
"""Of the settings without effect on training, those that decide what a line holds."""
FOLDERS = (FOLDER, f"{RING}/{FOLDER}")
"""Where saved states of a run lie."""
CONTENTS = ("data_content_id", "validation_content_id")
WITH_DATA, PATHS = ("data", "validation"), ("train", "validation", "path")
"""Sections of the settings that name datasets, and the keys that hold their directories."""
_ERROR, _LOG = "error.txt", "log.txt"


@dataclass(frozen=True)
class Stretch:
    """The steps `first` + 1 to `last` of a run. They begin with the checkpoint `source` (None: with the beginning of
    the run) and end with the checkpoint `target` (None: between two). `attempt` made the lines, with the settings
    `config`. `obstacle` is the reason, in words, why the stretch cannot be computed here; "": it can.
    """

    run: RunData
    first: int
    last: int
    source: Path | None
    target: Path | None
    attempt: Attempt | None
    config: Mapping[str, Any] | None
    obstacle: str

    @property
    def words(self) -> str:
        """Its run and its steps."""
        return f"{self.run.label}, steps {self.first + 1} to {self.last}"


@dataclass(frozen=True)
class Job:
    """What to train: `config` until the end of step `until`, on `ranks` processes with `threads` each ("": as many as
    torch takes)."""

    config: RunConfig
    until: int
    ranks: int
    threads: str


Launch = Callable[[Job, Path, Callable[[int], None]], None]
"""Trains a job; the second argument is a directory for its files, the third receives the step that is done."""


def stretches(run: RunData) -> list[Stretch]:
    """Every stretch between two neighbouring checkpoints of `run`, the beginning of the run included."""
    attempts = read_attempts(run.path)
    kept = {step: path for step, path in reversed(candidates(run.path / FOLDER)) if step > run.begun_after}
    places: list[tuple[int, Path | None]] = [(run.begun_after, _begin(run)), *sorted(kept.items())]
    return [
        _stretch(run, attempts, first, last, source, target)
        for (first, source), (last, target) in pairwise(places)
        if target is not None
    ]


def leading_to(run: RunData, step: int, last: int, moved: Mapping[str, str]) -> Stretch:
    """The stretch to the step `last` from a state of `run` that is saved and verifies, or else from its beginning. The
    state is the last one before the step before `step`, so that this one is computed too: its batch made the weights of
    `step`. Where these steps cannot be computed, it is the last one before `step`. `moved` is as in `relocated`.
    Raises OSError when a checkpoint cannot be read.
    """
    with_previous = _leading_to(run, step - 1, last, moved)
    return _leading_to(run, step, last, moved) if with_previous.obstacle else with_previous


def _leading_to(run: RunData, step: int, last: int, moved: Mapping[str, str]) -> Stretch:
    saved = [found for folder in FOLDERS for found in candidates(run.path / folder)]
    for at, path in sorted(saved, reverse=True):
        if run.begun_after < at < step:
            with suppress(CheckpointError):
                verify(path)
                return _stretch(run, read_attempts(run.path), at, last, path, None, moved)
    return _stretch(run, read_attempts(run.path), run.begun_after, last, _begin(run), None, moved)


def relocated(config: Mapping[str, Any], moved: Mapping[str, str]) -> dict[str, Any]:
    """Plain settings in which each path of data that begins with a directory of `moved` begins with the new one."""

    def new(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: new(name, one) for name, one in value.items()}
        if isinstance(value, list):
            return [new(key, one) for one in value]
        begins = (old for old in moved if key in PATHS and f"{value}/".startswith(f"{old}/"))
        return next((moved[old] + value[len(old) :] for old in begins), value)

    return {name: new(name, section) if name in WITH_DATA else section for name, section in config.items()}


def missing_data(config: Mapping[str, Any]) -> list[str]:
    """The paths of data in plain settings that are no directories here."""

    def paths(key: str, value: Any) -> Iterator[str]:
        if isinstance(value, Mapping):
            for name, one in value.items():
                yield from paths(name, one)
        elif isinstance(value, list):
            for one in value:
                yield from paths(key, one)
        elif key in PATHS and value:
            yield value

    found = (path for name in WITH_DATA for path in paths(name, config.get(name)))
    return [path for path in found if "://" not in path and not Path(path).is_dir()]


def _begin(run: RunData) -> Path | None:
    """The checkpoint that the run branched off."""
    parent = run.run.get("parent")
    return Path(parent["checkpoint"]) if parent else None


def _stretch(
    run: RunData,
    attempts: Mapping[int, Attempt],
    first: int,
    last: int,
    source: Path | None,
    target: Path | None,
    moved: Mapping[str, str] | None = None,
) -> Stretch:
    inside = (run.steps > first) & (run.steps <= last)
    numbers = sorted({*run.columns.whole("attempt", 1)[inside].tolist()})
    recorded = [config_of(attempts, number) for number in numbers]
    configs = [config if config is None else relocated(config, moved or {}) for config in recorded]
    made = [attempts[number] for number in numbers if number in attempts]
    whole = int(inside.sum()) == last - first
    obstacle = next(_obstacles(run, first, last, whole, made, configs), "")
    if not obstacle and source is not None and not source.is_dir():
        obstacle = f"the state that they begin with is not here: {source}"
    return Stretch(
        run, first, last, source, target, made[0] if made else None, configs[0] if configs else None, obstacle
    )


def _obstacles(
    run: RunData,
    first: int,
    last: int,
    whole: bool,
    attempts: list[Attempt],
    configs: list[dict[str, Any] | None],
) -> Iterator[str]:
    """Why the steps cannot be computed again on this machine."""
    if not whole:
        yield "the record lacks lines of these steps"
    if not attempts or None in configs:
        yield "the settings of these steps were not recorded"
    for event in run.events:
        if event["kind"] == "rewind" and first <= event.get("to_step", 0) < last and event["step"] > first:
            yield f"the run went back inside them, from step {event['step']} to step {event.get('to_step', 0)}"
    settings = [flatten(config or {}) for config in configs]
    changed = {key for one in settings for key in one if one[key] != settings[0].get(key)}
    for name in CONTENTS:
        if len({str(attempt.facts.get(name)) for attempt in attempts}) > 1:
            yield f"the run was restarted inside them with another {name}"
    if matter := sorted(key for key in changed if not may_differ(key, WITHOUT_EFFECT) or may_differ(key, MEASURING)):
        yield f"the run was restarted inside them with another {', '.join(matter)}"
    sizes = {attempt.world_size for attempt in attempts}
    if None in sizes:
        yield "the number of processes was not recorded"
    if len(sizes) > 1:
        yield f"they were computed by {' and then '.join(map(str, sorted(map(str, sizes))))} processes"
    device, size = str(attempts[0].facts.get("device", "cpu")), attempts[0].world_size or 1
    if device != "cpu" and not torch.cuda.is_available():
        yield f"they were computed on {device}, which this machine does not have"
    here = torch.cuda.device_count() if device != "cpu" else processors()
    if size > here:
        yield f"they were computed by {size} processes, and this machine has {here} of what each needs ({device})"
    if missing := missing_data(configs[0] or {}):
        yield f"their data are not here: {', '.join(missing)}"


def configuration(stretch: Stretch, run_dir: Path) -> RunConfig:
    """The settings of `stretch` for a run in `run_dir`: those of its attempt, without W&B, a profile, a ring or
    saves on the way. Raises ConfigError when this release cannot build them.
    """
    assert stretch.config is not None and stretch.attempt is not None, stretch.obstacle
    config = from_plain(dict(stretch.config))
    begun = config.run
    if stretch.source is not None:
        begun = replace(begun, branch_from=str(stretch.source.resolve()), init_from="")
    telemetry = replace(config.telemetry, wandb=replace(config.telemetry.wandb, mode="disabled"), console="quiet")
    return replace(
        config,
        run=replace(begun, dir=str(run_dir), max_minutes=0.0),
        engine=replace(config.engine, device=stretch.attempt.facts.get("device", config.engine.device)),
        checkpoint=replace(config.checkpoint, every_steps=config.run.steps, every_minutes=0, ring_steps=0),
        profile=replace(config.profile, first_step=0, last_step=0),
        telemetry=telemetry,
    )


def compute(
    stretch: Stretch,
    place: Path,
    launch: Launch,
    advance: Callable[[int], None],
    change: Callable[[RunConfig], RunConfig] = lambda config: config,
) -> Path:
    """Compute `stretch` again in the directory `place`, with its settings after `change`; returns the run directory,
    which has its lines and its last checkpoint. `advance` adds to the number of steps that are done.

    Raises KhaError with the reason when training refuses or fails.
    """
    assert not stretch.obstacle and stretch.attempt is not None, stretch.obstacle
    run_dir = place / "run"
    threads = (stretch.attempt.facts.get("environment") or {}).get("OMP_NUM_THREADS", "")
    config = change(configuration(stretch, run_dir))
    job = Job(config, stretch.last, stretch.attempt.world_size or 1, str(threads))
    launch(job, place, _advancing(stretch.first, advance))
    return run_dir


def _advancing(first: int, advance: Callable[[int], None]) -> Callable[[int], None]:
    """Calls `advance` once for every step after `first`, however often a step is reported."""
    done = first

    def watch(step: int) -> None:
        nonlocal done
        advance(max(0, step - done))
        done = max(done, step)

    return watch


def in_processes(job: Job, place: Path, watch: Callable[[int], None]) -> None:
    """Train `job` in new processes on this machine, by the launcher if there are several. Raises MachineError with what
    the training said, or with the last line of its output, if it does not end well; DivergedError if it diverged.
    """
    write_json(place / "job.json", {"config": to_plain(job.config), "until": job.until})
    unset = {*TORCHRUN, *SRUN, "OMP_NUM_THREADS", "KHA_OUTCOME_FILE"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"OMP_NUM_THREADS": job.threads} if job.threads else {}
    launcher = ["-m", "kha_train.operate.launcher", str(job.ranks)] if job.ranks > 1 else []
    command = [sys.executable, *launcher, "-m", __spec__.name, str(place / "job.json")]
    with (place / _LOG).open("wb") as log:
        training = subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        while (code := _ended(training)) is None:
            lines = read_last_metrics(Path(job.config.run.dir))
            watch(lines[-1]["step"] if lines else 0)
    finally:
        if training.poll() is None:
            # The launcher passes it on to its ranks, which save and stop.
            training.terminate()
            training.wait()
    if code:
        told = place / _ERROR
        said = told.read_text(encoding="utf-8") if told.exists() else _last_line(place / _LOG)
        kind = DivergedError if code == DivergedError.exit_code else MachineError
        raise kind(f"training ended with {code}: {said}")


def _ended(training: subprocess.Popen[bytes]) -> int | None:
    try:
        return training.wait(POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def in_this_process(job: Job, place: Path, watch: Callable[[int], None]) -> None:
    """Train `job` here, on one rank. Raises what `train` documents, and MachineError when it was stopped on the way."""
    from kha_train.train.run import train

    outcome = train(job.config, until=job.until)
    if outcome.step < job.until:
        raise MachineError(f"training was stopped after step {outcome.step} of {job.until}")
    watch(job.until)


def _main(path: Path) -> int:
    """What every rank runs: train the job in the file `path`; returns the exit code."""
    job = decode(parse_json(path.read_bytes()))
    try:
        in_this_process(Job(from_plain(job["config"]), job["until"], 1, ""), path.parent, lambda step: None)
    except KhaError as error:
        (path.parent / _ERROR).write_text(error.line(), encoding="utf-8", errors="backslashreplace")
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(_main(Path(sys.argv[1])))
