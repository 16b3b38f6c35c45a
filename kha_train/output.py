"""Standard output and standard error that take everything: what a run says of itself must never be what ends it.

A disk that is full under a log, a pipe that nobody reads any more, a stream that was closed, an encoding that lacks a
letter: whatever is in the way, the words are lost and the run goes on. While `harmless_output` is entered, this holds
for all that prints in this process: the console, warnings, libraries, threads.
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
    """A text stream over `stream`, which may be None, that never raises when it is written to.

    A file descriptor is written to directly, in whole lines: what Python's own buffer cannot get rid of it would keep,
    and fail over when the process ends. Letters that the encoding lacks are written as escapes.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        # `print` writes a text and its line break apart, so each thread completes a line of its own.
        self._pending: dict[int, bytes] = {}
        self._lock = threading.RLock()
        self._descriptor = _descriptor(stream)
        with suppress(OSError, ValueError):
            if stream is not None:
                stream.flush()

    @property
    # A property here, an attribute to be written there; nobody writes it.
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream below."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Pass `text` on as far as it goes; always as if all of it had been written."""
        if not isinstance(text, str):
            raise TypeError(f"a text is written here, not {type(text).__name__}")
        if self._descriptor is None:
            with suppress(OSError, ValueError):
                if self._stream is not None:
                    self._stream.write(text)
            return len(text)
        # A thread that was stopped amid a write, or lost by a fork, must not silence the others.
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
        """Pass on what is no whole line yet."""
        if self._descriptor is not None:
            while self._pending:
                self._send(self._pending.popitem()[1])
        elif self._stream is not None:
            with suppress(OSError, ValueError):
                self._stream.flush()

    def isatty(self) -> bool:
        """Whether the stream below is a terminal."""
        with suppress(OSError, ValueError):
            return self._stream is not None and self._stream.isatty()
        return False

    def fileno(self) -> int:
        """The descriptor of the stream below. Raises OSError where there is none."""
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
    """While entered, `sys.stdout` and `sys.stderr` are harmless. May be entered again inside."""
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
    """Open the descriptors 0, 1 and 2 where they were closed, onto nothing: else the next file that is opened gets the
    number, and what libraries print goes into it. To be called before anything else is opened."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free number is given out, and all below are taken.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _descriptor(stream: TextIO | None) -> int | None:
    """The descriptor that `stream` writes to; None for a stream in memory."""
    with suppress(OSError, ValueError):
        return stream.fileno() if isinstance(stream, io.TextIOWrapper) else None
    return None
