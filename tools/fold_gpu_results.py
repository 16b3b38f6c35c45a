"""Fold contributed results of `make bench-gpu` into docs/performance.md: `python tools/fold_gpu_results.py FILE ...`.

A file is one contribution, named by its date and device; folding it again replaces it. The format is `Results`, which
docs/performance.md describes. A rehearsal is refused, and so are results whose tests did not pass: nobody knows what
kernels that compute wrong numbers are worth. The section stands between two marks; the rest of the page stays as it is.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from kha_train.bench import gpu
from kha_train.errors import DataError, KhaError
from kha_train.foreign.documents import parse_json
from kha_train.foreign.files import read_regular
from kha_train.foreign.typed import Source
from kha_train.literal import visible

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- contributed GPU results: begin -->", "<!-- contributed GPU results: end -->"
NONE = "**Every GPU path is unproven**: no `make bench-gpu` that ended with 0 has been contributed.\n"
SOME = (
    "Contributed by `make bench-gpu`, each after its tests had passed there. Everything not named here is unproven.\n"
)
MOST_BYTES = 10_000_000


class Device(TypedDict):
    """The device of a measurement; the file holds more."""

    name: str


class Versions(TypedDict):
    """The version of torch; the file holds more."""

    torch: str


class Environment(TypedDict):
    """Where and when the figures were measured: `kha_train/bench/protocol.py::environment`."""

    date: str
    device: Device
    threads: int
    load: float
    versions: Versions
    git: dict[str, Any] | None


class Outcome(TypedDict):
    """What a stage left: its command, its seconds, and either an `error` or an `answer` (of tests a `summary`)."""

    command: str
    seconds: float
    error: NotRequired[str]
    summary: NotRequired[str]
    answer: NotRequired[dict[str, Any]]


class Results(TypedDict):
    """`results.json` as `kha bench gpu` writes it."""

    rehearsal: bool
    environment: Environment
    stages: dict[str, Outcome]


def read(path: Path) -> Results:
    """The results in `path`. Raises DataError for a file that is none, a rehearsal, failed tests, or a failed stage."""
    raw = read_regular(path, MOST_BYTES)
    if raw is None:
        raise DataError("no such file", field=str(path))
    results = Source(str(path)).read(Results, parse_json(raw))
    if results["rehearsal"]:
        raise DataError("a rehearsal measures nothing", field=str(path), fix="make bench-gpu on a machine with a GPU")
    failed = [name for name, stage in results["stages"].items() if "error" in stage]
    tested = any(stage["command"].startswith("pytest") for stage in results["stages"].values())
    if failed or not tested:
        problem = f"failed: {', '.join(failed)}" if failed else "no tests were run before the figures"
        raise DataError(problem, field=str(path), fix="make bench-gpu until it ends with 0")
    return results


def block(results: Results) -> str:
    """The section of one contribution."""
    about = results["environment"]
    title = harmless(f"{about['device']['name']}, {about['date'][:10]}")
    return f"### {title}\n\n{visible_table(gpu.as_markdown(dict(results)))}"


def harmless(line: str) -> str:
    """`line` without control characters, and without HTML and links, which browsers would run on the site made of this
    page.
    """
    return visible(line).replace("<", "&lt;").replace("](", "]&#40;").replace("]:", "]&#58;")


def visible_table(text: str) -> str:
    """The lines, harmless and without headings, which would end the section."""
    lines = [harmless(line) for line in text.strip().splitlines()]
    return "\n".join(line.lstrip("#") if line.startswith("#") else line for line in lines) + "\n"


def fold(page: str, contributions: list[Results]) -> str:
    """`page` with the `contributions` added, or in the place of those with the same device and date."""
    before, begin, rest = page.partition(BEGIN)
    section, end, after = rest.partition(END)
    if not begin or not end:
        raise DataError(f"has no section between {BEGIN} and {END}", field=str(PAGE))
    blocks = {
        text.splitlines()[0]: text.rstrip() for text in re.split(r"(?m)^(?=### )", section) if text.startswith("### ")
    }
    for results in contributions:
        text = block(results).rstrip()
        blocks[text.splitlines()[0]] = text
    told = SOME if blocks else NONE
    return f"{before}{BEGIN}\n{told}{''.join(f'{chr(10)}{text}{chr(10)}' for text in blocks.values())}{END}{after}"


def main() -> int:
    """Fold the files that are named; nothing is written if one is refused."""
    try:
        page = fold(PAGE.read_text(encoding="utf-8"), [read(Path(name)) for name in sys.argv[1:]])
    except KhaError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
