"""Runs read ahead by several processes compare like runs read one by one."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from kha_train.analysis.compare import compare_runs
from kha_train.errors import DataError
from kha_train.operate import ahead
from kha_train.record import columns_twin

OLD_RUNS = Path(__file__).parents[1] / "fixtures" / "old_runs" / "runs"


def test_reading_ahead_changes_no_result_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [tmp_path / name for name in ("gqa", "kha_mlp", "damaged")]
    for run, source in zip(runs, ("gqa", "kha_mlp", "gqa"), strict=True):
        shutil.copytree(OLD_RUNS / source, run)
    (runs[2] / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    expected = compare_runs(runs[:2]).to_dict()
    monkeypatch.setattr(ahead, "WORTH", 0)
    monkeypatch.setattr(ahead.os, "sched_getaffinity", lambda _: {0, 1})
    read = ahead.read_ahead(runs)
    assert list(read.read) == runs[:2]
    with monkeypatch.context() as patch:
        patch.setattr(columns_twin, "open_regular", None)
        assert compare_runs(runs[:2], read.run, read.summary).to_dict() == expected
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        compare_runs(runs, read.run, read.summary)


def _be_killed(path: Path, advance: object) -> None:
    if path.name == "kha_mlp":
        os.kill(os.getpid(), signal.SIGKILL)


def test_runs_whose_reader_was_killed_are_read_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [OLD_RUNS / "gqa", OLD_RUNS / "kha_mlp"]
    monkeypatch.setattr(ahead, "WORTH", 0)
    monkeypatch.setattr(ahead, "processors", lambda: 2)
    monkeypatch.setattr(ahead, "_read", _be_killed)
    read = ahead.read_ahead(runs)
    said = capsys.readouterr().err
    assert read.read == {} and said.count("\n") == 1 and "one after another" in said
    assert len(read.run(runs[1]).columns) > 0


def test_a_system_that_names_noprocessors_of_a_process_allows_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ahead.os, "sched_getaffinity")
    assert ahead.processors() == os.cpu_count()


def test_short_runs_and_one_run_start_no_process(tmp_path: Path) -> None:
    assert ahead.read_ahead([OLD_RUNS / "gqa", OLD_RUNS / "kha_mlp"]).read == {}
    assert ahead.read_ahead([tmp_path / "none", tmp_path / "nothing"]).read == {}
