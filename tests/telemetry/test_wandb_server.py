"""The W&B mirror against a real server on the loopback device that refuses, fails or does not answer, and against the
user's own wandb settings: training continues, offline files are complete, and the one line gives the reason.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kha_train.config.compose import compose
from kha_train.telemetry import backlog

INIT_SECONDS = 3
PROGRAM = """
import json, os, sys, time
from pathlib import Path
from kha_train.config.compose import compose
from kha_train.telemetry import WandbMirror, wandb

run_dir, init_seconds, *overrides = sys.argv[1:]
wandb.INIT_SECONDS, warnings = float(init_seconds), []
started = time.monotonic()
mirror = WandbMirror(compose([f"run.dir={run_dir}", *overrides]), Path(run_dir), "abc123", warn=warnings.append)
seconds = time.monotonic() - started
for step in (1, 2, 3):
    mirror.step({"step": step, "tokens": 10 * step, "train/loss": 1.0 / step})
mode = mirror.mode
mirror.close()
print(json.dumps({"mode": mode, "after": mirror.mode, "warnings": warnings, "seconds": seconds}))
"""


class Server(ThreadingHTTPServer):
    """Answers every request with one status, or never (0), and counts them."""

    daemon_threads = True

    def __init__(self, status: int) -> None:
        self.status, self.requests = status, []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(self.path)
        if not self.server.status:
            time.sleep(60)
        body = b'{"errors": [{"message": "not for you"}]}'
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


@contextmanager
def serving(status: int) -> Iterator[Server]:
    server = Server(status)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """That of a user without any account, in a directory of their own."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    kept = {name: value for name, value in kept.items() if not name.startswith("WANDB_")}
    (tmp_path / "home").mkdir()
    return {**kept, "HOME": str(tmp_path / "home"), "NETRC": str(tmp_path / "home/netrc"), "OMP_NUM_THREADS": "1"}


def mirrored(tmp_path: Path, environment: dict[str, str], *overrides: str) -> dict[str, Any]:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "run"), str(INIT_SECONDS), *overrides]
    (tmp_path / "run").mkdir(exist_ok=True)
    told = {"capture_output": True, "text": True, "env": environment, "cwd": tmp_path}
    done = subprocess.run(command, check=False, timeout=120, **told)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("status, cause", [(401, "401"), (403, "403"), (500, "500"), (0, "")])
def test_a_server_that_refuses_or_fails_leaves_a_whole_offline_run_and_its_true_cause(
    status: int, cause: str, tmp_path: Path, environment: dict[str, str], wandb_rows
) -> None:
    with serving(status) as server:
        environment |= {"WANDB_API_KEY": "k" * 40, "WANDB_BASE_URL": server.address}
        told = mirrored(tmp_path, environment)
        assert server.requests, "it was tried"
    assert (told["mode"], told["after"]) == ("offline", "offline")
    assert len(told["warnings"]) == 1 and cause in told["warnings"][0] and "\n" not in told["warnings"][0]
    assert "in use" not in told["warnings"][0] and "k" * 40 not in told["warnings"][0]
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*-abc123/run-abc123.wandb")
    assert [row["step"] for row in wandb_rows(file)] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables, mode",
    [
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "OFFLINE"}, "offline"),
        ({"WANDB_MODE": "Dryrun"}, "offline"),
        ({"WANDB_MODE": "nonsense"}, "offline"),
        ({"WANDB_MODE": "off"}, "disabled"),
        ({"WANDB_MODE": "false"}, "disabled"),
        ({"WANDB_MODE": "DISABLED"}, "disabled"),
        ({"WANDB_DISABLED": "true"}, "disabled"),
    ],
)
def test_what_the_user_asked_wandb_for_is_obeyed_and_nothing_is_sent(
    variables: dict[str, str], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kha_train.telemetry import wandb as mirror

    for name in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WANDB_API_KEY": "k" * 40, **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(mirror, "is_reachable", lambda address: pytest.fail("nobody is to be asked"))
    chosen, reason = mirror.choose_mode("auto")
    assert chosen == mode
    assert ("nonsense" in reason) == (variables.get("WANDB_MODE") == "nonsense")
    assert mirror.choose_mode("disabled") == ("disabled", ""), "the configuration wins"


@pytest.mark.slow
@pytest.mark.parametrize("words, mode", [("offline", "offline"), ("disabled", "disabled")])
def test_wandb_offline_in_the_directory_is_obeyed(
    words: str, mode: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    """`wandb offline` writes this file, in the directory or for the user."""
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/settings").write_text(f"[default]\nmode = {words}\n")
    with serving(401) as server:
        environment |= {"WANDB_API_KEY": "k" * 40, "WANDB_BASE_URL": server.address}
        told = mirrored(tmp_path, environment)
        assert server.requests == []
    assert (told["mode"], told["warnings"]) == (mode, [])


@pytest.mark.slow
def test_id_directory_and_resuming_are_the_runs_own_and_project_and_entity_the_users(
    tmp_path: Path, environment: dict[str, str], wandb_records
) -> None:
    theirs = {"RUN_ID": "other", "RESUME": "never", "DIR": str(tmp_path / "elsewhere"), "NAME": "theirs"}
    theirs |= {"PROJECT": "their_project", "ENTITY": "their_team", "RESUME_FROM": "other?_step=5", "SILENT": "false"}
    environment |= {f"WANDB_{name}": value for name, value in theirs.items()} | {"WANDB_MODE": "DryRun"}
    told = mirrored(tmp_path, environment)
    assert (told["mode"], told["warnings"]) == ("offline", [])
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*-abc123/run-abc123.wandb")
    (run,) = (record.run for record in wandb_records(file) if record.WhichOneof("record_type") == "run")
    assert (run.run_id, run.display_name, run.project, run.entity) == (
        "abc123",
        "gqa-s0",
        "their_project",
        "their_team",
    )


@pytest.mark.slow
def test_a_setting_that_wandb_refuses_is_named_in_the_one_line(tmp_path: Path, environment: dict[str, str]) -> None:
    told = mirrored(tmp_path, environment | {"WANDB_INIT_TIMEOUT": "soon"}, "telemetry.wandb.mode=offline")
    assert told["mode"] == "disabled" and len(told["warnings"]) == 1
    assert "init_timeout" in told["warnings"][0] and "\n" not in told["warnings"][0]


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A record in which the steps 3 and 4 of the first attempt were undone: seven lines in all."""
    lines = [(1, 1, 10.0), (2, 1, 11.0), (3, 2, 20.0), (4, 2, 21.0), (5, 2, 22.0)]
    undone = [(3, 1, 12.0), (4, 1, 13.0)]
    for name, values in (("metrics.jsonl", lines), ("metrics.discarded.jsonl", undone)):
        text = [json.dumps({"step": s, "attempt": a, "time": t, "train/loss": 1.0 * s}) + "\n" for s, a, t in values]
        (tmp_path / name).write_text("".join(text))
    events = [("attempt_started", 9.0), ("checkpoint_saved", 11.5), ("zclip", 20.1), ("rewind", 21.5), ("abort", 22.5)]
    text = [json.dumps({"kind": kind, "time": time, "step": 0, "attempt": 1}) + "\n" for kind, time in events]
    (tmp_path / "events.jsonl").write_text("".join(text))
    return tmp_path


@pytest.mark.parametrize("held", range(9))
def test_rows_that_are_missing_come_in_the_order_they_were_recorded_with_their_events(
    recorded: Path, held: int
) -> None:
    assert backlog.rows_recorded(recorded) == 7
    rows = backlog.missing_rows(recorded, held, 7)
    told = [(row, line["step"], [event["kind"] for event in events]) for row, line, events in rows]
    assert (
        told
        == [
            (1, 1, []),
            (2, 2, ["checkpoint_saved"]),
            (3, 3, []),
            (4, 4, []),
            (5, 3, []),
            (6, 4, ["rewind"]),
            (7, 5, ["abort"]),
        ][held:]
    )


def test_a_long_record_is_read_from_its_end_alone(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines long ago are not looked at: here they are no JSON at all."""
    kept = (recorded / "metrics.jsonl").read_text()
    (recorded / "metrics.jsonl").write_text("x" * 300 + "\n" + ("y" * 400 + "\n") * 5000 + kept)
    monkeypatch.setattr(backlog, "_PIECE", 4096)
    rows = backlog.missing_rows(recorded, backlog.rows_recorded(recorded) - 2, backlog.rows_recorded(recorded))
    assert [(line["step"]) for _, line, _ in rows] == [4, 5]


class Sent:
    """A run of W&B of which the server holds the rows before `starting_step`."""

    def __init__(self, starting_step: int) -> None:
        self.starting_step, self.rows = starting_step, list[tuple[int, int]]()

    def log(self, values: dict[str, Any], step: int) -> None:
        self.rows.append((step, values["step"]))

    def finish(self, exit_code: int) -> None:
        """Nothing."""


@pytest.mark.parametrize("starting_step, first", [(0, 1), (4, 4), (8, 8), (20, 8)])
def test_online_the_servers_count_says_what_it_lacks_and_a_step_sends_a_few_rows_at_most(
    starting_step: int, first: int, recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kha_train.telemetry import wandb as mirror

    run = Sent(starting_step)
    monkeypatch.setattr(mirror, "choose_mode", lambda asked: ("online", ""))
    monkeypatch.setattr(mirror, "_open_run", lambda *given: run)
    monkeypatch.setattr(mirror, "CATCH_UP_ROWS", 2)
    for name in mirror.OWN_PLACES:
        monkeypatch.setenv(name, "/mine")
    sent = mirror.WandbMirror(compose([f"run.dir={recorded}"]), recorded, "abc123")
    assert run.rows == [], "the start waits for none of them"
    sent.step({"step": 6, "train/loss": 1.0})
    assert len(run.rows) == min(3, 9 - first)
    sent.close()
    expected = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 3), (6, 4), (7, 5), (8, 6)]
    assert run.rows == expected[first - 1 :]
    assert backlog.rows_noted(recorded) == 8


KILLED = """
import json, os, signal, sys
from pathlib import Path
from kha_train.config.compose import compose
from kha_train.record import Record
from kha_train.telemetry import WandbMirror

run_dir, first, last, killed = Path(sys.argv[1]), *map(int, sys.argv[2:])
record = Record.open(run_dir)
mirror = WandbMirror(compose([f"run.dir={run_dir}", "telemetry.wandb.mode=offline"]), run_dir, "abc123")
record.begin_attempt(first - 1)
for step in range(first, last + 1):
    line = {"step": step, "tokens": 10 * step, "train/loss": 1 / step, "spike/open": int(step == 2)}
    record.step(line)
    mirror.step(line)
    if step == 2:
        mirror.event(record.event("checkpoint_saved", step, seconds=1.0, stall_seconds=0.1))
if killed:
    os.kill(os.getpid(), signal.SIGKILL)
mirror.close()
record.close()
"""


@pytest.mark.slow
def test_rows_of_killed_attempts_are_sent_by_the_next_one_each_once(
    tmp_path: Path, environment: dict[str, str], wandb_rows
) -> None:
    """Killed at step 6, before wandb wrote anything; killed again later, when it had written part; ended well."""
    for arguments in ("1 6 1", "4 150 1", "151 152 0"):
        command = [sys.executable, "-c", KILLED, str(tmp_path / "run"), *arguments.split()]
        subprocess.run(command, check=False, env=environment, cwd=tmp_path, timeout=120)
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/run-abc123.wandb"))
    rows = [row for file in files for row in wandb_rows(file)]
    assert len(files) == 3
    # Steps 4 to 6 were computed twice, and both are rows; step 3 is the last that the second attempt kept.
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, *range(4, 153)]
    assert [row["_step"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[1]["events/checkpoint_saved"] == rows[1]["train/loss_in_spike"] == 0.5
    assert backlog.rows_noted(tmp_path / "run") == len(rows)
