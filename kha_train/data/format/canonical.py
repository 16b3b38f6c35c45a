"""A canonical byte form of values, so that their hash is the same on every machine and library version."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

from kha_train.foreign.documents import Json, check_depth

_CHUNK_BYTES = 1 << 20


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def parse_json(text: bytes) -> Json:
    """The value of JSON text. Raises ValueError for anything that is not JSON, including NaN and infinities."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    def finite(text: str) -> float:
        """1e999 does not fit a float."""
        if math.isinf(number := float(text)):
            refuse(text)
        return number

    try:
        value = json.loads(text, parse_constant=refuse, parse_float=finite)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    check_depth(value)
    return value


def canonical_json(value: object) -> bytes:
    """`value` as JSON with sorted keys, no blanks, ASCII only. Accepts only plain ints, strings, lists and dicts.

    Raises TypeError for anything else (also for NumPy integers, whose text differs between versions) and ValueError for
    non-finite numbers.
    """
    return _ENCODER.encode(value).encode("ascii")


def canonical_sha256(value: object) -> str:
    """SHA-256 of `canonical_json(value)` in hexadecimal, without holding the megabytes of text of a long table. Raises
    as `canonical_json`.
    """
    digest = hashlib.sha256()
    for part in _ENCODER.iterencode(value):
        digest.update(part.encode("ascii"))
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes in hexadecimal. Raises OSError when it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
