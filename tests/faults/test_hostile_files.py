"""Whatever the files of a run contain, every reader of them succeeds or ends with the one error and its exit code."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kha_train.analysis.compare import compare_runs
from kha_train.checkpoint.reader import Checkpoint, check_sizes
from kha_train.checkpoint.trainer_state import decode_state
from kha_train.cli.main import run as kha
from kha_train.config.compose import load
from kha_train.errors import KhaError
from kha_train.record import Record
from kha_train.train.progress import read_state, restore_watch
from kha_train.train.watch import Watch

pytestmark = pytest.mark.slow

OLD = Path(__file__).parents[1] / "fixtures" / "old_runs" / "runs" / "gqa"
CHECKPOINT = "checkpoints/step-00000072"
FILES = ("run.json", "metrics.jsonl", "events.jsonl", "config.yaml")
MORE = {
    "owner.json": {"token": "x", "process": 1, "host": "h", "job": "", "restart": "0", "beat": 1},
    "errors/rank-00000.json": {"rank": 0, "time": 1.0, "error": "e", "traceback": "t"},
    "metrics.discarded.jsonl": {
        "step": 3,
        "train/loss": 2.0,
        "discarded_reason": "rewind 1",
        "discarded_by_attempt": 1,
    },
    ".metrics.rewind.json": {"id": "a", "step": 70, "lines": 2, "metrics_size": 9, "discarded_size": 0, "note": {}},
}
"""Files that the old run does not have, as their writers leave them."""
NASTY: tuple[Any, ...] = (
    None, True, -1, 10**400, 1e308, float("nan"), "", "x\x1b[2J", "\ud800", [], [1], {}, {"a": 1}, "nan", "a[/red]b",
)  # fmt: skip
MUTATIONS = ("delete", "replace", "duplicate", "truncate", "bytes", "nest", "insert")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The old run, completed with one of every file that a run may have."""
    folder = tmp_path_factory.mktemp("template") / "run"
    shutil.copytree(OLD, folder)
    for name, content in MORE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content) + "\n")
    return folder


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """An owner on another machine is watched for three beats, which need not take seconds here."""
    monkeypatch.setattr("kha_train.record.lock.BEAT_SECONDS", 0.01)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside plain values."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in list(items)[:40] for place in places(item, (*path, key)))]


def mutated(raw: bytes, how: str, draw: Any) -> bytes:
    """`raw` (a JSON value or lines of them) after one mutation."""
    lines = raw.splitlines() or [b""]
    whole = raw.startswith(b"{") and raw.count(b"\n") > 1 and not raw.startswith(b'{"')
    number = draw(st.integers(0, min(len(lines), 40) - 1))
    if how == "truncate":
        return raw[: draw(st.integers(0, len(raw)))]
    if how == "bytes":
        at = draw(st.integers(0, len(raw)))
        return raw[:at] + draw(st.binary(min_size=1, max_size=6)) + raw[at + draw(st.integers(0, 3)) :]
    if how == "nest":
        return b"[" * draw(st.sampled_from((70, 400, 5000))) + raw
    try:
        value = json.loads(raw if whole else lines[number])
    except ValueError:
        return raw[:-1] + b": [&a x, *a]"
    place = draw(st.sampled_from(places(value)[1:] or [()]))
    *above, last = place or (None,)
    inner = value
    for key in above:
        inner = inner[key]
    if not place:
        value = draw(st.sampled_from(NASTY))
    elif how == "delete":
        del inner[last]
    elif how == "insert" and isinstance(inner, dict):
        inner["later"] = draw(st.sampled_from(NASTY))
    elif how == "duplicate" and not whole:
        return b"\n".join([*lines[: number + 1], *lines[number:]]) + b"\n"
    else:
        inner[last] = draw(st.sampled_from(NASTY))
    text = json.dumps(value).encode()
    return text + b"\n" if whole else b"\n".join([*lines[:number], text, *lines[number + 1 :]]) + b"\n"


def ends_well(*arguments: str) -> None:
    """A command ends with a code that it documents, and what it prints steers no terminal."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        kha(list(arguments))
    assert ended.value.code in (0, 2, 3, 4), (arguments, ended.value.code, err.getvalue())
    assert "Traceback" not in err.getvalue() and "\x1b" not in out.getvalue() + err.getvalue()


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_reader_of_a_run_ends_well(template: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    name = data.draw(st.sampled_from((*FILES, *MORE)))
    how = data.draw(st.sampled_from(MUTATIONS))
    folder = tmp_path_factory.mktemp("mutated") / "run"
    shutil.copytree(template, folder)
    if not name.startswith(".metrics"):
        (folder / ".metrics.rewind.json").unlink()
    (folder / name).write_bytes(mutated((folder / name).read_bytes(), how, data.draw))
    for command in ("status", "spikes"):
        ends_well(command, str(folder))
        ends_well(command, str(folder), "--json")
    ends_well("checkpoint", "list", str(folder))
    ends_well("spikes", str(folder), "--event", "1")
    with contextlib.suppress(KhaError):
        compare_runs([template, folder]).to_dict()
    with contextlib.suppress(KhaError):
        load(folder / "config.yaml")
    with contextlib.suppress(KhaError):
        record = Record.open(folder)
        try:
            record.begin_attempt(72)
        finally:
            record.close()
    shutil.rmtree(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_trainer_state_is_restored_or_refused(template: Path, data: Any) -> None:
    """The manifest is trusted here: a forger would forge it too."""
    raw = mutated(
        (template / CHECKPOINT / "trainer.json").read_bytes(), data.draw(st.sampled_from(MUTATIONS)), data.draw
    )
    checkpoint = Checkpoint(template / CHECKPOINT, check_sizes(template / CHECKPOINT))
    try:
        checkpoint.__dict__["trainer_state"] = decode_state(raw, "trainer.json")
        read_state(checkpoint)
        restore_watch(Watch(load(template / "config.yaml")), checkpoint)
    except KhaError as error:
        assert error.exit_code in (3, 4) and "trainer.json" in str(error)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_manifest_is_whole_or_named(template: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    shutil.copytree(template / CHECKPOINT, folder / CHECKPOINT)
    path = folder / CHECKPOINT / "manifest.json"
    path.write_bytes(mutated(path.read_bytes(), data.draw(st.sampled_from(MUTATIONS)), data.draw))
    ends_well("checkpoint", "list", str(folder))
    ends_well("checkpoint", "verify", str(folder))
    ends_well("checkpoint", "diff", str(folder), str(template))
    shutil.rmtree(folder)
