"""The spikes of a run for display: columns of a table, and the lines of a loss chart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kha_train.record.labels import distinct

SPIKE_COLUMNS = (
    "start_step", "class", "width", "height", "area", "tokens", "lr", "gnorm_peak_ratio", "nonfinite_steps",
    "recovered", "samples_first", "samples_last",
)  # fmt: skip
"""Columns of the table of spikes."""
CHART_POINTS, CHART_SPIKES = 2000, 50
"""Number of points of the loss in the spike chart, and the number of spikes in it (the highest)."""


def spike_chart(
    events: list[dict[str, Any]], losses: Sequence[tuple[int, float]]
) -> tuple[list[str], list[list[tuple[int, float]]]]:
    """Names and points of the lines of a loss chart: the loss with fewer points, and each of the highest spikes with
    all points.
    """
    finite = [(step, loss) for step, loss in losses if math.isfinite(loss)]
    names, details, lines = ["train/loss"], [""], [finite[:: -(-len(finite) // CHART_POINTS) or 1]]
    highest = sorted(events, key=lambda event: event["height"], reverse=True)[:CHART_SPIKES]
    for event in sorted(highest, key=lambda event: event["start_step"]):
        inside = [point for point in finite if event["start_step"] <= point[0] <= event["end_step"]]
        names.append(f"{event['class']} at step {event['start_step']}")
        details.append("rewound" if event.get("rewound") else "kept")
        lines.append(inside[:: -(-len(inside) // CHART_POINTS) or 1])
    # Two events may begin at the same step if a rewind undid one of them; lines of one name would be drawn as one.
    return distinct(names, details), lines
