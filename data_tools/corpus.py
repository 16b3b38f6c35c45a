"""A corpus for a first run that needs no download: the Python sources of the running interpreter's standard library.

A corpus is a directory of `train.jsonl` and `validation.jsonl`, one document per line ({"path", "text"}), and
`corpus.json`, which records the source of the text and its hash. The hash is needed because the library differs between
Python builds. The hash of a document's path alone decides whether it goes to validation, so adding documents moves no
other.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data_tools.files import LINES, PARQUET, TextFile, as_text, find_files
from data_tools.parquet import read_parquet
from data_tools.texts import Document, LeftOut, read_jsonl, read_text
from kha_train.config.first_steps import quickstart_first
from kha_train.errors import ConfigError, Options
from kha_train.record.redact import Redactor

SPLITS = ("train", "validation")
DESCRIPTION_NAME = "corpus.json"
LISTED_HIDDEN = 20
"""The description names this many hidden files and directories; the others are only counted."""
_VALIDATION_PERCENT = 2
_SKIPPED_DIRECTORIES = {
    "__pycache__",
    "dist-packages",
    "idle_test",
    "idlelib",
    "lib2to3",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}


def split_of(path: str) -> str:
    """The split of a document: validation if the SHA-256 of its path, as a number, modulo 100 is below 2."""
    number = int(hashlib.sha256(path.encode()).hexdigest(), 16)
    return "validation" if number % 100 < _VALIDATION_PERCENT else "train"


def build_corpus(
    directory: str | Path,
    *,
    standard_library: bool = True,
    extra_roots: Sequence[str | Path] = (),
    field: str = "text",
    keep_repeated: bool = False,
    skip_bad_lines: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write a corpus and return its description (the content of `corpus.json`); `progress` receives bytes of text.

    `extra_roots` are files or directories of the user's own text (see `files.py`), `field` is the text field in JSONL
    and Parquet. Files that are not UTF-8 are left out and named. So are exact duplicates unless `keep_repeated`, and
    bad lines of JSONL with `skip_bad_lines`. Files get their final names once the corpus is complete.

    Raises ConfigError for a root that is missing or is a file of the corpus itself, for an empty corpus, and for an
    existing one unless `overwrite`; DataError for a line without text.
    """
    directory = Path(directory)
    found = find_files(extra_roots, "extra_root", field)
    _refuse(directory, found.files, overwrite)
    directory.mkdir(parents=True, exist_ok=True)
    left_out = LeftOut(skip_bad_lines)
    with TemporaryDirectory(prefix=".collecting-", dir=directory) as beside:
        documents = _documents(standard_library, found.files, left_out)
        description = _collect(Path(beside), documents, keep_repeated, progress)
        if not description["splits"]["train"]["documents"]:
            raise ConfigError("no text found", field="corpus", value=[str(root) for root in extra_roots])
        found_beside = {
            "not_utf8": left_out.files,
            "bad_lines": {"count": left_out.bad_lines, "first": left_out.listed},
            "sources": _sources(standard_library, extra_roots),
            "other_kinds": found.others.total(),
            "hidden": {"count": len(found.hidden), "first": found.hidden[:LISTED_HIDDEN]},
        }
        description |= Redactor.from_environment().clean(found_beside)
        (Path(beside) / DESCRIPTION_NAME).write_text(json.dumps(description, indent=1), encoding="ascii")
        (directory / DESCRIPTION_NAME).unlink(missing_ok=True)
        for name in (*(f"{split}.jsonl" for split in SPLITS), DESCRIPTION_NAME):
            os.replace(Path(beside) / name, directory / name)
    return description


def _refuse(directory: Path, files: Sequence[TextFile], overwrite: bool) -> None:
    """Raises ConfigError when writing a corpus there would overwrite something."""
    names = (*(f"{split}.jsonl" for split in SPLITS), DESCRIPTION_NAME)
    if not overwrite and any((directory / name).exists() for name in names):
        raise ConfigError(
            "a corpus already exists here", field="out", value=str(directory), fix=Options("--overwrite", "pass {}")
        )
    for file in files:
        if file.path.parent == directory.resolve() and file.path.name in names:
            raise ConfigError("would be overwritten", field="extra_root", value=str(file.path), fix="another --out")


def _collect(
    directory: Path,
    documents: Iterable[Document],
    keep_repeated: bool,
    progress: Callable[[int], None] | None,
) -> dict[str, Any]:
    """Write both splits and count their documents."""
    counts = {name: {"documents": 0, "bytes": 0} for name in SPLITS}
    seen: set[bytes] = set()
    digest, repeated = hashlib.sha256(), 0
    with ExitStack() as stack:
        files = {split: stack.enter_context(open(directory / f"{split}.jsonl", "wb")) for split in SPLITS}
        for document in documents:
            data = document.text.encode()
            fingerprint = hashlib.sha256(data).digest()
            repeated += fingerprint in seen
            if fingerprint in seen and not keep_repeated:
                continue
            seen.add(fingerprint)
            digest.update(document.path.encode() + b"\0" + fingerprint)
            split = split_of(document.path)
            files[split].write(json.dumps(document._asdict()).encode() + b"\n")
            counts[split]["documents"] += 1
            counts[split]["bytes"] += len(data)
            if progress is not None:
                progress(len(data))
    return {
        "documents": sum(count["documents"] for count in counts.values()),
        "bytes": sum(count["bytes"] for count in counts.values()),
        "sha256": digest.hexdigest(),
        "splits": counts,
        "repeated": repeated,
    }


def read_split(directory: str | Path, split: str) -> Iterator[Document]:
    """The documents of one split of a corpus, in order. Raises ConfigError when missing, DataError for a bad line."""
    yield from read_jsonl(TextFile(f"{split}.jsonl", split_path(directory, split)), LeftOut())


def split_path(directory: str | Path, split: str) -> Path:
    """The file of one split. Raises ConfigError when it is missing."""
    path = Path(directory) / f"{split}.jsonl"
    if not path.is_file():
        fix = quickstart_first(directory) or "`kha data corpus` makes one"
        raise ConfigError(f"not a corpus: it has no {path.name}", field="corpus", value=str(directory), fix=fix)
    return path


def _documents(standard_library: bool, own: Sequence[TextFile], left_out: LeftOut) -> Iterator[Document]:
    for file in (*(_standard_library() if standard_library else ()), *own):
        yield from _read_file(file, left_out)


def _standard_library() -> list[TextFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_DIRECTORIES]
        found += [
            Path(folder, name) for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return sorted(TextFile(path.relative_to(root).as_posix(), path) for path in found)


def _read_file(file: TextFile, left_out: LeftOut) -> Iterator[Document]:
    """The documents of a file; `left_out` records a file that is not UTF-8, and bad lines."""
    if file.kind == LINES[0]:
        for path, text in read_jsonl(file, left_out):
            yield Document(f"{file.name}#{path}" if path else _name_of(text), text)
    elif file.kind == PARQUET:
        yield from (Document(_name_of(text), text) for _, some in read_parquet(file) for text in some if text)
    else:
        whole = read_text(file.path)
        if whole is None:
            left_out.files.append(file.name)
        if whole:
            yield Document(file.name, whole)


def _name_of(text: str) -> str:
    """A name for a text without one. It depends on the text alone, not on its position."""
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _sources(standard_library: bool, extra_roots: Sequence[str | Path]) -> list[str]:
    own = [f"the standard library of {platform.python_implementation()} {platform.python_version()} (PSF-2.0)"]
    return (own if standard_library else []) + [as_text(Path(os.path.abspath(root)).name) for root in extra_roots]
