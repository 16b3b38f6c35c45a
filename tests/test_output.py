"""Printing never ends a run: in this process, and in runs whose output goes nowhere."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kha_train.output import HarmlessStream, harmless_output, hold_standard_descriptors
from kha_train.record import Marker, has_marker, read_metrics


class Failing(io.StringIO):
    """A stream that raises `error` at whatever is done with it."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


ERRORS = [
    OSError(errno.ENOSPC, "No space left on device"),
    BrokenPipeError(errno.EPIPE, "Broken pipe"),
    UnicodeEncodeError("ascii", "ü", 0, 1, "ordinal not in range(128)"),
    ValueError("I/O operation on closed file"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_stream_that_raises_is_written_to_in_peace(error: Exception) -> None:
    stream = HarmlessStream(Failing(error))
    assert stream.write("words\n") == 6
    stream.flush()


def test_no_stream_takes_everything() -> None:
    stream = HarmlessStream(None)
    assert stream.write("words\n") == 6 and not stream.isatty() and stream.encoding == "utf-8"
    stream.flush()
    with pytest.raises(OSError, match="fileno"):
        stream.fileno()


def test_bytes_are_a_defect_and_not_swallowed() -> None:
    with pytest.raises(TypeError):
        HarmlessStream(None).write(b"words")  # type: ignore[arg-type]


def test_a_full_device_leaves_nothing_behind_to_fail_over_later() -> None:
    with open("/dev/full", "w") as full:
        stream = HarmlessStream(full)
        for _ in range(2):
            print("words" * 10_000, file=stream, flush=True)
        full.flush()


def test_whole_lines_arrive_at_once_in_the_order_they_were_written_with_what_was_there_before(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("w") as file:
        file.write("before, ")
        stream = HarmlessStream(file)
        print("one", 2, file=stream)
        assert path.read_text() == "before, one 2\n"
        stream.write("half")
        assert path.read_text() == "before, one 2\n"
        stream.flush()
        assert path.read_text() == "before, one 2\nhalf"


def test_letters_that_the_encoding_lacks_are_written_as_escapes(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w", encoding="ascii") as file:
        print("grüße \ud800", file=HarmlessStream(file))
    assert (tmp_path / "log").read_text() == "gr\\xfc\\xdfe \\ud800\n"


def test_threads_write_whole_lines(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file:
        stream = HarmlessStream(file)
        threads = [
            threading.Thread(target=lambda name=name: [print(name * 50, file=stream) for _ in range(200)])
            for name in "abcd"
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 800 and all(line == line[0] * 50 for line in lines)


def test_streams_are_put_back_and_entering_twice_wraps_once() -> None:
    before = sys.stdout, sys.stderr
    with harmless_output():
        outer = sys.stdout
        assert isinstance(outer, HarmlessStream)
        with harmless_output():
            assert sys.stdout is outer
    assert (sys.stdout, sys.stderr) == before


def test_a_closed_descriptor_is_not_given_to_the_next_file() -> None:
    """Otherwise the output of a library would land in the record."""
    told, words = os.pipe()
    program = (
        "import os; from kha_train.output import *; hold_standard_descriptors()\n"
        f"os.write({words}, b'%d' % os.open('/dev/null', 0))"
    )
    closed = ["bash", "-c", 'exec 0<&- 1>&- 2>&-; exec "$@"', "shell", sys.executable, "-c", program]
    subprocess.run(closed, check=True, pass_fds=[words])
    os.close(words)
    assert int(os.read(told, 10)) >= 3
    os.close(told)
    hold_standard_descriptors()


Train = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture
def train(small: list[str], tmp_path: Path, clean_environment: dict[str, str]) -> Train:
    """`train(redirection, *overrides, **environment)`: three steps in a process whose shell redirects it."""

    def call(redirection: str, *overrides: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
        settings = [*small, "model.layers=1", "run.steps=3", "telemetry.console=lines", f"run.dir={tmp_path}/run"]
        command = ["bash", "-c", f'"$@" {redirection}', "shell", sys.executable, "-m", "kha_train"]
        return subprocess.run(
            [*command, *settings, *overrides],
            env={**os.environ, **clean_environment, **environment},
            capture_output=True,
            check=False,
            timeout=300,
        )

    return call


REDIRECTIONS = {
    "a full disk": ">/dev/full 2>/dev/full",
    "closed": ">&- 2>&- <&-",
    "nobody reads": "2>&1 | true; exit ${PIPESTATUS[0]}",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REDIRECTIONS)
@pytest.mark.parametrize("console", ["lines", "progress"])
def test_a_run_whose_output_leads_nowhere_is_done_with_0_and_a_whole_record(
    case: str, console: str, train: Train, tmp_path: Path
) -> None:
    if console == "progress" and case != "a full disk":
        pytest.skip("the bar writes to the same stream")
    ended = train(REDIRECTIONS[case], f"telemetry.console={console}")
    assert ended.returncode == 0, ended
    assert has_marker(tmp_path / "run", Marker.DONE)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.slow
def test_a_name_that_the_terminal_cannot_spell_does_not_end_the_run(train: Train, tmp_path: Path) -> None:
    ended = train("", "run.name='grüße'", PYTHONIOENCODING="ascii")
    assert ended.returncode == 0, ended
    assert b"gr\\xfc\\xdfe: new run" in ended.stdout and b"step 3/3" in ended.stdout


@pytest.mark.slow
def test_an_error_keeps_its_exit_code_where_it_cannot_be_told(train: Train) -> None:
    for redirection in (">/dev/full 2>/dev/full", ">&- 2>&-"):
        assert train(redirection, "run.steps=many").returncode == 2


@pytest.mark.slow
def test_the_answer_of_a_rehearsal_that_cannot_be_written_is_an_error(train: Train) -> None:
    assert train(">/dev/full", "--dry-run").returncode != 0
