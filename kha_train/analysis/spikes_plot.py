"""The loss of a run with its spikes shaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kha_train.analysis.figures import Curve, save_shaded
from kha_train.analysis.spikes import SpikeReport
from kha_train.errors import ConfigError
from kha_train.stability.events import CLASSES

SUFFIXES = (".png", ".svg", ".pdf")


def plot_spikes(report: SpikeReport, path: Path) -> Path:
    """Draw `report` into `path` and return it. Raises ConfigError when its suffix names no picture."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError("not a kind of picture", field="--plot", value=str(path), allowed=" ".join(SUFFIXES))
    points = report.curve.points
    steps = np.array([point.step for point in points], dtype=np.float64)
    losses = np.array([point.loss for point in points], dtype=np.float64)
    shades = [(event.start_step, event.end_step, CLASSES.index(event.kind)) for event in report.events]
    counts = ", ".join(f"{report.summary[f'{kind}_total']} {kind}" for kind in CLASSES)
    title = f"{report.curve.label}: {counts} (orange, red, purple, brown){'; DIVERGED' * report.summary['diverged']}"
    save_shaded(path, Curve(steps, 0, raw_N=losses), shades, x_label="step", y_label="loss (nats/token)", title=title)
    return path
