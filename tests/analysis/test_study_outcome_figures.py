"""Figures of one run, from a record written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kha_train.analysis.studies import Measure
from kha_train.analysis.study_outcomes import outcome_of
from kha_train.config.build import to_plain
from kha_train.config.compose import compose
from kha_train.foreign.documents import as_yaml


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of 200 steps of 100 tokens: a calm loss near 3, higher by 0.5 in steps 46 to 50, with one spike of 30
    steps at 5.5.
    """
    lines = []
    for step in range(1, 201):
        loss = 3.0 + 0.01 * (step % 5) + (0.5 if 46 <= step <= 50 else 0.0) + (2.5 if 150 <= step < 180 else 0.0)
        lines.append(
            {
                "step": step,
                "tokens": 100 * step,
                "train/loss": loss,
                "train/step_seconds": 0.5 if step % 2 else 1.5,
                "train/skipped": 0,
                "attempt": 1,
                "samples_first": step,
                "samples_last": step,
            }
        )
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "run.json").write_text(
        json.dumps(
            {
                "run_id": "r",
                "provenance": {"parameters": {"total": 1000, "active": 600}, "code_sha256": "ab" * 32},
                "attempts": [{"attempt": 1, "start_step": 0, "state": "done", "world_size": 1}],
            }
        )
    )
    (tmp_path / "config.yaml").write_text(as_yaml(to_plain(compose(["model=tiny"]))))
    return tmp_path


def test_losses_at_tokens_and_of_the_last_half_are_means_over_those_steps(run_dir: Path) -> None:
    """Steps 46 to 50 lie within 4,500 and 5,000 tokens: 3.5 + 0.02 on average."""
    late, early, beyond = (
        Measure(kind="late_loss"),
        Measure(kind="loss_at", tokens=5000),
        Measure(kind="loss_at", tokens=20_001),
    )
    found = outcome_of(run_dir, [late, early, beyond, Measure(kind="step_seconds")])
    assert found.values["late_loss"] == pytest.approx(3.02 + 2.5 * 30 / 100)
    assert found.values["loss_at_5000_tokens"] == pytest.approx(3.52)
    assert found.values["loss_at_20001_tokens"] is None, "the run ended before"
    assert found.values["step_seconds"] == pytest.approx(1.0)


def test_events_have_their_number_and_their_area_above_the_baseline(run_dir: Path) -> None:
    found = outcome_of(run_dir, [Measure(kind="events"), Measure(kind="spikes"), Measure(kind="area")])
    assert not found.diverged
    assert (found.values["events"], found.values["spikes"]) == (1.0, 1.0)
    assert found.values["area"] == pytest.approx(30 * 2.5, rel=0.05)


def test_the_size_and_the_version_of_the_code_are_those_of_the_record(run_dir: Path) -> None:
    found = outcome_of(run_dir, [Measure(kind="late_loss")])
    assert found.size is not None and found.code == "ab" * 32
    assert (found.size.parameters, found.size.active_parameters, found.size.tokens) == (1000, 600, 20_000)
