"""Standard output and error of the command, with a redactor before them: launch logs keep what is printed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from kha_train.record.redact import Redactor


class RedactedStream:
    """A text stream that hides secrets line by line, whoever prints: this program, rich, a library.

    A line that is not ended waits for its end or a flush, because a secret may come in parts. Letters that the encoding
    lacks are written as escapes. Everything else is the stream behind it. `clean` hides the same in a tree of plain
    values, for an answer that is to be written to the stream `behind`.
    """

    def __init__(self, stream: TextIO, hide: Callable[[str], str], clean: Callable[[Any], Any] | None = None) -> None:
        self._stream, self._hide, self._waiting = stream, hide, ""
        self.clean = clean

    def write(self, text: str) -> int:
        """Takes `text`; whole lines go on at once."""
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
        """Sends on what waits for the end of its line."""
        waiting, self._waiting = self._waiting, ""
        if waiting:
            self._send(waiting)
        self._stream.flush()

    @property
    def behind(self) -> TextIO:
        """The stream itself, for an answer to a program."""
        return self._stream

    def _send(self, text: str) -> None:
        hidden = self._hide(text)
        try:
            self._stream.write(hidden)
        except UnicodeEncodeError as error:
            # The stream has taken nothing of a text that it cannot encode.
            self._stream.write(hidden.encode(error.encoding, "backslashreplace").decode(error.encoding))

    def __getattr__(self, name: str) -> Any:
        # Whoever asks for the bytes below would write past the redactor.
        if name == "buffer":
            raise AttributeError(name)
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)


@contextmanager
def redacted_streams(verbatim: bool) -> Iterator[None]:
    """While entered, standard output and error hide secrets. With `verbatim` output is text of the data: only the
    environment's own secrets are hidden in it."""
    redactor, before = Redactor.from_environment(), (sys.stdout, sys.stderr)
    hidden = (redactor.text, redactor.clean)
    hiders = ((redactor.values, redactor.clean_values) if verbatim else hidden, hidden)
    # Python has no stream where the descriptor was closed before it started.
    output, errors = (stream and RedactedStream(stream, *how) for stream, how in zip(before, hiders, strict=True))
    sys.stdout, sys.stderr = output, errors
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in filter(None, (output, errors)):
            with suppress(OSError, ValueError):
                stream.flush()
