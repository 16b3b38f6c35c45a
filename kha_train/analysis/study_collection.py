"""A page of experiments from files `result.json` of studies: a section for each, newest first.

The sections stand between two marks of a Markdown page; what else is on the page stays as it is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypedDict

from kha_train.analysis.studies import load_study, study_names
from kha_train.analysis.study_page import table_lines
from kha_train.errors import ConfigError
from kha_train.foreign.typed import Absent
from kha_train.literal import visible
from kha_train.record.files import read_json
from kha_train.telemetry.format import duration

BEGIN, END = "<!-- kha study collect: begin -->", "<!-- kha study collect: end -->"
"""Lines of the page: everything between them is replaced."""
SHOWN_DIGITS = 12
"""Digits of a SHA-256 or a commit."""


class IntervalEntry(TypedDict):
    """A mean over seeds with its interval."""

    mean: float
    low: float
    high: float


class ArmEntry(TypedDict):
    """An arm in `result.json`, as far as the page has it."""

    reference: str | None
    rate: float | None
    rate_at_edge: bool | None
    seeds: list[int]
    means: dict[str, float | None]
    intervals: dict[str, IntervalEntry | None]
    values: dict[str, dict[str, float | None]]
    diverged: int


class ComparisonEntry(TypedDict):
    """An arm against its reference, in words."""

    sentence: str


class PublishedEntry(TypedDict):
    """What a paper prints, and what was found."""

    what: str
    arm: str
    value: float | None
    better_than: str
    ours: str


class ResultFile(TypedDict):
    """`result.json`, as far as the page has it."""

    study: str
    scale: str
    question: str
    source: str
    not_shown: str
    command: str
    began: float | None
    ended: float | None
    seconds: float | None
    trials: int
    study_sha256: str
    commits: list[str | None]
    data_content_ids: list[str | None]
    machines: list[str]
    complete: bool
    measures: list[dict[str, Any]]
    rates: str
    arms: dict[str, ArmEntry]
    comparisons: list[ComparisonEntry]
    published: Annotated[list[PublishedEntry], Absent([])]
    caveats: list[str]
    sentence: str


def read_result(file: Path) -> ResultFile:
    """The result in `file`.

    Raises ConfigError when there is no such file or its study is not complete, DataError when it is not a result.
    """
    found = read_json(file, ResultFile, "write it again with `kha study report`")
    if found is None:
        raise ConfigError("no such file", field="result", value=str(file))
    if not found["complete"]:
        raise ConfigError("is of a study that is not complete", field="result", value=str(file))
    return found


def collected(page: Path, files: Sequence[Path]) -> str:
    """The text of `page` with a section for every result in `files` between its marks; a page that does not exist
    begins with both.

    Raises ConfigError when the page lacks a mark, and as `read_result` does.
    """
    text = page.read_text(encoding="utf-8") if page.is_file() else f"{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    if not begin or not end:
        fix = f"add the lines {BEGIN} and {END}"
        raise ConfigError("has no place for results", field="--page", value=str(page), fix=fix)
    results = [(file, read_result(file)) for file in files]
    newest = sorted(results, key=lambda one: (-(one[1]["ended"] or 0), one[1]["study"], one[1]["scale"]))
    sections = ["\n".join(_section(result, _link(page, file))) + "\n\n" for file, result in newest]
    return f"{before}{begin}\n{''.join(sections)}{end}{after}"


def _link(page: Path, file: Path) -> str:
    return Path(os.path.relpath(file, page.parent)).as_posix()


def _section(result: ResultFile, link: str) -> Iterator[str]:
    ended = result["ended"]
    date = f"{_day(ended)}: " if ended is not None else ""
    usual = f"{result['study']}-{result['scale']}"
    own = f" ({Path(link).stem})" if Path(link).stem not in (usual, "result") else ""
    yield f"## {date}the study `{result['study']}`, scale {result['scale']}{own}\n"
    yield f"**Question.** {visible(result['question'])} ({visible(result['source'])})\n"
    yield f"**What may be said.** {visible(result['sentence'])}\n"
    if result["not_shown"]:
        yield f"**What it does not show**: {visible(result['not_shown'])}.\n"
    yield f"```sh\n# needs hours\n{visible(result['command'])}\n```\n"
    yield f"{_origin(result)} Numbers, runs and overrides: [{Path(link).name}]({link}).\n"
    yield from table_lines(*_arms(result))
    yield ""
    yield f"Means over seeds with 95 % Student intervals. Learning rates: {visible(result['rates'])}."
    if result["caveats"]:
        yield ""
        yield from (f"- {visible(caveat)}" for caveat in result["caveats"])
    yield "\nAgainst the reference, paired by seed:\n"
    yield from (f"- {visible(one['sentence'])}" for one in result["comparisons"])
    if result["published"]:
        yield ""
        yield from table_lines(
            ["published", "arm", "printed", "here"], [_published(one) for one in result["published"]]
        )


def _origin(result: ResultFile) -> str:
    seeds = sorted({seed for arm in result["arms"].values() for seed in arm["seeds"]})
    spent = f", {duration(result['seconds'])} in all" if result["seconds"] is not None else ""
    words = [f"{result['trials']} trials{spent}; {len(result['arms'])} arms, seeds {', '.join(map(str, seeds))}."]
    machines = "; ".join(machine for machine in result["machines"] if machine)
    words.append(f"On {machines}." if machines else "")
    words.append(f"Code {_digests(result['commits'])}, study's file {_digests([result['study_sha256']])}")
    data = [one for one in result["data_content_ids"] if one]
    words[-1] += f", data {_digests(data)}." if data else "."
    if result["study"] in study_names() and load_study(result["study"], "cpu").sha256 != result["study_sha256"]:
        words.append("The study's file has changed since.")
    return visible(" ".join(word for word in words if word))


def _arms(result: ResultFile) -> tuple[list[str], list[list[str]]]:
    measures = [str(one["name"]) for one in result["measures"]]
    rows = []
    for name, arm in result["arms"].items():
        rate = "-" if arm["rate"] is None else f"{arm['rate']:g}{' (edge)' if arm['rate_at_edge'] else ''}"
        figures = [_figure(arm, one) for one in measures]
        rows.append([name, arm["reference"] or "-", rate, str(arm["diverged"]), *figures])
    return ["arm", "against", "rate", "diverged", *measures], rows


def _figure(arm: ArmEntry, measure: str) -> str:
    mean, interval = arm["means"].get(measure), arm["intervals"].get(measure)
    if interval is not None:
        return f"{interval['mean']:.4g} [{interval['low']:.4g}, {interval['high']:.4g}]"
    if mean is None:
        return "-"
    reached = [value for value in arm["values"][measure].values() if value is not None and math.isfinite(value)]
    return f"{mean:.4g}" if math.isfinite(mean) else f"{mean} ({len(reached)} of {len(arm['seeds'])} finite)"


def _published(one: PublishedEntry) -> list[str]:
    printed = f"better than {one['better_than']}" if one["value"] is None else f"{one['value']:g}"
    return [one["what"], one["arm"], printed, one["ours"] or "-"]


def _digests(digests: Sequence[str | None]) -> str:
    """Each commit or SHA-256, shortened; a remark behind it stays."""
    shown = [one.partition(" ") for one in digests if one]
    return ", ".join(f"`{digest[:SHOWN_DIGITS]}`{space}{remark}" for digest, space, remark in shown) or "unknown"


def _day(seconds: float) -> str:
    moment = datetime.fromtimestamp(seconds, UTC)
    return f"{moment.day} {moment:%B %Y}"
