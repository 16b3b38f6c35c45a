"""Measures commands on a run against the length of its record, each command in a separate process.

The runs are synthetic (`made_record`): real lines, repeated with their own loss curves. Seconds are those of the whole
command; in parentheses is the CPU time of all its processes, which other load disturbs less. Memory is the largest sum
of their resident sets, sampled every 50 ms; shared pages count in each process. "First" is without the columns that a
comparison keeps beside a long record, "again" is with them. The start of a resume is its phases up to the end of the
first step; its end is what follows the last step, with a validation and a checkpoint. Twenty runs are two made ones and
links to their files.
"""

from __future__ import annotations

import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kha_train.analysis.report.page import page_in
from kha_train.bench import protocol
from kha_train.bench.made_record import MadeRun, Template
from kha_train.errors import KhaError
from kha_train.record import read_last_metrics, read_run
from kha_train.record.columns_twin import TWIN_FILE
from kha_train.record.reader import METRICS_FILE

RUNS = 20
QUESTIONS = {
    "status 1": "kha status of one run",
    "status 20": "kha status of twenty",
    "compare 2 first": "kha compare of two, first",
    "compare 2 again": "kha compare of two, again",
    "compare 6 first": "kha compare of six, first",
    "compare 6 again": "kha compare of six, again",
    "spikes again": "kha spikes of one, again",
    "start": "start of a resume, to the end of its first step",
    "end": "end of that run, after its last step",
}
GRID = ("seed=0,1,2,3,4,5,6,7,8", "optim.lr=0.0001,0.0002,0.0003,0.0004,0.0005", "attention=gqa,kha_linear")
LOOK_SECONDS = 0.05
COMMAND = (sys.executable, "-c", "from kha_train.cli.main import run; run()")


class Cost(NamedTuple):
    """Wall seconds, CPU seconds, and MiB."""

    seconds: float
    cpu_seconds: float
    mib: float


def measure(steps: Sequence[int], asked: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Seconds and MiB of every command for records of the given numbers of `steps`, bytes of a comparison's page, and
    seconds per point to validate a sweep. `asked` holds prefixes of the names of the measurements; empty means all.

    Raises KhaError when a command fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        template = Template(root)
        found: dict[str, Any] = {"environment": protocol.environment(torch.device("cpu")), "steps": {}}
        for count in steps:
            say(f"records of {count:,} steps")
            found["steps"][count] = _of_length(template, root / str(count), count, asked)
            shutil.rmtree(root / str(count))
        if _is_asked("sweep", asked):
            say("sweep")
            found["sweep_point_seconds"] = _sweep_point(root, template.overrides)
    return found


def format_measured(found: dict[str, Any]) -> str:
    """The figures and their protocol, as text."""
    lengths = list(found["steps"])
    rows = [["", *(f"{count:,} steps" for count in lengths)]]
    for name, words in QUESTIONS.items():
        cells = [_told(found["steps"][count].get(name)) for count in lengths]
        rows += [[words, *cells]] if any(cells) else []
    for name, words in (("page_bytes", "page of six"), ("record_bytes", "record")):
        sizes = [found["steps"][count].get(name) for count in lengths]
        rows += [[words, *(f"{size / 1e6:.2f} MB" for size in sizes)]] if all(sizes) else []
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    point = found.get("sweep_point_seconds")
    table += [] if point is None else ["", f"a point of a sweep validated: {point:.3f} s of CPU time"]
    return "\n".join([__doc__ or "", protocol.told(found["environment"]), "", *table])


def _told(cost: dict[str, float] | None) -> str:
    if cost is None:
        return ""
    return f"{cost['seconds']:.2f} s ({cost['cpu_seconds']:.2f}), {cost['mib']:.0f} MiB"


def _is_asked(name: str, asked: Sequence[str]) -> bool:
    return not asked or name.startswith(tuple(asked))


def _of_length(template: Template, folder: Path, steps: int, asked: Sequence[str]) -> dict[str, Any]:
    made = [template.make(folder / f"run{number}", steps, seed=number) for number in range(2)]
    runs = [run.run_dir for run in made]
    for number in range(len(made), RUNS):
        runs.append(folder / f"run{number}")
        shutil.copytree(runs[number % len(made)], runs[-1], copy_function=os.link)
    named = [str(run) for run in runs]
    pages = {number: folder / f"report{number}" for number in (2, 6)}
    commands = {
        "status 1": ["status", *named[:1]],
        "status 20": ["status", *named],
        "compare 2 first": ["compare", *named[:2], "--out", str(pages[2])],
        "compare 2 again": ["compare", *named[:2], "--out", str(pages[2])],
        "compare 6 first": ["compare", *named[:6], "--out", str(pages[6])],
        "compare 6 again": ["compare", *named[:6], "--out", str(pages[6])],
        "spikes again": ["spikes", *named[:1]],
    }
    costs = {}
    for name, arguments in commands.items():
        for run in runs if name.endswith("first") else ():
            (run / TWIN_FILE).unlink(missing_ok=True)
        if _is_asked(name, asked):
            costs[name] = _cost(arguments)
    page = page_in(pages[6])
    sizes = {"record_bytes": (runs[0] / METRICS_FILE).stat().st_size}
    sizes |= {"page_bytes": page.stat().st_size} if page.exists() else {}
    # Its record grows, and so do those that link to it.
    if _is_asked("start", asked) or _is_asked("end", asked):
        costs |= _resume(made[0])
    return {name: cost._asdict() for name, cost in costs.items()} | sizes


def _resume(made: MadeRun) -> dict[str, Cost]:
    """Start and end of a resume of two steps; CPU time and memory cover the whole resume."""
    whole = _cost(["train", *made.overrides])
    ended = time.time()
    last = read_last_metrics(made.run_dir)[-1]
    start = sum(read_run(made.run_dir)["startup_seconds"].values())
    return {"start": whole._replace(seconds=start), "end": whole._replace(seconds=ended - last["time"])}


def _sweep_point(root: Path, overrides: Sequence[str]) -> float:
    """CPU seconds that each further point adds to `kha sweep --print`."""
    settings = [setting for setting in overrides if not setting.startswith("run.")]
    seconds = [
        _cost(["sweep", "--print", "--name", "points", "--dir", str(root), *settings, *grid]).cpu_seconds
        for grid in ([setting.partition(",")[0] for setting in GRID], GRID)
    ]
    points = math.prod(setting.count(",") + 1 for setting in GRID)
    return (seconds[1] - seconds[0]) / (points - 1)


def _cost(arguments: Sequence[str]) -> Cost:
    """Raises KhaError when the command fails."""
    with tempfile.TemporaryFile() as said:
        started, before = time.perf_counter(), _children_seconds()
        process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=said)
        peak = 0
        while process.poll() is None:
            peak = max(peak, sum(map(_resident, _family(process.pid))))
            time.sleep(LOOK_SECONDS)
        seconds = time.perf_counter() - started
        if process.returncode:
            said.seek(0)
            words = said.read().decode(errors="replace").strip()[-500:]
            raise KhaError(f"kha {arguments[0]} ended with {process.returncode}: {words}")
    return Cost(seconds, _children_seconds() - before, peak / 2**20)


def _children_seconds() -> float:
    """CPU time of all ended child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _family(process: int) -> list[int]:
    """The process and all its descendants."""
    try:
        threads = list(Path(f"/proc/{process}/task").iterdir())
        children = [int(child) for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:
        return []
    return [process, *(one for child in children for one in _family(child))]


def _resident(process: int) -> int:
    """Its resident set in bytes; 0 when it has ended."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0
