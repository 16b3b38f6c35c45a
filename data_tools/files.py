"""Finds the user's text files, names them, and records what was skipped.

Text files (.txt, .md, .rst, .py) are one document each. JSON Lines (.jsonl, .ndjson, and .json in that format) hold one
document per line. All of these may be compressed as .gz or .zst. Parquet files hold one document per row. The case of a
suffix does not matter, and the suffix of a link is that of its own name.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from data_tools.packed import PACKED, open_packed
from kha_train.errors import ConfigError
from kha_train.foreign.documents import Json

LINES = (".jsonl", ".ndjson")
WHOLE = (".md", ".py", ".rst", ".txt")
PARQUET = ".parquet"
LINED = ".lines"
"""The kind of a file of plain text whose lines are texts, whatever its name."""
READ = f"{' '.join((*WHOLE, *LINES, '.json'))} (also with {' or '.join(PACKED)}), {PARQUET}"
"""The supported files, in words."""
_JSON = ".json"
_FIRST_LINE_BYTES = 16 << 20
_APPLE_DOUBLE = "__MACOSX"
_EXAMPLES = 5


class TextFile(NamedTuple):
    """A file, its name (its POSIX path starting with the name of its root), and where its texts are (`field`: the field
    of a line of JSONL, the column of Parquet; `meta.text` is the field `text` inside the field `meta`). Each line of a
    `lined` one is a text.
    """

    name: str
    path: Path
    field: str = "text"
    lined: bool = False

    @property
    def packed(self) -> bool:
        """Whether the file can only be read from the beginning."""
        return self.path.suffix.lower() in PACKED

    @property
    def kind(self) -> str:
        """`.jsonl`, `.parquet`, `LINED`, or the suffix before .gz and .zst, in lower case. `.jsonl` stands for all
        names of JSON Lines.
        """
        if self.lined:
            return LINED
        kind = (self.path.with_suffix("") if self.packed else self.path).suffix.lower()
        return LINES[0] if kind in (*LINES, _JSON) else kind


class Found(NamedTuple):
    """The text files; the number of files of other kinds beside them, by suffix; the names of hidden files and
    directories, which are skipped; and those of text files that a recipe does not use.
    """

    files: list[TextFile]
    others: Counter[str]
    hidden: list[str]
    unused: Sequence[str] = ()

    def passed_over(self) -> list[str]:
        """What was skipped, in lines for people."""
        lines = []
        if self.others:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.others.most_common(_EXAMPLES))
            lines.append(f"{self.others.total()} files of other kinds left out: {_shortened(kinds, len(self.others))}")
        for what, names in (("hidden files and directories", self.hidden), ("files beside the recipe", self.unused)):
            if names:
                shown = ", ".join(names[:_EXAMPLES])
                lines.append(f"{len(names)} {what} left out: {_shortened(shown, len(names))}")
        return lines


def find_files(roots: Sequence[str | Path], option: str, field: str = "text", lined: tuple[str, ...] = ()) -> Found:
    """The text files in `roots`, files or directories; those of a directory are sorted by name.

    In a directory, hidden entries (a name that begins with a dot, and the `__MACOSX` of archives) are skipped, and
    links to directories are not followed. A root is always read, whatever its name. `option` names the option that gave
    the roots, `field` the text field in a file. Files with a suffix in `lined` are plain text, one text a line.

    Raises ConfigError for a root that is missing or of another kind, for two roots of one name, and when there is no
    text; the error lists what was seen and what is supported.
    """
    found = Found([], Counter(), [])
    names: set[str] = set()
    for given in roots:
        # A link is judged by its own name: the target's name may say nothing, as in a cache of downloads.
        root = Path(os.path.abspath(given))
        if root.name in names:
            raise ConfigError("two roots have the same name", field=option, value=root.name, fix="rename one")
        names.add(root.name)
        if root.is_dir():
            _search(root, field, lined, found)
        elif not root.exists():
            raise ConfigError("no such file or directory", field=option, value=str(given))
        elif is_text(root, field) or root.suffix in lined:
            found.files.append(TextFile(as_text(root.name), root, field, root.suffix in lined))
        else:
            raise ConfigError("not a supported kind of file", field=option, value=str(given), allowed=READ)
    if roots and not found.files:
        raise ConfigError(
            "; ".join(["no text found", *found.passed_over()]),
            field=option,
            value=[str(root) for root in roots],
            allowed=READ,
        )
    return found


def is_text(path: Path, field: str) -> bool:
    """Whether a file is supported text, by its name and, for .json, by its first line."""
    packed = path.suffix.lower() in PACKED
    kind = (path.with_suffix("") if packed else path).suffix.lower()
    if kind == _JSON:
        return _begins_with_a_line(path, field)
    return kind in (*WHOLE, *LINES) or (kind == PARQUET and not packed)


def as_text(name: str) -> str:
    """A name as valid UTF-8: other bytes and lone surrogates become escapes such as `\\xe9`."""
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return name.encode("utf-8", "backslashreplace").decode()


def value_of(item: Json, field: str, absent: Json = None) -> Json:
    """The value of `field` in an object: under exactly this name, or else following the parts between dots. None where
    it, or an object on the way, is null; `absent` where it is missing.
    """
    if isinstance(item, dict) and field in item:
        return item[field]
    for part in field.split("."):
        if item is None:
            return None
        if not isinstance(item, dict) or part not in item:
            return absent
        item = item[part]
    return item


def _search(root: Path, field: str, lined: tuple[str, ...], found: Found) -> None:
    inside = []
    for folder, folders, files in os.walk(root):
        for name in sorted(entry for entry in (*folders, *files) if _is_hidden(entry)):
            found.hidden.append(_name_in(root, Path(folder, name)))
        folders[:] = [name for name in folders if not _is_hidden(name)]
        inside += [(_name_in(root, path), path) for path in _visible(folder, files)]
    for name, path in sorted(inside):
        if is_text(path, field) or path.suffix in lined:
            found.files.append(TextFile(name, path, field, path.suffix in lined))
        else:
            found.others["".join(path.suffixes[-2:]).lower() or "without a suffix"] += 1


def _visible(folder: str, files: Sequence[str]) -> Iterator[Path]:
    return (Path(folder, name) for name in files if not _is_hidden(name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == _APPLE_DOUBLE


def _name_in(root: Path, path: Path) -> str:
    return as_text(f"{root.name}/{path.relative_to(root).as_posix()}")


def _begins_with_a_line(path: Path, field: str) -> bool:
    """Whether the first line is an object with a text in `field`: JSON Lines, not one value over many lines."""
    with open_packed(path) as (lines, _):
        first = lines.readline(_FIRST_LINE_BYTES)
    try:
        return isinstance(value_of(json.loads(first), field), str)
    except (ValueError, RecursionError):
        return False


def _shortened(examples: str, count: int) -> str:
    return examples if count <= _EXAMPLES else f"{examples}, ..."
