"""Output beside a run's record: console line, W&B mirror, throughput, meters. Nothing here can end a run.

Names are imported on first use: `kha status` formats figures and must not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = {
    "Console": "console",
    "DataWait": "meters",
    "MovingAverage": "meters",
    "Peak": "throughput",
    "PeakMemory": "meters",
    "Throughput": "throughput",
    "WandbMirror": "wandb",
    "peak_flops": "throughput",
}

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


def __getattr__(name: str) -> Any:
    """The public names, imported on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
