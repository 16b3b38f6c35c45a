"""Files of a run directory written by something else: read with their intended meaning, or refused with file, line and
field.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from kha_train.errors import DataError
from kha_train.record import (
    Marker,
    Record,
    clear_marker,
    first_failure,
    has_marker,
    read_discarded,
    read_events,
    read_metrics,
    read_owner,
    read_run,
    set_marker,
)
from kha_train.record.record import NAMES
from kha_train.record.rewind import DISCARDED_FILE, INTENT_FILE, METRICS_FILE


def lines(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path.parent


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of six steps, the last two of them undone and computed again."""
    record = Record.open(tmp_path)
    record.begin_attempt(0)
    for step in range(1, 7):
        record.step({"step": step, "train/loss": 1.0 / step})
    record.close("failed")
    record = Record.open(tmp_path)
    record.begin_attempt(4)
    for step in (5, 6):
        record.step({"step": step, "train/loss": math.nan if step == 5 else 1.0})
    record.close("done")
    return tmp_path


@pytest.mark.parametrize(
    "wrong, place",
    [
        ({"train/loss": 1.0}, ":2 step"),
        ({"step": "2"}, ":2 step"),
        ({"step": True}, ":2 step"),
        ({"step": 10**30}, ":2 step"),
        ({"step": 1}, ":2 step"),
        ({"step": 2, "train/loss": "low"}, ":2 train/loss"),
        ({"step": 2, "train/loss": None}, ":2 train/loss"),
        ({"step": 2, "train/loss": [1.0]}, ":2 train/loss"),
        ({"step": 2, "train/loss": 10**400}, ":2 train/loss"),
        ({"step": 2, "tokens": 1.5}, ":2 tokens"),
        ({"step": 2, "samples_first": "nan"}, ":2 samples_first"),
        ({"step": 2, "moe/maxvio_by_layer": [1.0, "x"]}, ":2 moe/maxvio_by_layer"),
    ],
)
def test_a_metrics_line_that_is_none_is_refused_by_line_and_field(tmp_path: Path, wrong: Any, place: str) -> None:
    lines(tmp_path / METRICS_FILE, {"step": 1, "train/loss": 2.0}, wrong, {"step": 30})
    with pytest.raises(DataError) as caught:
        read_metrics(tmp_path)
    assert f"{METRICS_FILE}{place}" in str(caught.value)


def test_what_a_later_release_adds_is_kept_and_its_words_for_numbers_are_floats(tmp_path: Path) -> None:
    later = {"step": 1, "train/loss": "nan", "later/name": "text", "later/list": [{"a": None}]}
    lines(tmp_path / METRICS_FILE, later, {"step": 2, "train/loss": "-inf"})
    first, second = read_metrics(tmp_path)
    assert math.isnan(first.pop("train/loss")) and first == {key: later[key] for key in first}
    assert second["train/loss"] == -math.inf
    lines(tmp_path / "events.jsonl", {"kind": "later", "id": "a", "step": 1, "attempt": 1, "time": 2.0, "more": [1]})
    assert read_events(tmp_path)[0]["more"] == [1]
    lines(tmp_path / "events.jsonl", {"kind": "rewind", "window": [1, 2]})
    assert read_events(tmp_path)[0]["window"] == [1, 2]


@pytest.mark.parametrize(
    "event, place",
    [
        ({"step": 1}, "kind"),
        ({"kind": ["x"]}, "kind"),
        ({"kind": "x", "step": -1}, "step"),
        ({"kind": "x", "step": "1"}, "step"),
        ({"kind": "rewind", "window": [1, "2"]}, "window[1]"),
        ({"kind": "rewind", "window": [1, 2, 3]}, "window"),
        ({"kind": "checkpoint_saved", "stall_seconds": "1"}, "stall_seconds"),
        ({"kind": "spike_opened", "evidence": {"router": 5}}, "evidence.router"),
        ({"kind": "spike_opened", "baseline": "low"}, "baseline"),
        ({"kind": "spike_closed", "start_step": 5, "end_step": -1}, "end_step"),
    ],
)
def test_an_event_that_is_none_is_refused_by_line_and_field(tmp_path: Path, event: Any, place: str) -> None:
    lines(tmp_path / "events.jsonl", {"kind": "attempt_started"}, event)
    with pytest.raises(DataError) as caught:
        read_events(tmp_path)
    assert f"events.jsonl:2 {place}" in str(caught.value)


@pytest.mark.parametrize(
    "content, place",
    [
        ([1], "run.json"),
        ({}, "attempts"),
        ({"attempts": {}}, "attempts"),
        ({"attempts": [1]}, "attempts[0]"),
        ({"attempts": [{"attempt": 1, "started": "now", "state": "done"}]}, "attempts[0].started"),
        ({"attempts": [{"attempt": 1, "started": 1.0, "state": 3}]}, "attempts[0].state"),
        ({"attempts": [{"attempt": 1, "started": 1.0, "state": "x", "changed": []}]}, "attempts[0].changed"),
        ({"attempts": [], "provenance": {"parameters": {"total": "many"}}}, "provenance.parameters"),
        ({"attempts": [], "format": 2}, "format"),
    ],
)
def test_a_run_file_that_is_none_is_refused_by_field(tmp_path: Path, content: Any, place: str) -> None:
    lines(tmp_path / "run.json", content)
    with pytest.raises(DataError) as caught:
        read_run(tmp_path)
    assert place in str(caught.value)
    with pytest.raises(DataError):
        Record.open(tmp_path)
    assert not (tmp_path / "owner.json").exists(), "a start that is refused lets go of the directory"


def test_what_a_later_release_keeps_in_run_json_survives_a_start(run_dir: Path) -> None:
    run = json.loads((run_dir / "run.json").read_text())
    run |= {"later": {"x": [1]}, "lone": "\ud800"}
    run["attempts"][0]["later"] = "y"
    (run_dir / "run.json").write_text(json.dumps(run))
    record = Record.open(run_dir)
    record.begin_attempt(6)
    record.close("done")
    kept = read_run(run_dir)
    assert kept["later"] == {"x": [1]} and kept["attempts"][0]["later"] == "y" and kept["lone"] == "\ud800"


@pytest.mark.parametrize("content", [b"[1]", b'{"restart": "x"}', b'{"process": "one"}', b'{"host": 1}', b"3"])
def test_an_owner_that_is_none_is_refused_and_the_directory_is_not_taken(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "owner.json").write_bytes(content)
    with pytest.raises(DataError, match=r"owner\.json.*fix: remove it if no process is training here"):
        read_owner(tmp_path)
    with pytest.raises(DataError):
        Record.open(tmp_path)
    assert (tmp_path / "owner.json").read_bytes() == content


def test_a_failure_file_that_is_none_is_refused_and_a_torn_one_passed_over(tmp_path: Path) -> None:
    (tmp_path / "errors").mkdir()
    (tmp_path / "errors" / "rank-00000.json").write_text('{"rank": 0, "ti')
    lines(tmp_path / "errors" / "rank-00001.json", {"rank": 1, "time": 2.0, "error": "disk", "later": 1})
    failure = first_failure(tmp_path)
    assert failure is not None and failure["error"] == "disk" and failure["traceback"] == ""
    lines(tmp_path / "errors" / "rank-00002.json", [1])
    with pytest.raises(DataError, match=r"rank-00002\.json"):
        first_failure(tmp_path)


@pytest.mark.parametrize("name", [*NAMES, ".lock"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["directory", "fifo"])
def test_something_else_under_the_name_of_a_file_is_refused_and_left(tmp_path: Path, name: str, make: Any) -> None:
    make(tmp_path / name)
    with pytest.raises(DataError, match="where a file is expected"):
        Record.open(tmp_path)
    assert (tmp_path / name).exists() and not (tmp_path / name).is_file()


@pytest.mark.parametrize("marker", Marker)
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: (path / "deep").mkdir(parents=True)])
def test_a_marker_that_is_no_file_stops_a_run_and_ends_none_and_is_replaced(
    tmp_path: Path, marker: Marker, make: Any
) -> None:
    make(tmp_path / marker.value)
    assert has_marker(tmp_path, marker) == (marker is Marker.STOP)
    set_marker(tmp_path, marker, "text")
    assert has_marker(tmp_path, marker) and (tmp_path / marker.value).read_text() == "text\n"
    clear_marker(tmp_path, marker)
    make(tmp_path / marker.value)
    clear_marker(tmp_path, marker)
    assert not has_marker(tmp_path, marker)
    kept = [path for path in tmp_path.rglob("*") if path.name == "deep"]
    assert len(kept) == (2 if make not in (Path.mkdir, os.mkfifo) else 0), "what was in a directory is kept"


@pytest.mark.parametrize(
    "change",
    [
        {"metrics_size": 0},
        {"metrics_size": 3},
        {"lines": 5},
        {"step": 1},
        {"step": 6},
        {"discarded_size": 0},
        {"discarded_size": 5},
        {"discarded_size": 10**9},
        {"metrics_size": "0"},
        {"note": [1]},
        {"lines": None},
    ],
)
def test_a_rewind_that_is_not_about_these_files_changes_neither(run_dir: Path, change: dict[str, Any]) -> None:
    metrics, discarded = run_dir / METRICS_FILE, run_dir / DISCARDED_FILE
    before = metrics.read_bytes(), discarded.read_bytes()
    cut = sum(len(line) + 1 for line in before[0].split(b"\n")[:4])
    right = {"id": "x", "step": 4, "lines": 2, "metrics_size": cut, "discarded_size": len(before[1]), "note": {}}
    lines(run_dir / INTENT_FILE, {**right, **change})
    with pytest.raises(DataError, match=r"\.metrics\.rewind\.json"):
        Record.open(run_dir)
    assert (metrics.read_bytes(), discarded.read_bytes()) == before
    lines(run_dir / INTENT_FILE, right)
    Record.open(run_dir).close()
    assert [line["step"] for line in read_metrics(run_dir)] == [1, 2, 3, 4]
    assert [line["step"] for line in read_discarded(run_dir)] == [5, 6, 5, 6]
