"""Checks a certificate of `kha compare --certify` with Python's standard library alone: a copy lies beside the report.

    python verify.py [CERTIFICATE] [--runs DIRECTORY] [--seal SHA256]

A certificate is a chain of links. A link holds named fields of files, and its SHA-256 covers them and the SHA-256 of
the link before. This file makes the fields from a run directory (`run_links`), so that whoever writes a certificate and
whoever checks it read the same. Exit codes: 0 everything agrees, 1 something differs, 2 there is no certificate.

A chain shows that nothing has changed since it was made. It cannot show that the files were right then: whoever changes
a file and makes a new chain gets another seal, which only a copy of the first seal kept elsewhere reveals. That the
record follows from the code and the data is shown by recomputing it (`kha compare --replay`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Fields = dict[str, dict[str, str]]
"""File -> name of a field in it -> its value, or the SHA-256 of its value."""

FORMAT = 1
CERTIFICATE = "certificate.json"
KEYS = {"format", "facts", "runs", "report", "seal"}
"""The keys of a certificate: `facts` are its figures, `runs` the chain of each run, `report` the chain that follows."""
RUN_LINKS = {
    "data order": "run.json: content ids, seeds and settings that order the data; metrics.jsonl: the sample numbers of "
    "every step",
    "settings": "config.yaml, and in run.json the configuration of every attempt",
    "attempts": "run.json without configurations: id, provenance, attempts, declared metrics, totals",
    "record": "metrics.jsonl, metrics.discarded.jsonl and events.jsonl: every byte, every column, groups of lines",
    "checkpoints": "the published checkpoints: manifests, trainer states, and the tensors with their headers",
}
"""What the links of a run cover, in their order."""
REPORT_LINKS = {
    "figures": "every figure of this certificate, those of the report among them",
    "report": "the files of the report, and this verifier",
}
"""What the links over all runs cover. The first follows the last links of all runs."""
RECORD_FILES = ("metrics.jsonl", "metrics.discarded.jsonl", "events.jsonl")
MOST_GROUPS, MOST_TENSORS, MOST_VALUES = 64, 256, 512
"""Lines of a file, tensors of a checkpoint and values of a JSON file beyond these numbers are hashed in groups."""
SHOWN = 120
"""A longer value is represented by its SHA-256."""
MOST_NAMED = 8
"""Differing fields of a file that are printed."""
CHUNK = 1 << 22
RELATIVE = 1e-9
"""Relative error allowed for a figure that is computed again: sums may have another order."""
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True)
_STEP = re.compile(r"step-[0-9]{8,15}")
_OF_ORDER = re.compile(r"content_id|\.config\.(whole|changed|without)(\.data\.|\.run\.seed$|\.model\.seq_len$|$)")


def canonical(value: object) -> bytes:
    """The one text of a JSON value that is hashed: ASCII, sorted keys, no spaces, shortest floats that read back."""
    return _ENCODER.encode(value).encode()


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def sealed(links: Mapping[str, str], fields: Mapping[str, Fields], previous: str) -> list[dict[str, Any]]:
    """The chain of `links` (name -> what it covers) over their `fields`; it follows `previous`."""
    chain = []
    for name, covers in links.items():
        link = {"name": name, "covers": covers, "fields": fields[name], "previous": previous}
        previous = digest(canonical(link))
        chain.append({**link, "sha256": previous})
    return chain


def run_links(run: Path, advance: Callable[[int], None] = lambda size: None) -> list[dict[str, Any]]:
    """The chain of the run directory `run`. `advance` receives the bytes of tensors that are done.

    Raises OSError when a file cannot be read.
    """
    told = _leaves_of(run / "run.json")
    settings = {name: value for name, value in told.items() if ".config." in name}
    rest = {name: value for name, value in told.items() if name not in settings}
    ordering = {name: value for name, value in told.items() if _OF_ORDER.search(name)}
    fields: dict[str, Fields] = {
        "data order": {"run.json": ordering, "metrics.jsonl": _sample_numbers(run / "metrics.jsonl")},
        "settings": {"config.yaml": _yaml_fields(run / "config.yaml"), "run.json": settings},
        "attempts": {"run.json": {"file": _file(run / "run.json"), **rest}},
        "record": {name: _record_fields(run / name) for name in RECORD_FILES},
        "checkpoints": dict(_checkpoint_fields(run / "checkpoints", advance)),
    }
    return sealed(RUN_LINKS, fields, "")


def report_links(directory: Path, facts: object, heads: Sequence[str], files: Iterable[str]) -> list[dict[str, Any]]:
    """The chain over the `facts` of a certificate and the `files` of its report in `directory`; `heads` are the last
    SHA-256 of every run. Raises OSError when a file cannot be read.
    """
    # Last, and over the whole: two keys can make one dotted name.
    shown = {name: _shown(value) for name, value in leaves(facts)}
    figures = {CERTIFICATE: {**shown, "file": digest(canonical(facts))}}
    written = {name: {"file": _file(directory / name)} for name in sorted(files)}
    return sealed(REPORT_LINKS, {"figures": figures, "report": written}, digest(canonical(list(heads))))


def leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """(dotted path, value) of everything inside nested objects and lists of objects; a list of numbers is one value."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            yield from leaves(item, f"{path}[{number}]")
    else:
        yield path, value


def mean_difference(reference: Path, other: Path, first: int, last: int) -> float | None:
    """Mean of the train loss of `other` - `reference` at the common steps from `first` to `last` where both are finite;
    None without any. Raises OSError when a record cannot be read.
    """
    one, two = _losses(reference), _losses(other)
    apart = [two[step] - one[step] for step in one.keys() & two.keys() if first <= step <= last]
    return math.fsum(apart) / len(apart) if apart else None


def _losses(run: Path) -> dict[int, float]:
    found = {}
    for _, line in _json_lines(run / "metrics.jsonl"):
        step, loss = line.get("step"), line.get("train/loss")
        if isinstance(step, int) and isinstance(loss, int | float) and math.isfinite(loss):
            found[step] = float(loss)
    return found


def _file(path: Path) -> str:
    """Size and SHA-256 of a file, in words."""
    whole, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                whole.update(chunk)
                size += len(chunk)
    except FileNotFoundError:
        return "missing"
    return f"{size} bytes, SHA-256 {whole.hexdigest()}"


def _shown(value: object) -> str:
    text = canonical(value)
    return text.decode() if len(text) <= SHOWN else f"SHA-256 {digest(text)}"


def _parsed(text: bytes) -> Any:
    """The JSON value of `text`; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _leaves_of(path: Path) -> dict[str, str]:
    content = _parsed(path.read_bytes()) if path.is_file() else None
    return {name: _shown(value) for name, value in leaves(content)} if content is not None else {}


def _json_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Every line, and the object on it; an empty one where there is none. Nothing for a missing file."""
    if path.is_file():
        with path.open("rb") as file:
            for text in file:
                found = _parsed(text)
                yield text, found if isinstance(found, dict) else {}


def _sample_numbers(path: Path) -> dict[str, str]:
    whole, count = hashlib.sha256(), 0
    for _, line in _json_lines(path):
        whole.update(canonical([line.get(key) for key in ("step", "samples_first", "samples_last")]))
        count += 1
    return {"steps": f"{count} lines", "samples_first, samples_last": whole.hexdigest()}


def _record_fields(path: Path) -> dict[str, str]:
    """The file, every column over all lines, and groups of lines."""
    lines = 0
    if path.is_file():
        with path.open("rb") as file:
            lines = sum(1 for _ in file)
    size = max(1, math.ceil(lines / MOST_GROUPS))
    columns: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    for number, (text, line) in enumerate(_json_lines(path)):
        first = number // size * size + 1
        label = f"line {first}" if size == 1 else f"lines {first} to {first + size - 1}"
        groups.setdefault(label, hashlib.sha256()).update(text)
        for key, value in line.items():
            columns.setdefault(f"column {key}", hashlib.sha256()).update(canonical([number, value]))
    hashes = {**dict(sorted(columns.items())), **groups}
    return {"file": _file(path), **{name: found.hexdigest() for name, found in hashes.items()}}


def _yaml_fields(path: Path) -> dict[str, str]:
    """The file, and every line of it under the keys that lead to it."""
    fields, above = {"file": _file(path)}, list[tuple[int, str]]()
    text = path.read_bytes().decode("utf-8", "backslashreplace") if path.is_file() else ""
    for number, line in enumerate(text.splitlines(), start=1):
        indent = len(line) - len(line.lstrip(" "))
        above = [(depth, key) for depth, key in above if depth < indent]
        above.append((indent, line.partition(":")[0].strip(" -'\"")))
        fields[f"{'.'.join(key for _, key in above)} (line {number})"] = _shown(line.strip())
    return fields


def _checkpoint_fields(folder: Path, advance: Callable[[int], None]) -> Iterator[tuple[str, dict[str, str]]]:
    steps = sorted(path for path in folder.iterdir() if _STEP.fullmatch(path.name)) if folder.is_dir() else []
    yield "checkpoints", {"steps": ", ".join(str(int(path.name[5:])) for path in steps) or "none"}
    for path in sorted(file for step in steps for file in step.iterdir()):
        name = f"checkpoints/{path.parent.name}/{path.name}"
        if path.suffix == ".safetensors":
            share = MOST_TENSORS // len(list(path.parent.glob("*.safetensors")))
            yield name, _tensor_fields(path, max(1, share), advance)
        elif path.suffix == ".json":
            found = {}
            for group in _groups(list(_leaves_of(path).items()), MOST_VALUES):
                found[_range([key for key, _ in group])] = _shown([value for _, value in group])
            yield name, {"file": _file(path), **found}
        else:
            yield name, {"file": _file(path)}


def _tensor_fields(path: Path, most: int, advance: Callable[[int], None]) -> dict[str, str]:
    """The file, its header, and its tensors in the order of the file, in at most `most` groups. The file begins with
    eight bytes of header length and a JSON header with the byte range of every tensor.
    """
    whole, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(min(int.from_bytes(length, "little"), size))
        begin = file.tell()
        whole.update(length + header)
        fields = {"header": digest(length + header)}
        for group in _groups(_tensors(header), most):
            part, end = hashlib.sha256(), begin + group[-1][0]
            while chunk := file.read(min(CHUNK, max(0, end - file.tell()))):
                whole.update(chunk)
                part.update(chunk)
                advance(len(chunk))
            fields[f"tensor {_range([name for _, name in group])}"] = part.hexdigest()
        while chunk := file.read(CHUNK):
            whole.update(chunk)
    return {"file": f"{size} bytes, SHA-256 {whole.hexdigest()}", **fields}


def _tensors(header: bytes) -> list[tuple[int, str]]:
    """(last byte, name) of every tensor of a header, in order; nothing for a damaged one."""
    found, entries = [], _parsed(header)
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        place = entry.get("data_offsets") if isinstance(entry, dict) else None
        if isinstance(place, list) and len(place) == 2 and isinstance(place[1], int):
            found.append((place[1], name))
    return sorted(found)


def _groups(items: list[T], most: int) -> list[list[T]]:
    """`items` in at most `most` groups of neighbours."""
    size = max(1, math.ceil(len(items) / most))
    return [items[first : first + size] for first in range(0, len(items), size)]


def _range(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def differences(certified: Fields, found: Fields) -> list[str]:
    """Every field that differs, with its file, in words."""
    told = []
    for file in sorted(certified.keys() | found.keys()):
        before, now = certified.get(file, {}), found.get(file, {})
        names = [*before, *(name for name in now if name not in before)]
        changed = [name for name in names if before.get(name) != now.get(name)]
        # The file as a whole says least.
        for name in sorted(changed, key=lambda name: name == "file")[:MOST_NAMED]:
            values = [fields.get(name, "absent") for fields in (now, before)]
            told.append(f"{file}: {name} is {values[0]}, certified as {values[1]}")
        told += [f"{file}: {len(changed) - MOST_NAMED} more fields"] if len(changed) > MOST_NAMED else []
    return told


def check(certificate: Mapping[str, Any], directory: Path, runs: Path | None, say: Callable[[str], None]) -> int:
    """Check every link of `certificate`, whose report is in `directory`, and print it; returns how many differ. `runs`
    is the directory in which the runs are now. Raises OSError when a file cannot be read, and ValueError,
    KeyError, TypeError or IndexError when the certificate is not one.
    """
    failed, facts = 0, certificate["facts"]
    if len(facts["runs"]) != len(certificate["runs"]):
        raise ValueError(f"it has chains of {len(certificate['runs'])} runs, but facts about {len(facts['runs'])}")
    places = [runs / run["place"] if runs else Path(run["path"]) for run in facts["runs"]]
    for run, path, chain in zip(facts["runs"], places, certificate["runs"], strict=True):
        say(f"{run['label']}: {path}")
        failed += _check_chain(chain, run_links(path), "", say) if path.is_dir() else _missing(say)
    heads = [chain[-1]["sha256"] for chain in certificate["runs"]]
    say("all runs")
    found = report_links(directory, facts, heads, facts["files"])
    failed += _check_chain(certificate["report"], found, digest(canonical(heads)), say)
    told = _wrong_figures(facts, places)
    failed += _said("differences of the pairs", "train loss recomputed from metrics.jsonl", told, say)
    expected = certificate["report"][-1]["sha256"]
    told = [] if certificate["seal"] == expected else [f"{CERTIFICATE}: seal is {certificate['seal']}, not {expected}"]
    told += [f"{CERTIFICATE}: {key} is unknown" for key in certificate.keys() - KEYS]
    return failed + _said("seal", expected, told, say)


def _check_chain(
    chain: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]], previous: str, say: Callable[[str], None]
) -> int:
    failed, names = 0, [[link["name"] for link in links] for links in (chain, found)]
    if names[0] != names[1]:
        return _said("chain", "", [f"{CERTIFICATE}: links are {', '.join(names[0])}, not {', '.join(names[1])}"], say)
    for link, now in zip(chain, found, strict=True):
        told = differences(link["fields"], now["fields"])
        told += [f"{CERTIFICATE}: covers is {link['covers']}"] if link["covers"] != now["covers"] else []
        told += [f"{CERTIFICATE}: {key} is unknown" for key in link.keys() - now.keys()]
        if link["previous"] != previous:
            told.append(f"{CERTIFICATE}: previous is {link['previous']}, but the link before ends with {previous}")
        body = {key: value for key, value in link.items() if key != "sha256"}
        if link["sha256"] != digest(canonical(body)):
            told.append(f"{CERTIFICATE}: sha256 of the link {now['name']} is not that of its fields")
        failed += _said(now["name"], now["covers"], told, say)
        previous = link["sha256"]
    return failed


def _wrong_figures(facts: Mapping[str, Any], places: Sequence[Path]) -> list[str]:
    """The differences of pairs that do not follow from the records."""
    told = []
    for number, pair in enumerate(facts["pairs"]):
        paths = places[pair["reference"]], places[pair["other"]]
        found = mean_difference(*paths, pair["first_step"], pair["last_step"])
        said = pair["difference"]
        if said is not None and (found is None or not math.isclose(found, said, rel_tol=RELATIVE, abs_tol=RELATIVE)):
            told.append(f"{CERTIFICATE}: pairs[{number}].difference is {said}, the records give {found}")
    return told


def _missing(say: Callable[[str], None]) -> int:
    return _said("run", "", ["no such directory: name the directory of the runs with --runs"], say)


def _said(name: str, covers: str, told: Sequence[str], say: Callable[[str], None]) -> int:
    """Print a link with what differs in it; 1 if anything does."""
    say(f"  {'DIFFERS' if told else 'ok':<8} {name}{f': {covers}' if covers else ''}")
    for words in told:
        say(f"           {words}")
    return int(bool(told))


def _print(words: str) -> None:
    """Print `words`, with escapes for characters that a terminal would obey or cannot show."""
    print("".join(one if one.isprintable() and one.isascii() else ascii(one)[1:-1] for one in words))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Check a certificate of kha compare --certify.")
    here = Path(__file__).resolve().parent / CERTIFICATE
    parser.add_argument("certificate", nargs="?", type=Path, default=here, help="default: the one beside this file")
    parser.add_argument("--runs", type=Path, help="the directory in which the runs are now")
    parser.add_argument("--seal", help="the seal that you kept when the certificate was made")
    given = parser.parse_args(arguments)
    try:
        certificate = json.loads(given.certificate.read_bytes())
        if certificate["format"] != FORMAT:
            raise ValueError(f"format {certificate['format']} is unknown to this verifier")
        failed = check(certificate, given.certificate.parent, given.runs, _print)
        if given.seal is not None and given.seal != certificate["seal"]:
            failed += _said("seal", "", [f"{CERTIFICATE}: seal is not the one that you kept"], _print)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        print(f"cannot be checked: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(f"{failed} {'link differs' if failed == 1 else 'links differ'}" if failed else "everything agrees")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
