"""The record survives kill -9, rewinds without losing a line, and reads back what was written, bit for bit."""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kha_train.errors import DataError, RunDirectoryInUse
from kha_train.metric import Metric
from kha_train.record import (
    Marker,
    Record,
    declared_in,
    has_marker,
    read_attempts,
    read_discarded,
    read_events,
    read_metrics,
    read_run,
    set_marker,
    timing_keys,
)
from kha_train.record.jsonl import Appender, decode, encode, repair, to_line
from kha_train.record.provenance import with_version


def line(step: int, loss: float = 2.5) -> dict:
    return {"step": step, "samples_first": 4 * (step - 1), "samples_last": 4 * step - 1, "train/loss": loss / step}


def train(run_dir: Path, start: int, stop: int, state: str = "stopped") -> None:
    record = Record.open(run_dir)
    record.begin_attempt(start, world_size=2)
    for step in range(start + 1, stop + 1):
        record.step(line(step))
    record.close(state)


def without_timing(lines: list[dict]) -> list[dict]:
    timings = timing_keys({})
    return [{key: value for key, value in line.items() if key not in timings} for line in lines]


@given(st.floats(width=64))
def test_every_float_reads_back_bit_for_bit(value: float) -> None:
    back = decode(json.loads(to_line({"x": value})))["x"]
    assert math.isnan(back) if math.isnan(value) else struct.pack("d", back) == struct.pack("d", value)


def test_nonfinite_floats_are_words_that_strict_json_accepts() -> None:
    text = to_line({"a": math.nan, "b": [math.inf, {"c": -math.inf}]}).decode()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": "nan", "b": ["inf", {"c": "-inf"}]}
    assert decode(encode({"b": [math.inf, {"c": -math.inf}]})) == {"b": [math.inf, {"c": -math.inf}]}


@given(st.integers(1, 5), st.data())
@settings(max_examples=60, deadline=None)
def test_a_line_torn_at_any_byte_is_cut_off_and_the_others_stay(tmp_path_factory, count: int, data) -> None:
    path = tmp_path_factory.mktemp("torn") / "x.jsonl"
    lines = [to_line(line(step)) for step in range(1, count + 1)]
    kept = data.draw(st.integers(0, count - 1))
    torn = data.draw(st.integers(0, len(lines[kept]) - 1))
    path.write_bytes(b"".join(lines[:kept]) + lines[kept][:torn])
    appender = Appender(path)
    appender.append(line(9))
    appender.close()
    assert appender.repaired_bytes == torn
    assert path.read_bytes() == b"".join(lines[:kept]) + to_line(line(9))


def test_zero_bytes_left_by_a_power_cut_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(to_line(line(1)) + b"\0\0\0\n\0\0")
    assert repair(path) == 6
    assert path.read_bytes() == to_line(line(1))


@pytest.mark.parametrize(
    ("end", "number"),
    [(b"2\n3\n", 2), (b"[1]\n", 2), (b"[1]", 2), (b"null\n\0\0", 2), (b"{torn\n{torn", 2), (b"x\ny\nz\n", 2)],
)
def test_no_more_than_one_torn_line_is_cut_off(end: bytes, number: int, tmp_path: Path) -> None:
    """What no dying process leaves is somebody's: it is named, by whoever reads or repairs, and stays."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(to_line(line(1)) + end)
    for use in (repair, read_metrics, lambda path: Record.open(path.parent)):
        with pytest.raises(DataError, match=rf"metrics.jsonl:{number} "):
            use(path)
    assert path.read_bytes() == to_line(line(1)) + end


@pytest.mark.parametrize("end", [b"", b"{torn\n", b"{torn", b"\0\0", b"{torn\0\0", b"\n", to_line({"step": 2})[:-1]])
def test_one_torn_line_is_neither_read_nor_kept(end: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(to_line(line(1)) + end)
    assert [entry["step"] for entry in read_metrics(path)] == [1]
    assert repair(path) == len(end) and path.read_bytes() == to_line(line(1))


def test_a_damaged_line_in_the_middle_is_a_data_error_naming_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(to_line(line(1)) + b"{garbage\n" + to_line(line(2)))
    with pytest.raises(DataError, match=r"metrics.jsonl:2"):
        read_metrics(tmp_path)


def test_the_torn_line_of_a_live_run_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(to_line(line(1)) + to_line(line(2))[:-1])
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1]


def test_a_process_killed_while_writing_leaves_a_record_that_opens_and_goes_on(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from kha_train.record import Record\n"
        "record = Record.open(Path(sys.argv[1])); record.begin_attempt(0)\n"
        "for step in range(1, 10**7): record.step({'step': step, 'train/loss': 1 / step})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    metrics = tmp_path / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.stat().st_size < 20_000):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with metrics.open("ab") as file:
        file.write(b'{"step": 99999')
    record = Record.open(tmp_path)
    last = record.last_step
    record.begin_attempt(last)
    record.step({"step": last + 1, "train/loss": 1 / (last + 1)})
    record.close()
    assert without_timing(read_metrics(tmp_path)) == [{"step": s, "train/loss": 1 / s} for s in range(1, last + 2)]
    assert [attempt["state"] for attempt in read_run(tmp_path)["attempts"]] == ["lost", "stopped"]
    assert read_run(tmp_path)["attempts"][0]["end_step"] == last
    assert "torn_line_removed" in {event["kind"] for event in read_events(tmp_path)}


def test_a_resumed_run_keeps_the_lines_of_an_unbroken_one_but_for_timing(tmp_path: Path) -> None:
    train(tmp_path / "unbroken", 0, 10)
    train(tmp_path / "resumed", 0, 7)
    train(tmp_path / "resumed", 4, 6)
    train(tmp_path / "resumed", 5, 10)
    resumed = read_metrics(tmp_path / "resumed")
    assert without_timing(resumed) == without_timing(read_metrics(tmp_path / "unbroken"))
    assert [entry["attempt"] for entry in resumed] == [1] * 4 + [2] + [3] * 5
    discarded = read_discarded(tmp_path / "resumed")
    assert [(entry["step"], entry["attempt"], entry["discarded_by_attempt"]) for entry in discarded] == [
        (5, 1, 2),
        (6, 1, 2),
        (7, 1, 2),
        (6, 2, 3),
    ]
    assert all(entry["discarded_reason"] for entry in discarded)


class Crash(BaseException):
    """Stands for the death of the process: nothing in the code catches it."""


def crash_at(monkeypatch: pytest.MonkeyPatch, point: int, after: bool) -> None:
    """Dies at the `point`-th durable act (write, fsync, truncate, rename, unlink), before or after it is done."""
    acts = iter(range(10**6))

    def wrap(module, name: str) -> None:
        original = getattr(module, name)

        def act(*args, **kwargs):
            now = next(acts) == point
            if now and not after:
                raise Crash
            result = original(*args, **kwargs)
            if now:
                raise Crash
            return result

        monkeypatch.setattr(module, name, act)

    for name in ("fsync", "truncate", "replace"):
        wrap(os, name)
    wrap(Path, "unlink")


@pytest.mark.parametrize("after", [False, True])
def test_a_crash_anywhere_inside_a_rewind_neither_loses_nor_doubles_a_line(tmp_path: Path, after: bool) -> None:
    crashed = 0
    for point in range(40):
        run_dir = tmp_path / str(point)
        train(run_dir, 0, 3)
        train(run_dir, 2, 6)
        record = Record.open(run_dir)
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, point, after)
            try:
                record.rewind_to(4, "test")
            except Crash:
                crashed += 1
        record._lock.close()
        again = Record.open(run_dir)
        moved = again.last_step == 4 or again.rewind_to(4, "test") == 2
        again.close()
        assert moved
        assert [entry["step"] for entry in read_metrics(run_dir)] == [1, 2, 3, 4]
        assert [entry["step"] for entry in read_discarded(run_dir)] == [3, 5, 6]
        kinds = [event["kind"] for event in read_events(run_dir)]
        assert kinds.count("lines_discarded") == 2
        assert len({event["id"] for event in read_events(run_dir)}) == len(kinds)
    assert 5 < crashed < 40


def test_lines_lost_with_the_machine_are_told_as_an_event(tmp_path: Path) -> None:
    train(tmp_path, 0, 3)
    train(tmp_path, 5, 6)
    missing = [event for event in read_events(tmp_path) if event["kind"] == "lines_missing"]
    assert [(event["step"], event["after_step"]) for event in missing] == [(5, 3)]
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3, 6]


def test_a_step_is_never_recorded_twice(tmp_path: Path) -> None:
    record = Record.open(tmp_path)
    record.begin_attempt(0)
    record.step(line(1))
    with pytest.raises(AssertionError, match="already recorded"):
        record.step(line(1))


def test_the_ids_are_made_once_and_every_attempt_is_listed(tmp_path: Path) -> None:
    record = Record.open(tmp_path)
    ids = record.run_id, record.wandb_id
    facts = {"data_content_id": "abc", "parameters": 7}
    assert record.begin_attempt(0, world_size=2, facts=facts) == 1
    record.step(line(1))
    record.close("requeued")
    record = Record.open(tmp_path)
    assert (record.run_id, record.wandb_id) == ids
    assert record.begin_attempt(1, world_size=4, facts={**facts, "data_content_id": "xyz"}) == 2
    record.close("done")
    run = read_run(tmp_path)
    assert run["provenance"]["data_content_id"] == "abc"
    assert run["provenance"]["parameters"] == 7
    assert run["attempts"][1]["changed"] == {"data_content_id": "xyz"}
    assert [(a["start_step"], a["world_size"], a["state"]) for a in run["attempts"]] == [
        (0, 2, "requeued"),
        (1, 4, "done"),
    ]


def test_a_fact_that_a_later_attempt_does_not_have_is_none_of_its_own(tmp_path: Path) -> None:
    for facts in ({"data_content_id": "abc", "evaluations": {"a": 1}}, {"data_content_id": "abc"}):
        record = Record.open(tmp_path)
        record.begin_attempt(record.last_step, facts=facts)
        record.close("requeued")
    changed = [attempt["changed"] for attempt in read_run(tmp_path)["attempts"]]
    assert changed == [{}, {"evaluations": None}]
    assert [attempt.facts["evaluations"] for attempt in read_attempts(tmp_path).values()] == [{"a": 1}, None]


@pytest.mark.parametrize(("start", "branches"), [(0, False), (1, False), (1, True)])
def test_discarded_lines_say_whether_the_run_resumed_or_began_again(tmp_path: Path, start: int, branches: bool) -> None:
    parent = {"run_id": "a", "step": 1, "manifest": "0" * 64, "checkpoint": "a/checkpoints/step-1", "ancestors": []}
    parent = parent if branches else None
    for _ in range(2):
        record = Record.open(tmp_path)
        record.begin_attempt(start, parent=parent)
        record.step(line(2))
        record.close("failed")
    (undone,) = read_discarded(tmp_path)
    resumed = start and not branches
    expected = "resumed from an earlier checkpoint" if resumed else "began again: the run had no checkpoint"
    assert undone["discarded_reason"] == expected


def test_opening_without_beginning_leaves_the_judgement_of_a_lost_attempt_to_the_next_start(tmp_path: Path) -> None:
    record = Record.open(tmp_path)
    record.begin_attempt(0)
    record.step(line(1))
    record._lock.close()
    Record.open(tmp_path).close("failed")
    assert read_run(tmp_path)["attempts"][-1]["state"] == "running"
    train(tmp_path, 1, 2)
    assert [attempt["state"] for attempt in read_run(tmp_path)["attempts"]] == ["lost", "stopped"]


def test_a_new_attempt_removes_the_markers_of_the_last_end_but_not_a_stop_request(tmp_path: Path) -> None:
    for marker in Marker:
        set_marker(tmp_path, marker, "because")
    record = Record.open(tmp_path)
    record.begin_attempt(0)
    record.close()
    assert [marker for marker in Marker if has_marker(tmp_path, marker)] == [Marker.STOP]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    record = Record.open(tmp_path / "run", rank=1)
    record.begin_attempt(0)
    record.step(line(1))
    assert record.event("x", 1) == {}
    assert record.rewind_to(0, "x") == 0
    assert (record.run_id, record.wandb_id, record.attempt) == ("", "", 0)
    record.sync()
    record.close()
    assert not (tmp_path / "run").exists()


def test_a_directory_another_live_process_writes_is_refused_until_it_dies(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from kha_train.record import Record\n"
        "record = Record.open(Path(sys.argv[1])); print('open', flush=True); time.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    owner.stdout.readline()
    with pytest.raises(RunDirectoryInUse, match=f"process {owner.pid}"):
        Record.open(tmp_path)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    Record.open(tmp_path).close()


def test_importing_the_record_imports_neither_torch_nor_wandb() -> None:
    program = "import sys, kha_train.record; print(sorted({'torch', 'wandb', 'omegaconf'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_run_keeps_what_its_attempts_declared_of_their_metrics(tmp_path: Path) -> None:
    toy, other = (
        Metric("toy/size_by_layer", "cm", "size, a list", mirrored=False),
        Metric("toy/age", "s", "", timing=True),
    )
    for metrics in ([toy], [other], []):
        record = Record.open(tmp_path)
        record.begin_attempt(0, metrics=metrics)
        record.close()
    assert declared_in(read_run(tmp_path)) == {metric.name: metric for metric in (toy, other)}
    assert timing_keys(read_run(tmp_path)) == {"toy/age"}


def test_a_run_that_declared_nothing_is_read_by_the_table_of_older_runs(tmp_path: Path) -> None:
    train(tmp_path, 0, 1)
    run = read_run(tmp_path)
    assert "metrics" not in run
    assert declared_in(run)["train/loss"].unit == "nats/token" and not declared_in(run)["moe/load_cv_by_layer"].mirrored
    assert {"time", "attempt", "train/mfu"} < timing_keys(run) and "train/loss" not in timing_keys(run)


@pytest.mark.parametrize(
    "entry", [1, {"unit": "1"}, {"unit": 1, "meaning": ""}, {"unit": "1", "meaning": "", "timing": "no"}]
)
def test_a_damaged_declaration_is_an_error_that_names_it(tmp_path: Path, entry: Any) -> None:
    train(tmp_path, 0, 1)
    file = tmp_path / "run.json"
    run = json.loads(file.read_text())
    file.write_text(json.dumps({**run, "metrics": {"toy/size": entry}}))
    with pytest.raises(DataError, match=r"metrics\.toy/size"):
        read_run(tmp_path)
    file.write_text(json.dumps({**run, "metrics": {"a": {"unit": "1", "meaning": "b", "later": 1}}}))
    assert declared_in(read_run(tmp_path)) == {"a": Metric("a", "1", "b")}


def test_lists_of_numbers_under_a_name_of_tokens_are_recorded(tmp_path: Path) -> None:
    record = Record.open(tmp_path)
    record.begin_attempt(0)
    record.step({"step": 1, "attn/token_norm": 2.0, "attn/token_norm_by_layer": [2.0, 1.0]})
    record.close()
    (found,) = read_metrics(tmp_path)
    assert (found["attn/token_norm"], found["attn/token_norm_by_layer"]) == (2.0, [2.0, 1.0])


def test_a_branch_that_begins_again_without_its_parent_is_no_branch(tmp_path: Path) -> None:
    parent = {"run_id": "a", "step": 100, "manifest": "0" * 64, "checkpoint": "a/checkpoints/step-100", "ancestors": []}
    for lines in (0, 2):
        record = Record(tmp_path / str(lines))
        record.begin_attempt(100, parent=parent)
        for step in range(101, 101 + lines):
            record.step({"step": step})
        record.close("failed")
        record = Record(tmp_path / str(lines))
        record.begin_attempt(0)
        record.step({"step": 1})
        assert record.parent is None and record.has_steps
        record.close("done")
        assert [line["step"] for line in read_metrics(tmp_path / str(lines))] == [1]
        assert "parent" not in read_run(tmp_path / str(lines))


def test_a_package_that_is_not_installed_is_named_so() -> None:
    """A checkout runs without being installed, and what it writes names it all the same."""
    assert with_version("pytest") == f"pytest {pytest.__version__}"
    assert with_version("a-package-of-nobody") == "a-package-of-nobody (not installed)"
