"""Plots the loss of a run with its spikes shaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kha_train.analysis.figures import save_shaded
from kha_train.analysis.spikes import LossCurve, SpikeReport
from kha_train.errors import ConfigError
from kha_train.record.files import mark_of
from kha_train.stability.events import CLASSES

SUFFIXES = (".png", ".svg", ".pdf")


def mark_of_plot(curve: LossCurve) -> str:
    """The mark in the metadata of a picture of `curve`; no other picture has it."""
    return mark_of("spikes", [curve.place] if curve.place else [])


def plot_spikes(report: SpikeReport, path: Path) -> Path:
    """Draw `report` into `path` and return it. Raises ConfigError for an unsupported suffix."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError("not a supported picture format", field="--plot", value=str(path), allowed=" ".join(SUFFIXES))
    points = report.curve.points
    steps = np.array([point.step for point in points], dtype=np.float64)
    losses = np.array([point.loss for point in points], dtype=np.float64)
    shades = [(event.start_step, event.end_step, CLASSES.index(event.kind)) for event in report.events]
    counts = ", ".join(f"{report.summary[f'{kind}_total']} {kind}" for kind in CLASSES)
    title = f"{report.curve.label}: {counts} (orange, red, purple, brown){'; DIVERGED' * report.summary['diverged']}"
    mark = mark_of_plot(report.curve)
    save_shaded(path, steps, losses, shades, x_label="step", y_label="loss (nats/token)", title=title, mark=mark)
    return path
