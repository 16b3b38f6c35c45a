"""A full disk under the record: a line that does not fit is an error and leaves no part behind."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest

from kha_train.record.jsonl import Appender, read_lines


def test_a_line_that_does_not_fit_leaves_no_half_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = Appender(path)
    file.append({"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))
    try:
        with pytest.raises(OSError):
            file.append({"step": 2, "text": "x" * 100})
        assert read_lines(path) == [{"step": 1}]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    file.append({"step": 3})
    file.close()
    assert read_lines(path) == [{"step": 1}, {"step": 3}]
