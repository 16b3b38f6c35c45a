"""Reads files that may be compressed; every failure becomes one error."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO

from kha_train.errors import ConfigError, DataError

PACKED = (".gz", ".zst")
_TOO_LARGE_A_WINDOW = "too much memory"
"""zstd's message for a frame made with `--long` above 27."""


@contextmanager
def open_packed(path: Path) -> Iterator[tuple[io.BufferedIOBase, IO[bytes]]]:
    """The bytes of a file, decompressed when its name ends with .gz or .zst, and the underlying file, which is read
    ahead. Raises ConfigError when .zst needs pyarrow, DataError when the file is damaged or cannot be read.
    """
    with reading(path), open(path, "rb") as raw:
        if path.suffix.lower() == ".gz":
            yield gzip.GzipFile(fileobj=raw), raw
        elif path.suffix.lower() == ".zst":
            arrow = pyarrow(path)
            yield io.BufferedReader(arrow.CompressedInputStream(arrow.PythonFile(raw), "zstd")), raw
        else:
            yield raw, raw


@contextmanager
def reading(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Turns the errors of reading a file into DataError; `kinds` are further errors of its format."""
    expected: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, *kinds)
    try:
        yield
    except expected as error:
        reason = " ".join(str(error).split())
        fix = "copy it again, or leave it out"
        if path.suffix.lower() == ".zst" and _TOO_LARGE_A_WINDOW in reason:
            reason = "its zstd window is above 128 MiB (it was compressed with --long=28 or more)"
            fix = "compress it again: zstd -d --long=31 -c FILE | zstd --long=27 -o NEW.zst"
        raise DataError(f"cannot be read: {reason}", field=str(path), fix=fix) from error


def pyarrow(path: Path) -> ModuleType:
    """The library that reads .zst and .parquet. Raises ConfigError when it is missing."""
    try:
        import pyarrow
    except ImportError:
        raise ConfigError("needs pyarrow", field="text", value=str(path), fix="pip install 'kha_train[data]'") from None
    library: ModuleType = pyarrow
    return library
