"""What a run says of itself: first to its record, then to the console and W&B."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from kha_train import compose
from kha_train.errors import MachineError
from kha_train.record import Record, read_events, read_last_metrics
from kha_train.train.reporter import Journal, Reporter, headline


@pytest.fixture
def reporter(tmp_path: Path) -> Reporter:
    """A reporter on a record that is open, with mirrors that note their calls."""
    record = Record.open(tmp_path / "run")
    record.begin_attempt(0)
    parts: dict[str, Any] = {name: Mock() for name in ("console", "sinks", "profiler", "memory", "throughput")}
    yield Reporter(Journal(record), **parts, metrics=(), startup=None)
    record.close()


def fail(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_record_that_cannot_be_written_raises_nothing_and_keeps_the_first_trouble(
    reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(reporter.record, "event", fail)
        patch.setattr(reporter.record, "step", fail)
        reporter.happened("divergence", 1, loss=9.0, norm=1.0)
        first = reporter.trouble
        assert isinstance(first, MachineError) and "write the record" in str(first)
        reporter.report({"step": 1}, [])
        assert reporter.trouble is first


def test_a_defect_in_writing_the_record_is_no_trouble_of_the_machine(
    reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(reporter.record, "event", Mock(side_effect=ZeroDivisionError))
        reporter.happened("divergence", 1, loss=9.0, norm=1.0)
    assert reporter.trouble is None


def test_a_step_is_shown_only_once_it_is_recorded(reporter: Reporter, monkeypatch: pytest.MonkeyPatch) -> None:
    reporter.report({"step": 1, "train/loss": 2.0}, [("step_discarded", {"reason": "for a test"})])
    assert [line["step"] for line in read_last_metrics(reporter.record.run_dir, 9)] == [1]
    assert [(event["kind"], event["step"]) for event in read_events(reporter.record.run_dir)][-1] == (
        "step_discarded",
        1,
    )
    monkeypatch.setattr(reporter.record, "step", fail)
    reporter.report({"step": 2, "train/loss": 2.0}, [("step_discarded", {"reason": "for a test"})])
    assert [call.args[0]["step"] for call in reporter.console.step.call_args_list] == [1]
    assert [call.args[0]["step"] for call in reporter.sinks.step.call_args_list] == [1]
    assert [event["kind"] for event in read_events(reporter.record.run_dir)].count("step_discarded") == 1


def test_clipping_is_recorded_and_left_out_of_the_rare_events_of_wandb(reporter: Reporter) -> None:
    reporter.happened("zclip", 1, norm=2.0, limit=1.0)
    reporter.happened("divergence", 2, loss=9.0, norm=1.0)
    assert [event["kind"] for event in read_events(reporter.record.run_dir)][-2:] == ["zclip", "divergence"]
    assert [call.args[0]["kind"] for call in reporter.sinks.event.call_args_list] == ["divergence"]
    assert [call.args[0].split(":")[0] for call in reporter.console.warn.call_args_list] == ["step 2"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ([], "ZeRO 2 | "),
        (["engine.expert_parallel=2"], "ZeRO 2, experts shared by 2 ranks | "),
        (["engine.expert_parallel=2", "engine.context_parallel=4"],
         "ZeRO 2, experts shared by 2 ranks, rows shared by 4 ranks | "),
    ],
)  # fmt: skip
def test_a_start_tells_what_ranks_share(settings: list[str], told: str) -> None:
    facts = {"parameters": {"total": 2, "active": 1}, "device": "cpu", "dtype": "fp32", "peak": "nothing"}
    assert told in headline(compose(["engine=zero2", *settings]), 8, None, facts)
