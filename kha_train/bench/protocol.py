"""The timing protocol: arms take turns, each block is compared with the blocks beside it, and the environment is
reported.

An arm is a function that does one step. In every block each arm does `steps` steps. The order of arms is reversed from
block to block, so that neither warm-up nor load on the machine favours an arm. A ratio belongs to one block; the result
is the median over blocks, with its exact interval. On CUDA the time of a block is measured between two events, and the
host waits for the device only at its end. On a CPU it is wall time, or the CPU time of the process, which other load
disturbs less.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from kha_train.config.compose import dump
from kha_train.config.schema import RunConfig
from kha_train.record.provenance import collect_provenance

Clock = Literal["wall", "process"]
MIN_BLOCKS = 6
"""Blocks needed for an interval of a median: all of five lie on one side of the true median once in 16 times."""
PEERS = ("triton", "transformers", "flash_attn", "megablocks")


@dataclass(frozen=True)
class Timing:
    """Seconds of one step: median, 10th and 90th percentile over blocks."""

    seconds: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Ratio:
    """Time relative to the base arm: the median over blocks, and the 95 % interval of that median, None with fewer than
    `MIN_BLOCKS` blocks.
    """

    ratio: float
    low: float | None
    high: float | None


def interleave(
    arms: Mapping[str, Callable[[], object]],
    *,
    blocks: int,
    steps: int = 1,
    warmup: int = 1,
    device: torch.device,
    clock: Clock = "wall",
) -> dict[str, list[float]]:
    """Seconds per step of every arm, one figure per block, after `warmup` steps of each that do not count."""
    for step in arms.values():
        for _ in range(warmup):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for block in range(blocks):
        for name in list(arms)[:: -1 if block % 2 else 1]:
            seconds[name].append(_timed(arms[name], steps, device, clock) / steps)
    return seconds


def timing(seconds: list[float]) -> Timing:
    """The figures of one arm."""
    p10, median, p90 = np.percentile(seconds, [10, 50, 90])
    return Timing(float(median), float(p10), float(p90))


def compare(seconds: list[float], base: list[float]) -> Ratio:
    """`seconds` over `base`, block by block. An arm over itself is 1 for any number of blocks.

    The interval lies between the k-th smallest and the k-th largest ratio, for the largest k with which it covers the
    true median in at least 95 % of cases for any distribution of ratios (binomial with probability 1/2).
    """
    if list(seconds) == list(base):
        return Ratio(1.0, 1.0, 1.0)
    ratios = np.sort(np.asarray(seconds) / np.asarray(base))
    blocks, median = len(ratios), float(np.median(ratios))
    if blocks < MIN_BLOCKS:
        return Ratio(median, None, None)
    outside, beyond = 0, 0
    while 2 * (beyond + math.comb(blocks, outside)) <= 0.05 * 2**blocks:
        beyond += math.comb(blocks, outside)
        outside += 1
    return Ratio(median, float(ratios[outside - 1]), float(ratios[-outside]))


def shown(ratio: Mapping[str, float | None], blocks: int, digits: int = 3) -> str:
    """A `Ratio`, in the form of `plain`, as text."""
    value, low, high = (ratio[name] for name in ("ratio", "low", "high"))
    if low is None or high is None:
        return f"{value:.{digits}f} (no interval: {blocks} blocks, {MIN_BLOCKS} needed)"
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def environment(device: torch.device) -> dict[str, Any]:
    """Date, device and versions of a measurement; printed beside every figure."""
    known = collect_provenance()
    versions = known["versions"] | {name: found for name in PEERS if (found := _version(name))}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": _device(device),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "versions": {**versions, "python": known["python"], "torch": torch.__version__},
        "git": known["git"],
        "command": known["command"],
    }


def config_hash(config: RunConfig) -> str:
    """A twelve-digit hash of the settings."""
    return hashlib.sha256(dump(config).encode()).hexdigest()[:12]


def told(about: dict[str, Any]) -> str:
    """An `environment` in one line."""
    device, versions = about["device"], about["versions"]
    commit = (about["git"] or {}).get("commit") or "no checkout"
    return (
        f"{about['date']}, {device['name']}, {about['threads']} threads, load {about['load']}, "
        f"torch {versions['torch']}, commit {commit[:10]}"
    )


def plain(figure: Timing | Ratio) -> dict[str, float | None]:
    """A figure as JSON values."""
    return asdict(figure)


def _timed(step: Callable[[], object], steps: int, device: torch.device, clock: Clock) -> float:
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(steps):
            step()
        last.record()
        torch.cuda.synchronize(device)
        milliseconds: float = first.elapsed_time(last)
        return milliseconds / 1000
    read = time.process_time if clock == "process" else time.perf_counter
    started = read()
    for _ in range(steps):
        step()
    return read() - started


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device(device: torch.device) -> dict[str, Any]:
    """The device's name; on CUDA also capability, driver, clocks and power, if the driver's tool reports them."""
    if device.type != "cuda":
        return {"name": _processor(), "cores": os.cpu_count()}
    found: dict[str, Any] = {
        "name": torch.cuda.get_device_name(device),
        "capability": list(torch.cuda.get_device_capability(device)),
        "cuda": torch.version.cuda,
    }
    fields = "driver_version,clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return found
    return found | dict(zip(fields.split(","), answer.splitlines()[0].split(", "), strict=False))


def _processor() -> str:
    """The name of the processor; its type where the system does not give a name."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
