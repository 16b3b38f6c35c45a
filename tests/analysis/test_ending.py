"""The summary printed when an attempt ends: the console's last lines, and the summary for W&B."""

from __future__ import annotations

from pathlib import Path

import pytest

from kha_train.analysis.ending import end_of
from kha_train.record import Record

CALM = [3.0] * 120
LOST = [3.0] * 100 + [13.0, 103.0] + [390.0] * 18


@pytest.mark.parametrize(
    ("losses", "ends_with_5", "diverged", "height", "events"),
    [
        (CALM, False, False, 0.0, "0 narrow, 0 wide, 0 unrecovered, 0 open at the end"),
        (LOST, False, True, 387.0, "0 narrow, 0 wide, 0 unrecovered, 1 open at the end"),
        # The record does not know yet how the attempt will end.
        (CALM, True, True, 0.0, "0 narrow, 0 wide, 0 unrecovered, 0 open at the end"),
    ],
)
def test_divergence_stands_beside_the_spikes(
    losses: list[float], ends_with_5: bool, diverged: bool, height: float, events: str, tmp_path: Path
) -> None:
    record = Record.open(tmp_path)
    record.begin_attempt(0)
    (tmp_path / "config.yaml").write_text("run: {name: one}\n")
    for step, loss in enumerate(losses, start=1):
        record.step({"step": step, "tokens": 8 * step, "train/loss": loss})
    ending = end_of(tmp_path, diverged=ends_with_5)
    record.close()
    summary = ending.summary()
    assert (summary["spike/spikes"], summary["spike/diverged"], summary["spike/max_height"]) == (0, diverged, height)
    assert summary["spike/by_class"]["open"]["events"] == int(height > 0)
    rows = dict(ending.rows(120))
    assert (rows["loss events"], rows["diverged"]) == (events, "yes" if diverged else "no")
