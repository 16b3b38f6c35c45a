"""The status of runs, from their directories alone: alive or not, progress, speed, and share of productive time."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from kha_train.checkpoint.layout import FOLDER
from kha_train.checkpoint.loss import lost_checkpoints
from kha_train.config.batch_sizes import BatchSizes
from kha_train.config.build import flatten
from kha_train.config.compose import load_plain
from kha_train.errors import KhaError
from kha_train.record import (
    Marker,
    first_failure_line,
    has_marker,
    heartbeat_age,
    read_last_metrics,
    read_marker,
    read_run,
)
from kha_train.record.actions import count_actions
from kha_train.record.goodput import goodput_of
from kha_train.record.totals import Totals, known_totals
from kha_train.telemetry.meters import STEADY_STEPS, WARM_UP_STEPS

State = Literal["done", "running", "silent", "requeue", "fatal", "ended", "queued", "new", "unreadable"]
"""`done`: all steps are trained. `running`: its process was heard of in the last `SILENT_AFTER` seconds. `silent`:
started, not ended, not heard of since then: killed, or its machine is gone. `requeue`: stopped in good order and saved;
the same command continues. `fatal`: ended by an error that would happen again. `ended`: ended by an error that need not
happen again; the same command continues from the newest checkpoint. `queued`: waits in SLURM's queue. `new`: not
started. `unreadable`: a file of its record is damaged; the note names it."""
SILENT_AFTER = 30.0
RECENT = 20


@dataclass(frozen=True)
class RunStatus:
    """One run. Values the run has not recorded yet are None.

    `loss`, `tokens_per_second` and `mfu` are medians of the last 20 steps. `seconds_left` is the number of rows left
    times the mean wall time of a row in those of the last attempt without its first two steps, saving and validating
    included.
    `goodput` is the productive share of time (`record.goodput`). `spikes` counts narrow and wide loss spikes so far.
    `diverged`: the divergence guard fired, the last attempt ended with exit code 5, or a loss event was open when the
    run ended. `heartbeat` is the number of seconds since the process was heard of, `idle` since its last step. `note`
    says why the run ended and which rank failed first.
    """

    name: str
    path: str
    state: State
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    seconds_left: float | None = None
    spikes: int = 0
    diverged: bool = False
    attempts: int = 0
    goodput: float | None = None
    checkpoint: int | None = None
    heartbeat: float | None = None
    idle: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def run_status(path: Path, name: str | None = None, queued: bool = False) -> RunStatus:
    """The run in directory `path`, which may not exist yet; `queued` says that SLURM holds a job for it.

    Raises DataError when its record is damaged.
    """
    config = flatten(load_plain(path / "config.yaml"))
    lines, run = read_last_metrics(path, RECENT), read_run(path)
    attempts = run.get("attempts", [])
    totals = known_totals(path)
    steps = config.get("run.steps")
    parent = run.get("parent")
    step = lines[-1]["step"] if lines else parent["step"] if parent else 0
    now = time.time()
    last = lines[-1].get("time") if lines else None
    return RunStatus(
        name=name or str(config.get("run.name") or path.name),
        path=str(path),
        state=(state := _state(path, attempts, queued)),
        step=step,
        steps=steps,
        loss=_median(lines, "train/loss"),
        tokens_per_second=_median(lines, "train/tokens_per_second"),
        mfu=_median(lines, "train/mfu"),
        seconds_left=_seconds_left(lines, step, steps, attempts, BatchSizes.of_saved(config)),
        spikes=_spikes(lines[-1]) if lines else 0,
        diverged=_diverged(path, lines, attempts, state, totals),
        attempts=len(attempts),
        goodput=_goodput(totals, run),
        checkpoint=newest_checkpoint(path),
        heartbeat=heartbeat_age(path),
        idle=None if last is None else now - last,
        note=_note(path),
    )


def status_or_fault(
    path: Path, name: str | None = None, queued: bool = False
) -> tuple[RunStatus, KhaError | OSError | None]:
    """As `run_status`, but a damaged run gives a row with state `unreadable` and the reason, so that the table is still
    shown.
    """
    try:
        return run_status(path, name, queued), None
    except (KhaError, OSError) as error:
        return unreadable(path, name or path.name, error)


def unreadable(path: Path, name: str, error: KhaError | OSError) -> tuple[RunStatus, KhaError | OSError]:
    """The row of a run that `error` makes unreadable."""
    text = error.line() if isinstance(error, KhaError) else str(error)
    return RunStatus(name=name, path=str(path), state="unreadable", note=text), error


def newest_checkpoint(run_dir: Path) -> int | None:
    """The step of the newest published checkpoint, not verified; None without one."""
    names = [path.name.removeprefix("step-") for path in (run_dir / FOLDER).glob("step-*")]
    return max((int(name) for name in names if name.isdecimal()), default=None)


def _state(path: Path, attempts: list[dict[str, Any]], queued: bool) -> State:
    if has_marker(path, Marker.DONE):
        return "done"
    age = heartbeat_age(path)
    if age is not None and age < SILENT_AFTER:
        return "running"
    if queued:
        return "queued"
    if has_marker(path, Marker.FATAL):
        return "fatal"
    if has_marker(path, Marker.REQUEUE):
        return "requeue"
    if not attempts:
        return "new"
    return "silent" if attempts[-1]["state"] == "running" else "ended"


def _spikes(line: dict[str, Any]) -> int:
    """Narrow and wide events up to a metrics line; all events where it does not distinguish them."""
    if "spike/narrow_total" not in line:
        return int(line.get("spike/events_total", 0))
    return int(line["spike/narrow_total"] + line.get("spike/wide_total", 0))


def _goodput(totals: Totals | None, run: dict[str, Any]) -> float | None:
    """Goodput. For a long record without up-to-date totals: the value of the last end, if nothing came after it."""
    attempts = run.get("attempts", [])
    if totals is not None:
        spent = goodput_of(totals, attempts)
        return spent.share if spent else None
    said = run.get("goodput", {}).get("goodput") if attempts and attempts[-1]["state"] != "running" else None
    return said if isinstance(said, float) else None


def _diverged(
    path: Path,
    lines: list[dict[str, Any]],
    attempts: list[dict[str, Any]],
    state: State,
    totals: Totals | None,
) -> bool:
    """Whether the run diverged. An open event may still close while the run may continue, so it counts only after the
    run has ended.
    """
    is_open = bool(lines) and state in ("done", "fatal", "ended") and bool(lines[-1].get("spike/open"))
    ended_so = bool(attempts) and attempts[-1]["state"] == "diverged"
    fired = bool(totals.diverged) if totals is not None else count_actions(path, ("divergence",))["divergence"] > 0
    return is_open or ended_so or fired


def _note(path: Path) -> str:
    said = read_marker(path, Marker.FATAL)
    first = first_failure_line(path)
    # Usually this is the attempt that marked the run.
    return "; ".join(filter(None, ["" if said in first else said, first, _lost(path)]))


def _lost(path: Path) -> str:
    """Why resuming an unfinished run would be refused."""
    return "" if has_marker(path, Marker.DONE) else lost_checkpoints(path)


def _median(lines: list[dict[str, Any]], key: str) -> float | None:
    values = [line[key] for line in lines if math.isfinite(line.get(key, math.nan))]
    return statistics.median(values) if values else None


def _seconds_left(
    recent: list[dict[str, Any]], step: int, steps: int | None, attempts: list[dict[str, Any]], sizes: BatchSizes
) -> float | None:
    """From the steps of the last attempt without its first two: pauses between attempts and compilation do not
    count.
    """
    began = attempts[-1].get("start_step", 0) if attempts else 0
    own = [line for line in recent if line.get("attempt", 1) >= len(attempts) and line["step"] > began + WARM_UP_STEPS]
    if steps is None or len(own) < STEADY_STEPS or any("time" not in line for line in own):
        return None
    seconds: float = max(0.0, own[-1]["time"] - own[0]["time"])
    return sizes.total(step + 1, steps) * seconds / sizes.total(own[0]["step"] + 1, own[-1]["step"])
