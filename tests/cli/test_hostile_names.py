"""Every command prints the names of runs, data and settings literally, whatever they contain."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kha_train.cli.main import run
from kha_train.record import Record

NAMES = ("a[/red]b", "x\x1b[2J\x1b]0;owned\ay", "back\rover", "right\u202eleft", ":smile:", "<script>alert(1)</script>")
SHOWN = ("a[/red]b", r"x\x1b[2J\x1b]0;owned\x07y", r"back\rover", r"right\u202eleft", ":smile:", "<script>alert(1)")
STEERING = ("\x1b", "\a", "\r", "\u202e", "\x9b")


@pytest.fixture
def named(tmp_path: Path) -> list[str]:
    """Run directories with a hostile `run.name` and a hostile setting each."""
    paths = []
    for number, name in enumerate(NAMES):
        path = tmp_path / f"run-{number}"
        record = Record.open(path)
        record.begin_attempt(0)
        config = {"run": {"name": name, "seed": 0}, "attention": {"name": f"gqa {name}"}, "data": {name: name}}
        (path / "config.yaml").write_text(yaml.safe_dump(config))
        for step in range(1, 13):
            line = {"step": step, "train/loss": 4.0 - step / 10, "train/skipped": 0, "train/step_seconds": 1.0}
            record.step({**line, "data/wait_seconds": 0.0, "tokens": 8 * step})
        record.close("done")
        (path / "FATAL").write_bytes(f"line of {name}\n".encode())
        paths.append(str(path))
    return paths


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        run(arguments)
    assert ended.value.code == 0
    shown = capsys.readouterr()
    assert not any(sign in shown.out + shown.err for sign in STEERING)
    return shown.out


def test_status_shows_every_name(named: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(["status", *named], capsys)
    assert all(name in shown for name in SHOWN)
    assert all(f"line of {name}" in shown for name in SHOWN)


def test_compare_shows_every_name_on_the_terminal_and_on_the_page(
    named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    shown = printed(["compare", *named, "--out", str(tmp_path / "report")], capsys)
    assert all(name in shown for name in SHOWN)
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page
    assert not any(sign in page for sign in STEERING)
    assert r"x\x1b[2J\x1b]0;owned\x07y" in page and "a[/red]b" in page


def test_spikes_show_the_label_of_a_file_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = []
    for name in ("a[red]b.csv", "x\x1b[2J\ay.csv", "right\u202eleft.csv"):
        path = tmp_path / name
        path.write_text("step,loss\n" + "".join(f"{step},{3.0}\n" for step in range(1, 200)))
        paths.append(str(path))
    shown = printed(["spikes", *paths], capsys)
    assert "a[red]b.csv" in shown and r"x\x1b[2J\x07y.csv" in shown and r"right\u202eleft.csv" in shown


def test_an_error_line_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["status", str(tmp_path / "no\x1b[2Jwhere\a")])
    assert ended.value.code == 2
    assert not any(sign in capsys.readouterr().err for sign in STEERING)
