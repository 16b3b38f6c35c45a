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
from typing import Any

from data_tools.texts import Document, TextFile, find_files, read_jsonl, read_parquet, read_text
from kha_train.errors import ConfigError

SPLITS = ("train", "validation")
DESCRIPTION_NAME = "corpus.json"
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


def _documents(standard_library: bool, extra_roots: Sequence[str | Path], skipped: list[str]) -> Iterator[Document]:
    own = find_files(extra_roots, "extra_root")
    for file in (*(_standard_library() if standard_library else ()), *own):
        yield from _read_file(file, skipped)


def _standard_library() -> list[TextFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_DIRECTORIES]
        found += [
            Path(folder, name) for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return sorted(TextFile(path.relative_to(root).as_posix(), path) for path in found)


def _read_file(file: TextFile, skipped: list[str]) -> Iterator[Document]:
    if file.kind == ".jsonl":
        for document in read_jsonl(file.path, "line"):
            yield Document(f"{file.name}#{document.path}", document.text)
    elif file.kind == ".parquet":
        texts = (text for group in read_parquet(file.path) for text in group if text)
        yield from (Document(f"{file.name}#row:{number}", text) for number, text in enumerate(texts, start=1))
    else:
        text = read_text(file.path)
        if text is None:
            skipped.append(file.name)
        elif text:
            yield Document(file.name, text)


def _sources(standard_library: bool, extra_roots: Sequence[str | Path]) -> list[str]:
    own = [f"the standard library of {platform.python_implementation()} {platform.python_version()} (PSF-2.0)"]
    return (own if standard_library else []) + [Path(root).resolve().name for root in extra_roots]
