"""The manifest of a checkpoint: its files, and where every element of every parameter lies in them.

A manifest is untrusted input. Every type, name and count is checked. The pieces must tile every parameter of every kind
exactly. The bytes must be exactly those this module would write, which rules out repeated keys and hidden extras. The
manifest's own SHA-256 is its last entry. It reveals a flipped bit, and it tells a manifest of an unknown format (whose
SHA-256 is right) from a damaged one.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from kha_train.errors import CheckpointError, FormatError
from kha_train.foreign.files import read_regular
from kha_train.variants.optimizer import OptimSection

VERSION = 1
VERSION_WITH_KINDS = 2
"""The format of a manifest that names its kinds; the same in all else."""
VERSION_WITH_SOME_KINDS = 3
"""The format in which each parameter has only the kinds that its entry lists; the same in all else."""
MANIFEST_FILE = "manifest.json"
TRAINER_FILE = "trainer.json"
KINDS = ("master", "exp_avg", "exp_avg_sq")
"""The kinds of a manifest that names none: the fp32 weights and AdamW's moments."""
MAX_KINDS = 16
ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

MAX_MANIFEST_BYTES = 256 * 2**20
MAX_ELEMENTS = 2**48
MAX_FILE_BYTES = 2**50
MAX_DIMENSIONS = 16
MAX_NAME = 1024
_FILE_NAME = re.compile(r"trainer\.json|(model|optimizer)-[0-9]{5,7}(\.[0-9]{3,6})?\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KIND = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (hex) of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class PieceEntry:
    """`length` fp32 elements of a parameter, starting at flat index `start`, stored as the 1-D tensor `key` of
    `file`.
    """

    file: str
    key: str
    start: int
    length: int


@dataclass(frozen=True)
class ParameterEntry:
    """The global shape of a parameter and, for each of its kinds, its pieces ordered by `start`."""

    shape: tuple[int, ...]
    pieces: dict[str, tuple[PieceEntry, ...]]

    @property
    def elements(self) -> int:
        """Number of elements of the whole parameter."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class BufferEntry:
    """A whole buffer: tensor `key` of `file`, with its shape and safetensors dtype name."""

    file: str
    key: str
    dtype: str
    shape: tuple[int, ...]


class Kinds(NamedTuple):
    """What is stored of parameters: the master weights and the optimiser's states, by `names`, of every parameter; with
    `of_some` each state only of some.
    """

    names: tuple[str, ...] = KINDS
    of_some: bool = False

    @staticmethod
    def of(optim: OptimSection) -> Kinds:
        """Those of an optimiser."""
        return Kinds(optim.kinds(), optim.map_states is not None)


UNNAMED = Kinds()
"""Those of a manifest that names none."""


@dataclass(frozen=True)
class Contents:
    """What a manifest, or one rank's share of it, lists: files, parameters and buffers by name, and the `kinds`."""

    files: dict[str, FileEntry]
    parameters: dict[str, ParameterEntry]
    buffers: dict[str, BufferEntry]
    kinds: Kinds = UNNAMED

    @property
    def version(self) -> int:
        """The format of a manifest of these contents."""
        if self.kinds.of_some:
            return VERSION_WITH_SOME_KINDS
        return VERSION if self.kinds.names == KINDS else VERSION_WITH_KINDS

    def named_kinds(self) -> dict[str, Any]:
        """The entries that name the kinds; none for `KINDS` of every parameter, which older manifests imply."""
        if self.version == VERSION:
            return {}
        return {"kinds": list(self.kinds.names)} | ({"some_kinds": True} if self.kinds.of_some else {})

    def to_plain(self) -> dict[str, Any]:
        """As plain JSON, the inverse of `parse_contents`."""
        return self.named_kinds() | self.sections()

    def sections(self) -> dict[str, dict[str, Any]]:
        """The sections of the manifest, as plain JSON."""
        return {
            "files": {name: {"sha256": entry.sha256, "size": entry.size} for name, entry in self.files.items()},
            "parameters": {
                name: {"shape": list(entry.shape)}
                | {kind: [[p.file, p.key, p.start, p.length] for p in entry.pieces[kind]] for kind in entry.pieces}
                for name, entry in self.parameters.items()
            },
            "buffers": {name: vars(entry) | {"shape": list(entry.shape)} for name, entry in self.buffers.items()},
        }


@dataclass(frozen=True)
class Manifest:
    """A whole checkpoint: the optimiser step it was taken after, the tool that wrote it, and its contents."""

    step: int
    tool: str
    contents: Contents

    def encode(self) -> bytes:
        """The bytes of manifest.json: sorted keys, one line per file, parameter or buffer, its own SHA-256 last."""
        contents = self.contents
        head = {"format": contents.version, "step": self.step, "tool": self.tool} | contents.named_kinds()
        lines = [f"{_dumps(key)}: {_dumps(value)}" for key, value in head.items()]
        for title, section in contents.sections().items():
            rows = ",\n".join(f"  {_dumps(name)}: {_dumps(section[name])}" for name in sorted(section))
            lines.append(f"{_dumps(title)}: {{\n{rows}\n}}")
        body = "{\n" + ",\n".join(lines)
        return _sealed(body.encode())


def parse_manifest(raw: bytes, where: str = MANIFEST_FILE) -> Manifest:
    """The manifest in `raw`. Raises CheckpointError naming `where`, the expected and the found value when anything is
    wrong, and FormatError when it is intact but of an unknown format.
    """
    check = _Check(where)
    top = check.mapping(_loads(raw, check), "top level")
    named = [name for name in ("kinds", "some_kinds") if name in top]
    if top.get("format") != (VERSION, VERSION_WITH_KINDS, VERSION_WITH_SOME_KINDS)[len(named)]:
        allowed = f"{VERSION} to {VERSION_WITH_SOME_KINDS}"
        if _is_whole(raw):
            problem, fix = "written by another version, in a format unknown here", "use the version that wrote it"
            raise FormatError(problem, field=where, value=str(top.get("format"))[:80], allowed=allowed, fix=fix)
        check.fail("unknown format version", allowed, top.get("format"))
    sections = ("files", "parameters", "buffers", *named)
    check.keys(top, {"format", "step", "tool", "sha256", *sections}, "top level")
    contents = parse_contents({name: top[name] for name in sections}, where)
    manifest = Manifest(check.count(top["step"], "step", 10**15 - 1), check.text(top["tool"], "tool"), contents)
    check_coverage(contents, where)
    if manifest.encode() != raw:
        check.fail("its bytes do not match its contents and SHA-256", "the bytes that were written", top["sha256"])
    return manifest


def manifest_sha256(checkpoint: Path) -> str | None:
    """The SHA-256 of the manifest of a checkpoint's directory; None where there is none."""
    raw = read_regular(checkpoint / MANIFEST_FILE, limit=MAX_MANIFEST_BYTES)
    return None if raw is None else hashlib.sha256(raw).hexdigest()


def parse_contents(found: object, where: str) -> Contents:
    """The sections files, parameters and buffers, and the kinds if they are named; every value is checked. Raises
    CheckpointError naming `where`.
    """
    check = _Check(where)
    top = check.mapping(found, "contents")
    kinds = Kinds(check.kinds(top["kinds"]) if "kinds" in top else KINDS, "some_kinds" in top)
    if kinds.of_some and ("kinds" not in top or top["some_kinds"] is not True):
        check.fail("some_kinds is not as it is written", "true, beside kinds", top["some_kinds"])
    rest = {name: top[name] for name in top if name not in ("kinds", "some_kinds")}
    check.keys(rest, {"files", "parameters", "buffers"}, "contents")
    files = {name: check.file(name, entry) for name, entry in check.mapping(top["files"], "files").items()}
    parameters = check.mapping(top["parameters"], "parameters").items()
    buffers = check.mapping(top["buffers"], "buffers").items()
    contents = Contents(
        files,
        {check.name(name): check.parameter(name, entry, kinds) for name, entry in parameters},
        {check.name(name): check.buffer(name, entry) for name, entry in buffers},
        kinds,
    )
    _check_fits(contents, check)
    return contents


def check_coverage(contents: Contents, where: str = MANIFEST_FILE) -> None:
    """Raises CheckpointError unless the pieces tile every parameter in each of its kinds: no gap, no overlap, no
    excess.
    """
    check = _Check(where)
    for name, parameter in contents.parameters.items():
        for kind, pieces in parameter.pieces.items():
            end = 0
            for piece in pieces:
                if piece.start != end:
                    trouble = "a gap" if piece.start > end else "an overlap"
                    check.fail(f"{trouble} in {kind} of {name}", f"a piece from element {end}", piece.start)
                end += piece.length
            if end != parameter.elements:
                check.fail(f"{kind} of {name} is not covered", f"{parameter.elements} elements", end)


def _check_fits(contents: Contents, check: _Check) -> None:
    """Each tensor is listed once, in a listed safetensors file that is large enough for all its tensors."""
    used: dict[str, int] = {}
    seen: set[tuple[str, str]] = set()
    tensors = [
        (piece.file, piece.key, 4 * piece.length)
        for parameter in contents.parameters.values()
        for pieces in parameter.pieces.values()
        for piece in pieces
    ]
    tensors += [(b.file, b.key, ELEMENT_BYTES[b.dtype] * math.prod(b.shape)) for b in contents.buffers.values()]
    for file, key, size in tensors:
        if file == TRAINER_FILE or file not in contents.files:
            check.fail(f"tensor {key!r} lies in a file that is not listed", "a safetensors file of the manifest", file)
        if (file, key) in seen:
            check.fail(f"tensor {key!r} of {file} is listed twice", "one use", key)
        seen.add((file, key))
        used[file] = used.get(file, 0) + size
    for file, size in used.items():
        if size > contents.files[file].size:
            check.fail(f"{file} is too small for its tensors", f"at least {size} bytes", contents.files[file].size)


@dataclass(frozen=True)
class _Check:
    """Reads untrusted JSON values. Every method returns the checked value or raises CheckpointError."""

    where: str

    def fail(self, problem: str, expected: str, found: Any) -> NoReturn:
        shown = found if isinstance(found, int | float | bool) else str(found)[:80]
        raise CheckpointError(problem, field=self.where, value=shown, allowed=expected)

    def mapping(self, found: Any, what: str) -> dict[str, Any]:
        return (
            found if type(found) is dict else self.fail(f"{what} has the wrong type", "an object", type(found).__name__)
        )

    def sequence(self, found: Any, what: str) -> list[Any]:
        return found if type(found) is list else self.fail(f"{what} has the wrong type", "a list", type(found).__name__)

    def keys(self, found: dict[str, Any], expected: set[str], what: str) -> None:
        if set(found) != expected:
            self.fail(f"{what} has the wrong keys", ", ".join(sorted(expected)), sorted(found))

    def count(self, found: Any, what: str, largest: int) -> int:
        if type(found) is not int or not 0 <= found <= largest:
            self.fail(f"{what} is not a count", f"an integer from 0 to {largest}", str(found)[:40])
        return found

    def text(self, found: Any, what: str) -> str:
        if type(found) is not str or not 0 < len(found) <= MAX_NAME or not found.isprintable():
            self.fail(f"{what} is not a valid name", f"1 to {MAX_NAME} printable characters", repr(found))
        return found

    def name(self, found: Any) -> str:
        return self.text(found, "a parameter or buffer name")

    def shape(self, found: Any, what: str) -> tuple[int, ...]:
        sizes = tuple(self.count(size, f"shape of {what}", MAX_ELEMENTS) for size in self.sequence(found, "shape"))
        if len(sizes) > MAX_DIMENSIONS or math.prod(sizes) > MAX_ELEMENTS:
            self.fail(f"shape of {what} is too large", f"{MAX_DIMENSIONS} dimensions, {MAX_ELEMENTS} elements", sizes)
        return sizes

    def file(self, name: str, found: Any) -> FileEntry:
        if not _FILE_NAME.fullmatch(name):
            self.fail("not a file name of a checkpoint", "trainer.json, model- or optimizer-*.safetensors", repr(name))
        entry = self.mapping(found, name)
        self.keys(entry, {"size", "sha256"}, name)
        if not _SHA256.fullmatch(self.text(entry["sha256"], f"sha256 of {name}")):
            self.fail(f"sha256 of {name} is malformed", "64 hexadecimal digits", entry["sha256"])
        return FileEntry(self.count(entry["size"], f"size of {name}", MAX_FILE_BYTES), entry["sha256"])

    def kinds(self, found: Any) -> tuple[str, ...]:
        kinds = tuple(self.text(kind, "a kind") for kind in self.sequence(found, "kinds"))
        well_named = all(_KIND.fullmatch(kind) and kind != "shape" for kind in kinds)
        if not well_named or len(set(kinds)) != len(kinds) or len(kinds) > MAX_KINDS or kinds[:1] != KINDS[:1]:
            self.fail("the kinds are malformed", f"{KINDS[0]} and at most {MAX_KINDS - 1} other names", kinds)
        return kinds

    def parameter(self, name: str, found: Any, stored: Kinds) -> ParameterEntry:
        entry = self.mapping(found, name)
        kinds = stored.names
        if stored.of_some:
            kinds = tuple(kind for kind in kinds if kind in entry or kind == KINDS[0])
        self.keys(entry, {"shape", *kinds}, name)
        pieces = {kind: tuple(self.piece(name, p) for p in self.sequence(entry[kind], kind)) for kind in kinds}
        return ParameterEntry(self.shape(entry["shape"], name), pieces)

    def piece(self, name: str, found: Any) -> PieceEntry:
        if len(self.sequence(found, f"a piece of {name}")) != 4:
            self.fail(f"a piece of {name} has the wrong length", "[file, key, start, length]", found)
        start = self.count(found[2], f"start of a piece of {name}", MAX_ELEMENTS)
        length = self.count(found[3], f"length of a piece of {name}", MAX_ELEMENTS)
        return PieceEntry(self.text(found[0], "a file name"), self.text(found[1], "a tensor key"), start, length)

    def buffer(self, name: str, found: Any) -> BufferEntry:
        entry = self.mapping(found, name)
        self.keys(entry, {"file", "key", "dtype", "shape"}, name)
        if self.text(entry["dtype"], f"dtype of {name}") not in ELEMENT_BYTES:
            self.fail(f"dtype of {name} is unknown", ", ".join(ELEMENT_BYTES), entry["dtype"])
        file, key = self.text(entry["file"], "a file name"), self.text(entry["key"], "a tensor key")
        return BufferEntry(file, key, entry["dtype"], self.shape(entry["shape"], name))


def _sealed(body: bytes) -> bytes:
    """The lines of a manifest followed by their SHA-256 as the last entry."""
    return body + f',\n"sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def _is_whole(raw: bytes) -> bool:
    """Whether `raw` ends with its own SHA-256, as manifests of every format do."""
    return raw == _sealed(raw.rpartition(b',\n"sha256": ')[0])


def _dumps(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _loads(raw: bytes, check: _Check) -> Any:
    if len(raw) > MAX_MANIFEST_BYTES:
        check.fail("too large", f"at most {MAX_MANIFEST_BYTES} bytes", len(raw))
    try:
        return json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not JSON: {error}", field=check.where, value=f"{len(raw)} bytes") from error
