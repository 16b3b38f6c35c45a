"""Reading what W&B wrote offline, with its own message definitions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HEADER, BLOCK, CHUNK_HEADER = 7, 32768, 7
"""Bytes: of the file's own header, of a block of LevelDB's log format, of the header of a chunk in it."""
WHOLE, LAST = 1, 4


@pytest.fixture(scope="session")
def wandb_records() -> Callable[[Path], list[Any]]:
    """`wandb_records(path)`: the records of a `.wandb` file, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    def read(path: Path) -> list[Any]:
        data, at, part, records = path.read_bytes(), HEADER, b"", []
        while at + CHUNK_HEADER <= len(data):
            left = BLOCK - at % BLOCK
            length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            if left < CHUNK_HEADER or kind == 0:
                at += left
                continue
            part += data[at + CHUNK_HEADER : at + CHUNK_HEADER + length]
            at += CHUNK_HEADER + length
            if kind in (WHOLE, LAST):
                records.append(Record.FromString(part))
                part = b""
        return records

    return read


@pytest.fixture(scope="session")
def wandb_rows(wandb_records: Callable[[Path], list[Any]]) -> Callable[[Path], list[dict[str, Any]]]:
    """`wandb_rows(path)`: the rows of the history in a `.wandb` file, key to value."""

    def read(path: Path) -> list[dict[str, Any]]:
        return [
            {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for record in wandb_records(path)
            if record.WhichOneof("record_type") == "history"
        ]

    return read
