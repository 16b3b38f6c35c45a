"""Standard output and standard error that never raise: printing must not be able to end a run.

The disk under a log may be full, a pipe may have lost its reader, a stream may be closed, an encoding may lack a
character. In all these cases the text is lost and the run continues. Inside `harmless_output` this holds for everything
that prints in this process: the console, warnings, libraries, threads.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

_PATIENCE_SECONDS = 1.0
_LONGEST_BYTES = 2**16


class HarmlessStream(io.TextIOBase):
    """A text stream over `stream` (or None) whose `write` never raises.

    A file descriptor is written to directly, in whole lines. Python's own buffer would keep what it cannot write, and
    fail when the process ends. Characters that the encoding lacks are written as escapes.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        # `print` writes a text and its line break separately, so each thread completes its own line.
        self._pending: dict[int, bytes] = {}
        self._lock = threading.RLock()
        self._descriptor = _descriptor(stream)
        with suppress(OSError, ValueError):
            if stream is not None:
                stream.flush()

    @property
    # A read-only property here where the base class has a writable attribute; nobody writes it.
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the underlying stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write as much of `text` as possible; always returns as if all of it had been written."""
        if not isinstance(text, str):
            raise TypeError(f"write() needs text, not {type(text).__name__}")
        if self._descriptor is None:
            with suppress(OSError, ValueError):
                if self._stream is not None:
                    self._stream.write(text)
            return len(text)
        # A thread that was stopped during a write, or lost by a fork, must not block the others.
        held = self._lock.acquire(timeout=_PATIENCE_SECONDS)
        try:
            thread = threading.get_ident()
            line = self._pending.pop(thread, b"") + text.encode(self.encoding, "backslashreplace")
            if "\n" in text or len(line) > _LONGEST_BYTES:
                self._send(line)
            else:
                self._pending[thread] = line
        finally:
            if held:
                self._lock.release()
        return len(text)

    def flush(self) -> None:
        """Write the last incomplete line."""
        if self._descriptor is not None:
            while self._pending:
                self._send(self._pending.popitem()[1])
        elif self._stream is not None:
            with suppress(OSError, ValueError):
                self._stream.flush()

    def isatty(self) -> bool:
        """Whether the underlying stream is a terminal."""
        with suppress(OSError, ValueError):
            return self._stream is not None and self._stream.isatty()
        return False

    def fileno(self) -> int:
        """The descriptor of the underlying stream. Raises OSError where there is none."""
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def writable(self) -> bool:
        """True."""
        return True

    def _send(self, rest: bytes) -> None:
        assert self._descriptor is not None
        with suppress(OSError):
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]


@contextmanager
def harmless_output() -> Iterator[None]:
    """Inside the `with` block, `sys.stdout` and `sys.stderr` never raise. May be nested."""
    before = sys.stdout, sys.stderr
    ours = tuple(stream if isinstance(stream, HarmlessStream) else HarmlessStream(stream) for stream in before)
    sys.stdout, sys.stderr = ours
    try:
        yield
    finally:
        for stream in ours:
            stream.flush()
        sys.stdout, sys.stderr = before


def hold_standard_descriptors() -> None:
    """Open the descriptors 0, 1 and 2 onto nothing where they are closed. Otherwise the next opened file would get that
    number, and libraries would print into it. Call this before opening anything else.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The system gives out the lowest free number, and all lower ones are taken.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _descriptor(stream: TextIO | None) -> int | None:
    """The descriptor that `stream` writes to; None for a stream in memory."""
    with suppress(OSError, ValueError):
        return stream.fileno() if isinstance(stream, io.TextIOWrapper) else None
    return None
