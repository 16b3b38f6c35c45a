"""Reads curve files of other frameworks. The content of a file decides how it is read, never its suffix.

1. Bytes become text: UTF-8, UTF-16, UTF-32, else Latin-1. Archives and other binary files are refused by their kind.
2. The first format in `FORMATS` that recognises the text turns it into rows.
3. `columns` finds step and loss among the names of the rows.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from .columns import KNOWN, READ, SHOWN, Row, alias_of, is_known, names_both, observations
from .errors import CurveError, DamagedCurveError
from .events import Observation

BINARY = (
    (b"\x1f\x8b", "a gzip archive"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"BZh", "a bzip2 archive"),
    (b"PAR1", "a Parquet file"),
    (b":W&B", "W&B's own binary log"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy file"),
    (b"%PDF", "a PDF"),
)
"""First bytes of a file -> its kind."""
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""Byte order mark -> encoding. UTF-32's mark begins with UTF-16's, so it comes first."""
LOOKED_AT = 4096
"""Number of bytes used to detect the encoding of a file without a mark."""
DELIMITERS = ",\t; "
MEGATRON_LINE = re.compile(r'^[^{"\n]*\biteration\s+(\d+)/\s*\d+\s*\|(.*)$', re.MULTILINE)
TRAINER_STATE = re.compile(r'"log_history"\s*:\s*\[')
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+([eE][+-]?\d+)?")
OTHER_RECORDS = {
    "kind": "it holds the events of a run, not its curve",
    "discarded_reason": "it holds steps that restarts undid, not a curve",
}
"""A key in the rows of another file of a run directory -> what that file is."""


class Format(NamedTuple):
    """A file format: a test whether text has it, and a function that reads its rows. `rows(text, path)` raises
    CurveError and DamagedCurveError.
    """

    recognises: Callable[[str], bool]
    rows: Callable[[str, str], Sequence[Row]]


def read_curve(raw: bytes, path: str) -> list[Observation]:
    """The observations in the content of a file of any of the formats, row by row; rows without a loss are left out.
    `path` is for errors.

    Raises CurveError for a file of another kind, naming what was seen and what is supported; DamagedCurveError for a
    damaged one.
    """
    text = _decode(raw, path)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise CurveError("it is empty", field="curve", value=path, allowed=READ)
    rows = next(each for each in FORMATS if each.recognises(text)).rows(text, path)
    return observations(rows, path)


def _decode(raw: bytes, path: str) -> str:
    """The text of a file. Raises CurveError when it is not text, DamagedCurveError when it ends inside a character."""
    kind = next((kind for start, kind in BINARY if raw.startswith(start)), None)
    kind = "a TensorBoard event file" if b"brain.Event:" in raw[:64] else kind
    if kind:
        raise CurveError(f"it is {kind}, not text", field="curve", value=path, allowed=READ)
    mark, encoding = next((each for each in MARKS if raw.startswith(each[0])), (b"", _unmarked(raw[:LOOKED_AT])))
    try:
        text = raw[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        if mark:
            raise DamagedCurveError(f"it is not valid text in {encoding}: {error.reason}", field=path) from error
        text = raw.decode("latin-1")
    if "\0" in text:
        raise CurveError("it is binary, not text", field="curve", value=path, allowed=READ)
    return text


def _unmarked(start: bytes) -> str:
    """The encoding of a file without a mark. In UTF-16, every second byte of mostly-ASCII text is zero."""
    zeros = [start[offset::2].count(0) for offset in (0, 1)]
    if max(zeros) > len(start) // 4:
        return "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"
    return "utf-8"


def _is_megatron(text: str) -> bool:
    return MEGATRON_LINE.search(text) is not None


def _megatron_rows(text: str, path: str) -> list[Row]:
    """The iterations of a Megatron log, ignoring other lines. Only fields followed by "|" are read, so a truncated line
    gives no wrong values.

    Megatron prints no loss for a non-finite iteration, but counts it.
    """
    rows: list[Row] = []
    line, reached = 1, 0
    for match in MEGATRON_LINE.finditer(text):
        line += text.count("\n", reached, match.start())
        reached = match.start()
        fields = (field.partition(":") for field in match[2].split("|")[:-1])
        cells: dict[str, Any] = {name.strip(): value.strip() for name, _, value in fields}
        if not any(KNOWN.get(alias_of(name)) == "loss" for name in cells):
            not_finite = cells.get("number of nan iterations", "0")
            cells |= {"lm loss": "nan" if not_finite.isdigit() and int(not_finite) else None}
        rows.append((f"{path}:{line}", {"iteration": match[1], **cells}))
    return rows


def _is_trainer_state(text: str) -> bool:
    return text.lstrip().startswith("{") and TRAINER_STATE.search(text) is not None


def _trainer_state_rows(text: str, path: str) -> list[Row]:
    """The log of Hugging Face's Trainer. Its `train_loss` is the mean of the whole run, not of a step."""
    document = _json(text, path)
    history = document.get("log_history") if isinstance(document, dict) else None
    rows = _list_rows(history, f"{path}: log_history")
    return [(where, {name: cell for name, cell in cells.items() if name != "train_loss"}) for where, cells in rows]


def _is_json_list(text: str) -> bool:
    return re.match(r"\s*\[\s*\{", text) is not None


def _json_list_rows(text: str, path: str) -> list[Row]:
    return _list_rows(_json(text, path), path)


def _list_rows(items: Any, where: str) -> list[Row]:
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise CurveError("it is not a list of JSON objects", field=where, allowed=READ)
    return [(f"{where}[{number}]", item) for number, item in enumerate(items)]


def _is_json_lines(text: str) -> bool:
    # Python's own form of a dictionary, which Trainers print, begins with {'.
    return re.match(r'\s*\{\s*["}]', text) is not None


def _json_lines_rows(text: str, path: str) -> list[Row]:
    """One object per line, as in W&B's history and our own metrics.jsonl. An incomplete last line is left out, because
    the file may still be written.
    """
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    rows: list[Row] = []
    for number, line in lines:
        try:
            cells = _parsed(line)
        except ValueError as error:
            if not rows:
                _refuse_one_object(text, path)
            if number == lines[-1][0] and not text.endswith("\n"):
                break
            raise DamagedCurveError(f"it is not JSON: {error}", field=f"{path}:{number}", value=line[:40]) from error
        if not isinstance(cells, dict):
            raise DamagedCurveError("it is not a JSON object", field=f"{path}:{number}", value=line[:40])
        if not rows:
            _refuse_other_records(cells, path)
        # The first row keeps all cells, so that an error can show what the rows hold.
        kept = {name: cell for name, cell in cells.items() if is_known(name)} if rows else cells
        rows.append((f"{path}:{number}", kept))
    return rows


def _refuse_other_records(first: dict[str, Any], path: str) -> None:
    """Raises CurveError when the first row belongs to another file of a run directory."""
    for key, problem in OTHER_RECORDS.items():
        if key in first and "attempt" in first:
            raise CurveError(problem, field="curve", value=path, fix="name metrics.jsonl beside it")


def _refuse_one_object(text: str, path: str) -> None:
    """Raises CurveError for one JSON object over several lines, DamagedCurveError for text that is not JSON."""
    document = _json(text, path)
    raise CurveError(
        "it is one JSON object without log_history, not one per line",
        field=path,
        value=",".join(document)[:SHOWN],
        allowed=READ,
    )


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _json(text: str, path: str) -> Any:
    try:
        return _parsed(text)
    except ValueError as error:
        raise DamagedCurveError(f"it begins like JSON but is not: {error}", field=path) from error


def _table_rows(text: str, path: str) -> list[Row]:
    """CSV with a header line, also with tabs, semicolons or spaces. Keeps only the columns that are used."""
    lines = text.split("\n")
    with _cells_of_any_size():
        first, delimiter = _heading(lines, path)
        names = _cells(lines[first], delimiter)
        wanted = [(place, name) for place, name in enumerate(names) if is_known(name)]
        below = (line + "\n" for line in lines[first + 1 :])
        table = csv.reader(below, delimiter=delimiter, skipinitialspace=True, strict=True)
        rows: list[Row] = []
        begins = first + 2
        try:
            for cells in table:
                where, begins = f"{path}:{begins}", first + 2 + table.line_num
                if any(cell.strip() for cell in cells[len(names) :]):
                    problem = f"{len(cells)} cells under {len(names)} headings"
                    raise DamagedCurveError(problem, field=where, value=delimiter.join(cells)[:40])
                if cells:
                    rows.append((where, {name: cells[place] for place, name in wanted if place < len(cells)}))
        except csv.Error as error:
            problem = f"it is not CSV: {error}, in the row that begins here"
            raise DamagedCurveError(problem, field=f"{path}:{begins}") from error
    return _with_points(rows) if delimiter in ";\t" else rows


def _heading(lines: Sequence[str], path: str) -> tuple[int, str]:
    """The number of the header line, and the delimiter. Raises CurveError when there is none."""
    for number, line in enumerate(lines):
        content = line.strip()
        if not content or content.lower().startswith("sep="):
            continue
        for delimiter in DELIMITERS:
            if names_both(_cells(line, delimiter)):
                return number, delimiter
        if not content.startswith("#"):
            break
    if re.fullmatch(r"[-+0-9.eE,;\s]+", content):
        raise CurveError(
            "its first line holds numbers, not the names of columns",
            field="curve",
            value=path,
            fix="put a line before it that names them: step,loss",
        )
    missing = {"step", "loss"} - {KNOWN.get(alias_of(cell)) for each in DELIMITERS for cell in _cells(line, each)}
    raise CurveError(
        f"its first line has no {' and no '.join(sorted(missing, reverse=True))}",
        field=path,
        value=content[:SHOWN],
        allowed=READ,
    )


def _cells(line: str, delimiter: str) -> list[str]:
    """The cells of a header line; NumPy puts a "#" before it."""
    return [cell.strip() for cell in next(csv.reader([line.lstrip("# ")], delimiter=delimiter, skipinitialspace=True))]


@contextmanager
def _cells_of_any_size() -> Iterator[None]:
    """Lift the process-wide limit of Python's CSV reader, 131,072 characters per cell."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _with_points(rows: list[Row]) -> list[Row]:
    """With semicolons or tabs as delimiters, a comma may be the decimal mark, so 2,5 becomes 2.5. If any number has a
    point, commas may group digits, and nothing is changed. A step with a comma is unchanged, and so refused.
    """
    if any("." in cell for _, cells in rows for cell in cells.values()):
        return rows

    def pointed(name: str, cell: str) -> str:
        known = KNOWN[alias_of(name)] in ("loss", "grad_norm", "lr")
        return cell.replace(",", ".") if known and DECIMAL_COMMA.fullmatch(cell.strip()) else cell

    return [(where, {name: pointed(name, cell) for name, cell in cells.items()}) for where, cells in rows]


def _is_any(text: str) -> bool:
    return True


FORMATS = (
    Format(_is_megatron, _megatron_rows),
    Format(_is_trainer_state, _trainer_state_rows),
    Format(_is_json_list, _json_list_rows),
    Format(_is_json_lines, _json_lines_rows),
    Format(_is_any, _table_rows),
)
"""Formats in the order in which they are tried. The last one accepts every text, and refuses those without a header
line.
"""
