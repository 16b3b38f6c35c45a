"""What `kha status` reports for records written here with chosen times."""

from __future__ import annotations

import io
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kha_train.cli.main import run
from kha_train.cli.status import COLUMNS, SORTED_BY, status_table
from kha_train.config.compose import compose, dump
from kha_train.operate.status import SILENT_AFTER, run_status, status_or_fault
from kha_train.operate.sweep import plan_sweep, save_sweep
from kha_train.record import Marker, Record, set_marker
from kha_train.record.files import write_json
from kha_train.record.lock import OWNER_FILE
from kha_train.record.sweeps import SWEEP_FILE
from kha_train.record.totals import TOTALS_FILE

ON_TIME = {"train/step_seconds": 2.0, "train/skipped": 0, "data/wait_seconds": 0.0}


def trained(run_dir: Path, steps: int, *overrides: str, end: str | None = "stopped") -> Record:
    """A run of 100 steps that has made `steps`, one every 4 s, each taking 2 s; begun 4 s before them."""
    record = Record.open(run_dir)
    (run_dir / "config.yaml").write_text(dump(compose(["run.steps=100", "run.name=one", *overrides])))
    record.begin_attempt(record.last_step)
    begun = time.time() - 4.0 * steps
    for number in range(1, steps + 1):
        line = {"step": number, "time": begun + 4.0 * number, "train/loss": 5.0 - number / 100, "train/mfu": 0.25}
        line["spike/events_total"] = int(number >= 7)
        record.step({**line, **ON_TIME, "train/tokens_per_second": 1000.0 + number})
    record._run["attempts"][0]["started"] = begun
    record._write_run()
    if end:
        record.close(end)
    return record


def test_figures_follow_their_definitions(tmp_path: Path) -> None:
    record = trained(tmp_path, 40, end=None)
    (tmp_path / "checkpoints" / "step-00000030").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-00000040.saving-0123456789ab").mkdir()
    status = run_status(tmp_path)
    record.close()
    assert (status.name, status.state, status.step, status.steps) == ("one", "running", 40, 100)
    assert status.loss == pytest.approx(5.0 - 30.5 / 100)
    assert status.tokens_per_second == 1030.5 and status.mfu == 0.25
    assert status.seconds_left == pytest.approx(60 * 4.0, rel=1e-6)
    assert status.goodput == pytest.approx(0.5, rel=1e-6)
    assert (status.spikes, status.attempts, status.checkpoint) == (1, 1, 30)
    assert status.heartbeat is not None and status.heartbeat < SILENT_AFTER


def test_the_time_left_counts_the_rows_of_a_batch_that_grows(tmp_path: Path) -> None:
    schedule = "data.batch_schedule=[{start_step: 51, global_batch_size: 24}]"
    trained(tmp_path, 40, "data.global_batch_size=8", schedule)
    # Four seconds for eight rows: ten steps of 8 are left, and fifty of 24.
    assert run_status(tmp_path).seconds_left == pytest.approx(4.0 * (10 + 50 * 3), rel=1e-6)


def test_spikes_are_narrow_and_wide_events_and_divergence_stands_beside_them(tmp_path: Path) -> None:
    counts = {"spike/narrow_total": 2, "spike/wide_total": 1, "spike/unrecovered_total": 4, "spike/events_total": 8}
    for is_open, end, fired, diverged in (
        (0, "done", False, False),
        (1, "done", False, True),
        (0, "diverged", False, True),
        (0, "done", True, True),
        # It is running, or waits to go on, so the event may still end.
        (1, None, False, False),
        (1, "requeued", False, False),
    ):
        run_dir = tmp_path / f"{is_open} {end} {fired}"
        record = trained(run_dir, 3, end=None)
        record.step({"step": 4, "time": time.time(), "train/loss": 4.0, **ON_TIME, **counts, "spike/open": is_open})
        if fired:
            record.event("divergence", 4, loss=9.0)
        if end:
            record.close(end)
        if end == "requeued":
            set_marker(run_dir, Marker.REQUEUE, "a signal")
        status = run_status(run_dir)
        if not end:
            record.close("done")
        assert (status.spikes, status.diverged) == (3, diverged)
        table = Console(file=io.StringIO(), width=200)
        table.print(status_table([status], table))
        assert ("3, diverged" in table.file.getvalue()) is diverged


@pytest.mark.parametrize(
    "marker, state", [(Marker.DONE, "done"), (Marker.FATAL, "fatal"), (Marker.REQUEUE, "requeue"), (None, "ended")]
)
def test_the_state_of_a_run_that_is_over_is_its_marker(tmp_path: Path, marker: Marker | None, state: str) -> None:
    trained(tmp_path, 3)
    if marker:
        set_marker(tmp_path, marker, "why")
    status = run_status(tmp_path)
    assert status.state == state and status.heartbeat is None
    assert status.note == ("why" if marker is Marker.FATAL else "")


def test_the_note_names_the_rank_that_failed_first(tmp_path: Path) -> None:
    trained(tmp_path, 3)
    (tmp_path / "errors").mkdir()
    for rank, at in {0: 2.0, 3: 1.0}.items():
        failure = {"rank": rank, "time": at, "error": f"error of {rank}", "traceback": ""}
        write_json(tmp_path / "errors" / f"rank-{rank:05d}.json", failure)
    assert run_status(tmp_path).note == "rank 3 failed first: error of 3"
    set_marker(tmp_path, Marker.FATAL, "error of 3")
    assert run_status(tmp_path).note == "rank 3 failed first: error of 3"
    set_marker(tmp_path, Marker.FATAL, "error of 0")
    assert run_status(tmp_path).note == "error of 0; rank 3 failed first: error of 3"


def test_a_run_that_was_killed_is_silent_once_its_heartbeat_is_old(tmp_path: Path) -> None:
    trained(tmp_path, 3, end=None).close("stopped")
    run = json.loads((tmp_path / "run.json").read_text())
    run["attempts"][-1]["state"] = "running"
    write_json(tmp_path / "run.json", run)
    write_json(tmp_path / OWNER_FILE, {"host": "gone"})
    assert run_status(tmp_path).state == "running"
    old = time.time() - SILENT_AFTER - 60
    os.utime(tmp_path / OWNER_FILE, (old, old))
    status = run_status(tmp_path)
    assert status.state == "silent" and status.heartbeat == pytest.approx(SILENT_AFTER + 60, abs=20)


def test_figures_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    record = Record.open(tmp_path)
    record.begin_attempt(0)
    for step, loss in enumerate((float("nan"), 2.0, float("inf")), start=1):
        record.step({"step": step, "train/loss": loss, **ON_TIME})
    record.close("stopped")
    assert run_status(tmp_path).loss == 2.0


def test_a_sweep_shows_also_the_points_that_have_not_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = plan_sweep(tmp_path / "s", ["attention=gqa,kha_mlp"])
    save_sweep(tmp_path / "s", points, "steps")
    trained(Path(points[0].run_dir), 5, end="stopped")
    set_marker(Path(points[0].run_dir), Marker.FATAL, "configuration error: [red]")

    def status(*options: str) -> str:
        with pytest.raises(SystemExit) as ended:
            run(["status", str(tmp_path / "s"), *options])
        assert not ended.value.code
        return capsys.readouterr().out

    runs: list[dict[str, Any]] = json.loads(status("--json"))["runs"]
    assert [(run["name"], run["state"], run["step"]) for run in runs] == [
        ("gqa-s0", "fatal", 5),
        ("kha_mlp-s0", "new", 0),
    ]
    text = status()
    for word in ("gqa-s0", "fatal", "5/100", "kha_mlp-s0", "new", "configuration error: [red]"):
        assert word in text


def test_a_narrow_terminal_loses_columns_and_not_their_content(tmp_path: Path) -> None:
    trained(tmp_path / "run", 40)
    runs = [run_status(tmp_path / "run", "kha_linear-s0")]

    def shown(width: int) -> list[str]:
        console = Console(width=width, file=io.StringIO())
        console.print(status_table(runs, console))
        return console.file.getvalue().splitlines()

    assert set(COLUMNS) - set(" ".join(shown(160)[:1]).split()) == set()
    for width in (80, 60):
        head, row = shown(width)
        assert "\N{HORIZONTAL ELLIPSIS}" not in head + row
        for word in ("kha_linear-s0", "ended", "40/100", "4.695", "4:00"):
            assert word in row


def test_a_run_whose_record_is_damaged_is_one_row_and_the_error_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path / "whole", 3)
    trained(tmp_path / "torn", 3)
    (tmp_path / "torn" / "run.json").write_text("[1]")
    for arguments in (["status", str(tmp_path)], ["status", str(tmp_path), "--json"]):
        with pytest.raises(SystemExit) as ended:
            run(arguments)
        shown = capsys.readouterr()
        assert ended.value.code == 4 and "torn/run.json" in shown.err
        assert "unreadable" in shown.out and ("whole" in shown.out or "one" in shown.out)
    states = {one["path"]: one["state"] for one in json.loads(shown.out)["runs"]}
    assert states == {str(tmp_path / "torn"): "unreadable", str(tmp_path / "whole"): "ended"}


@pytest.mark.parametrize("content", ["[1]", '{"points": 3}', '{"format": 9, "points": []}', "nul", "surrogate"])
@pytest.mark.parametrize("below", [False, True])
def test_a_damaged_sweep_is_one_row_beside_the_healthy_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, below: bool
) -> None:
    trained(tmp_path / "whole", 3)
    sweep = tmp_path / "folder" / "sweep" if below else tmp_path / "sweep"
    sweep.mkdir(parents=True)
    odd = {"nul": "a\0b", "surrogate": "\ud800"}
    point = {"label": "a", "run_dir": odd.get(content), "overrides": [], "steps": 1, "tokens": 1, "flops": 1.0}
    (sweep / SWEEP_FILE).write_text(json.dumps({"points": [point]}) if content in odd else content)
    with pytest.raises(SystemExit) as ended:
        run(["status", str(sweep.parent if below else sweep), str(tmp_path / "whole"), "--json"])
    shown = capsys.readouterr()
    assert ended.value.code == 4 and f"sweep/{SWEEP_FILE}" in shown.err
    assert [one["state"] for one in json.loads(shown.out)["runs"]] == ["unreadable", "ended"]


# Values of every kind, in the place of any value of a run's files.
WILD = [None, True, -1, 10**30, 1.5, -1e308, 1e308, "nan", "inf", "", "f" * 600, [], [1], {"a": 1}, "\ud800"]


def changed(value: Any, drawn: random.Random) -> Any:
    """A copy of `value` with something wild at a place inside it."""
    inside = isinstance(value, dict | list) and value and drawn.random() < 0.9
    if not inside:
        return drawn.choice(WILD)
    copy = value.copy()
    key = drawn.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
    copy[key] = changed(copy[key], drawn)
    return copy


@pytest.mark.parametrize("name", ["run.json", TOTALS_FILE, "metrics.jsonl", "events.jsonl"])
def test_a_wild_value_in_a_file_of_one_run_never_takes_the_table_of_the_others(tmp_path: Path, name: str) -> None:
    trained(tmp_path, 3)
    lines, drawn = (tmp_path / name).read_text().splitlines(), random.Random(name)
    content = [json.loads("".join(lines))] if name.endswith(".json") else list(map(json.loads, lines))
    console = Console(width=200, file=io.StringIO())
    for _ in range(60):
        place = drawn.randrange(len(content))
        new = [*content[:place], changed(content[place], drawn), *content[place + 1 :]]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in new))
        found, fault = status_or_fault(tmp_path)
        assert (found.state == "unreadable") == (fault is not None)
        console.print(status_table([found], console))
        json.dumps(found.to_dict())


def test_a_folder_is_a_table_that_any_column_sorts_with_unknown_values_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, steps in (("b", 3), ("a", 40), ("c", 8)):
        trained(tmp_path / name, steps)
    trained(tmp_path / "new", 0)
    assert SORTED_BY.keys() == COLUMNS.keys()

    def order(*options: str) -> list[str]:
        with pytest.raises(SystemExit) as ended:
            run(["status", str(tmp_path), "--json", *options])
        assert not ended.value.code
        return [Path(one["path"]).name for one in json.loads(capsys.readouterr().out)["runs"]]

    assert order() == ["a", "b", "c", "new"]
    # The loss falls with the step; a run that has not begun has none.
    assert order("--sort", "loss") == ["a", "c", "b", "new"]
    assert order("--sort=-Loss") == ["b", "c", "a", "new"]
    assert order("--sort", "step") == ["new", "b", "c", "a"]
    with pytest.raises(SystemExit) as ended:
        run(["status", str(tmp_path), "--sort", "los"])
    assert ended.value.code == 2 and "did you mean loss?" in capsys.readouterr().err
