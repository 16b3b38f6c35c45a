"""What is shown of a run beside its record: console line, W&B mirror, throughput, meters. Nothing here is fatal."""

from __future__ import annotations

from kha_train.telemetry.console import Console
from kha_train.telemetry.meters import DataWait, MovingAverage, PeakMemory
from kha_train.telemetry.throughput import Peak, Throughput, peak_flops
from kha_train.telemetry.wandb import WandbMirror

__all__ = [
    "Console",
    "DataWait",
    "MovingAverage",
    "Peak",
    "PeakMemory",
    "Throughput",
    "WandbMirror",
    "peak_flops",
]
