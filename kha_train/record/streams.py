"""Standard output and error behind a redactor, because launch logs keep what is printed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from kha_train.record.redact import Redactor


class RedactedStream:
    """A text stream that hides secrets line by line, whoever prints: this program, rich, a library.

    An incomplete line is held back until it ends or is flushed, because a secret may arrive in parts. Characters that
    the encoding lacks are written as escapes. All else behaves like the underlying stream. `clean` hides the same
    secrets in nested plain values, for results that are written to the stream `behind`.
    """

    def __init__(self, stream: TextIO, hide: Callable[[str], str], clean: Callable[[Any], Any] | None = None) -> None:
        self._stream, self._hide, self._waiting = stream, hide, ""
        self.clean = clean

    def write(self, text: str) -> int:
        """Takes `text`; complete lines are passed on at once."""
        if not isinstance(text, str):
            raise TypeError("a text is expected")
        lines, end, rest = f"{self._waiting}{text}".rpartition("\n")
        self._waiting = rest
        if end:
            self._send(lines + end)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Takes every line as `write` does."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Passes on the incomplete line."""
        waiting, self._waiting = self._waiting, ""
        if waiting:
            self._send(waiting)
        self._stream.flush()

    @property
    def behind(self) -> TextIO:
        """The underlying stream, for results that a program reads."""
        return self._stream

    def _send(self, text: str) -> None:
        hidden = self._hide(text)
        try:
            self._stream.write(hidden)
        except UnicodeEncodeError as error:
            # The stream has written nothing of a text that it cannot encode.
            self._stream.write(hidden.encode(error.encoding, "backslashreplace").decode(error.encoding))

    def __getattr__(self, name: str) -> Any:
        # Access to the underlying bytes would bypass the redactor.
        if name == "buffer":
            raise AttributeError(name)
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)


@contextmanager
def redacted_streams(verbatim: bool) -> Iterator[None]:
    """Inside the `with` block, standard output and error hide secrets. With `verbatim` the output is text from the
    data, and only the environment's own secrets are hidden in it.
    """
    redactor, before = Redactor.from_environment(), (sys.stdout, sys.stderr)
    hidden = (redactor.text, redactor.clean)
    hiders = ((redactor.values, redactor.clean_values) if verbatim else hidden, hidden)
    # Python has no stream for a descriptor that was closed before it started.
    output, errors = (stream and RedactedStream(stream, *how) for stream, how in zip(before, hiders, strict=True))
    sys.stdout, sys.stderr = output, errors
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in filter(None, (output, errors)):
            with suppress(OSError, ValueError):
                stream.flush()
