"""The cost of monitoring a run is measured on real steps."""

from __future__ import annotations

import pytest

from kha_train.bench.telemetry import format_measured, measure

pytestmark = pytest.mark.slow


def test_the_share_is_the_sum_of_the_parts_over_a_bare_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    tiny = ["model.layers=1", "model.seq_len=32", "data.global_batch_size=4", "engine.device=cpu"]
    found = measure([*tiny, "stability.probe_every=50", "telemetry.peak_tflops=0.1"], blocks=5)
    watching = found.judge_seconds + found.line_seconds + found.report_seconds + found.probe_seconds / 50
    assert found.share == pytest.approx(watching / found.step_seconds)
    assert min(found.judge_seconds, found.line_seconds, found.report_seconds, found.step_seconds) > 0
    assert "probe, one in 50 steps" in format_measured(found)
