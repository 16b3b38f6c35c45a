"""Runs every timing benchmark that needs no network, one after another; collects the results or the reasons for
failure.

Each runs in a separate process, with the command a user would type, so that process groups and memory are not carried
over to the next.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kha_train.bench.peers import load_adapters

FULL: dict[str, tuple[str, ...]] = {
    "step": (),
    "attention": (),
    "moe": (),
    "tokenize": (),
    "startup": (),
    "telemetry": (),
    "checkpoint": (),
    "spikes": (),
    "intervals": (),
}
QUICK: dict[str, tuple[str, ...]] = {
    "step": ("model.layers=2", "model.seq_len=64", "data.global_batch_size=4", "--blocks", "3"),
    "attention": ("model.seq_len=64", "--blocks", "3"),
    "moe": ("model.seq_len=64", "--blocks", "3", "--warmup", "1"),
    "tokenize": ("--rounds", "3"),
    "startup": ("--rounds", "1"),
    "telemetry": ("model.layers=2", "data.global_batch_size=4", "--blocks", "3"),
    "checkpoint": ("model.layers=2", "data.global_batch_size=4", "--rounds", "1", "--steps", "2"),
    "spikes": ("--spiky-steps", "2000", "--clean-steps", "1000", "--early-curves", "2"),
    "intervals": ("--simulations", "50"),
}
LIMIT_SECONDS = 1800


def measure(*, quick: bool, against: Sequence[str], peers: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """The result of every benchmark by name. A failed one has the end of its error output as `error`. Raises
    ConfigError, before the first of them, when a peer has no adapter.
    """
    load_adapters(peers, against)
    found: dict[str, Any] = {}
    for name, arguments in (QUICK if quick else FULL).items():
        beside = ("--against", ",".join(against), "--peers", str(peers)) if name in ("step", "moe") and against else ()
        say(f"kha bench {name}")
        found[name] = run_one([name, *arguments, *beside, "--json"])
    return found


def run_one(arguments: Sequence[str], limit: float = LIMIT_SECONDS) -> dict[str, Any]:
    """The result of `kha bench ARGUMENTS` within `limit` seconds, and the time it took."""
    program = "import sys; from kha_train.cli.main import run; run(['bench', *sys.argv[1:]])"
    started = time.perf_counter()
    try:
        ended = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            check=False,
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {limit:.0f} s", "seconds": time.perf_counter() - started}
    seconds = time.perf_counter() - started
    if ended.returncode:
        last = ended.stderr.strip().splitlines()[-1:] or [f"ended with {ended.returncode}"]
        return {"error": last[0], "seconds": seconds, "output": ended.stderr[-4000:]}
    answers = [line for line in ended.stdout.splitlines() if line.startswith("{")]
    if not answers:
        return {"error": "printed no result", "seconds": seconds, "output": ended.stdout[-4000:]}
    return {"answer": json.loads(answers[-1]), "seconds": seconds}


def failed(stages: dict[str, Any]) -> list[str]:
    """The names of the benchmarks that failed."""
    return [name for name, one in stages.items() if "error" in one]


def format_measured(found: dict[str, Any]) -> str:
    """One line per benchmark. The figures are in the JSON; each command alone prints them too."""
    return "\n".join(f"{name:<12} {one['seconds']:6.0f} s  {one.get('error', 'done')}" for name, one in found.items())
