"""Text for a first run, always at hand: the Python sources of the standard library of the running interpreter.

A corpus is a directory of `train.jsonl` and `validation.jsonl`, one document a line ({"path", "text"}), and
`corpus.json`, which tells where the text came from and its hash. It differs between Python builds, hence the hash.
A document goes to validation by the hash of its path alone, so adding documents moves no other.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.importers import open_packed, read_parquet
from kha_train.errors import ConfigError, DataError

SPLITS = ("train", "validation")
DESCRIPTION_NAME = "corpus.json"
EXTRA_SUFFIXES = tuple(
    f"{kind}{packed}" for kind in (".jsonl", ".md", ".py", ".rst", ".txt") for packed in ("", ".gz", ".zst")
) + (".parquet",)
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


class Document(NamedTuple):
    """One text, named by a POSIX path that is the same on every machine."""

    path: str
    text: str


def split_of(path: str) -> str:
    """The split a document belongs to: SHA-256 of its path, as a number, modulo 100 below 2 is validation."""
    number = int(hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest(), 16)
    return "validation" if number % 100 < _VALIDATION_PERCENT else "train"


def build_corpus(
    directory: str | Path,
    *,
    standard_library: bool = True,
    extra_roots: Sequence[str | Path] = (),
    keep_repeated: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write a corpus and return its description (what `corpus.json` holds); `progress` gets bytes of text.

    `extra_roots` are files or directories of the user's own text: .txt, .md, .rst and .py files are one document each,
    .jsonl files one document a line, .parquet files one a row; all but Parquet also as .gz and .zst. Files that are not
    UTF-8 are left out and counted, and so are exact repetitions unless `keep_repeated`.
    Raises ConfigError for a missing root or an empty corpus, DataError for a JSONL line without text.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / DESCRIPTION_NAME).unlink(missing_ok=True)
    counts = {name: {"documents": 0, "bytes": 0} for name in SPLITS}
    seen: set[bytes] = set()
    digest, repeated, skipped = hashlib.sha256(), 0, []
    with open(directory / "train.jsonl", "wb") as train, open(directory / "validation.jsonl", "wb") as validation:
        files = dict(zip(SPLITS, (train, validation), strict=True))
        for document in _documents(standard_library, extra_roots, skipped):
            data = document.text.encode()
            fingerprint = hashlib.sha256(data).digest()
            repeated += fingerprint in seen
            if fingerprint in seen and not keep_repeated:
                continue
            seen.add(fingerprint)
            digest.update(document.path.encode("utf-8", "surrogateescape") + b"\0" + fingerprint)
            split = split_of(document.path)
            files[split].write(json.dumps(document._asdict()).encode() + b"\n")
            counts[split]["documents"] += 1
            counts[split]["bytes"] += len(data)
            if progress is not None:
                progress(len(data))
    if not counts["train"]["documents"]:
        raise ConfigError("no text found", field="corpus", value=[str(root) for root in extra_roots])
    description = {
        "sources": _sources(standard_library, extra_roots),
        "documents": sum(count["documents"] for count in counts.values()),
        "bytes": sum(count["bytes"] for count in counts.values()),
        "sha256": digest.hexdigest(),
        "splits": counts,
        "repeated": repeated,
        "not_utf8": len(skipped),
    }
    temporary = directory / f".{DESCRIPTION_NAME}.{os.getpid()}"
    temporary.write_text(json.dumps(description, indent=1), encoding="ascii")
    os.replace(temporary, directory / DESCRIPTION_NAME)
    return description


def read_split(directory: str | Path, split: str) -> Iterator[Document]:
    """The documents of one split of a corpus, in order. Raises ConfigError when missing, DataError for a bad line."""
    yield from read_jsonl(split_path(directory, split), split)


def split_path(directory: str | Path, split: str) -> Path:
    """The file of one split. Raises ConfigError when it is missing."""
    path = Path(directory) / f"{split}.jsonl"
    if not path.is_file():
        raise ConfigError(
            f"not a corpus: it has no {path.name}", field="corpus", value=str(directory), fix="`kha data corpus`"
        )
    return path


def read_jsonl(path: Path, name: str) -> Iterator[Document]:
    """The documents of a JSONL file; one without a "path" is called `name:line`. Raises DataError for a bad line."""
    with open_packed(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield parse_line(line, f"{name}:{number}", path)


def parse_line(line: bytes, name: str, path: Path) -> Document:
    """The document in one line of JSONL. Raises DataError when it is not an object with a UTF-8 "text"."""
    try:
        value = json.loads(line)
        text = value["text"]
        text.encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f'{name}: not a JSON object with a "text": {error}', field=str(path)) from error
    given = value.get("path")
    return Document(given if isinstance(given, str) else name, text)


def _documents(standard_library: bool, extra_roots: Sequence[str | Path], skipped: list[str]) -> Iterator[Document]:
    if standard_library:
        root = Path(sysconfig.get_paths()["stdlib"])
        yield from _read_tree(root, "", (".py",), skipped)
    names: set[str] = set()
    for given in extra_roots:
        root = Path(given).resolve()
        if root.name in names:
            raise ConfigError("two roots of one name", field="extra_root", value=root.name, fix="rename one")
        names.add(root.name)
        if not root.exists():
            raise ConfigError("no such file or directory", field="extra_root", value=str(given))
        if root.is_dir():
            yield from _read_tree(root, f"{root.name}/", EXTRA_SUFFIXES, skipped)
        else:
            yield from _read_file(root, root.name, skipped)


def _read_tree(root: Path, prefix: str, suffixes: tuple[str, ...], skipped: list[str]) -> Iterator[Document]:
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if prefix or name not in _SKIPPED_DIRECTORIES]
        paths += [Path(folder, name) for name in files if name.endswith(suffixes)]
    named = sorted((prefix + path.relative_to(root).as_posix(), path) for path in paths)
    for name, path in named:
        if prefix or not path.name.startswith("_sysconfigdata"):
            yield from _read_file(path, name, skipped)


def _read_file(path: Path, name: str, skipped: list[str]) -> Iterator[Document]:
    inner = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
    if inner.suffix == ".jsonl":
        for document in read_jsonl(path, "line"):
            yield Document(f"{name}#{document.path}", document.text)
        return
    if inner.suffix == ".parquet":
        for number, text in enumerate(read_parquet(path), start=1):
            yield Document(f"{name}#row:{number}", text)
        return
    try:
        with open_packed(path) as file:
            text = file.read().decode("utf-8")
    except UnicodeDecodeError:
        skipped.append(name)
        return
    if text:
        yield Document(name, text)


def _sources(standard_library: bool, extra_roots: Sequence[str | Path]) -> list[str]:
    own = [f"the standard library of {platform.python_implementation()} {platform.python_version()} (PSF-2.0)"]
    return (own if standard_library else []) + [Path(root).resolve().name for root in extra_roots]
