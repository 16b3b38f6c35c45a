"""The texts of Parquet files, in batches of a few megabytes whatever the size of row groups."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from data_tools.files import TextFile, value_of
from data_tools.packed import pyarrow, reading
from kha_train.errors import DataError
from kha_train.foreign.documents import Json

_BATCH_BYTES = 4 << 20
_BATCH_ROWS = 1024
_READ_BYTES = 1 << 20


def row_group_bytes(file: TextFile) -> list[int]:
    """The uncompressed size of each row group according to its metadata. Raises as `read_parquet`."""
    with _opened(file) as opened:
        return [opened.metadata.row_group(group).total_byte_size for group in range(opened.num_row_groups)]


def read_parquet(file: TextFile, groups: range | None = None) -> Iterator[tuple[int, list[Json]]]:
    """(row group, some of its texts, None for null) over `groups`, or over all groups.

    Raises ConfigError without pyarrow; DataError for a file that is damaged, lacks the column, or has no text in it.
    """
    with _opened(file) as opened:
        for group in range(opened.num_row_groups) if groups is None else groups:
            about = opened.metadata.row_group(group)
            average = max(1, about.total_byte_size // max(1, about.num_rows))
            rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // average))
            for batch in opened.iter_batches(rows, row_groups=[group], columns=[file.field], use_threads=False):
                yield group, [value_of(row, file.field) for row in batch.to_pylist()]


@contextmanager
def _opened(file: TextFile) -> Iterator[Any]:
    arrow = pyarrow(file.path)
    from pyarrow import parquet

    # Buffered reading: otherwise the column of a whole row group is held in memory.
    with (
        reading(file.path, ValueError),
        parquet.ParquetFile(file.path, buffer_size=_READ_BYTES, pre_buffer=False) as opened,
    ):
        _check_column(arrow, opened, file)
        yield opened


def _check_column(arrow: Any, opened: Any, file: TextFile) -> None:
    schema = opened.schema_arrow
    kind = _type_of(arrow, schema, file.field)
    if kind is None:
        problem = f"does not have exactly one column {file.field!r}"
        raise DataError(problem, field=str(file.path), allowed=", ".join(schema.names))
    types = arrow.types
    value = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(value) or types.is_large_string(value) or types.is_string_view(value)):
        raise DataError(f"its column {file.field!r} does not hold text", field=str(file.path), value=str(kind))


def _type_of(arrow: Any, schema: Any, field: str) -> Any:
    """The type of a column, or of a field inside structures; None unless there is exactly one."""
    if schema.names.count(field) == 1:
        return schema.field(field).type
    first, *inside = field.split(".")
    if not inside or schema.names.count(first) != 1:
        return None
    kind = schema.field(first).type
    for part in inside:
        if not arrow.types.is_struct(kind) or kind.get_field_index(part) < 0:
            return None
        kind = kind.field(part).type
    return kind
