"""A page of experiments from files `result.json` of studies: what contradicts the papers, a table of all verdicts, then
a section for each result, newest first.

The sections stand between two marks of a Markdown page; what else is on the page stays as it is.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from kha_train.analysis.studies import load_study, study_names
from kha_train.analysis.study_claims import contradictions, differs, size_in_words, verdict
from kha_train.analysis.study_files import (
    ArmEntry,
    ComparisonEntry,
    IntervalEntry,
    LawEntry,
    PublishedEntry,
    ResultFile,
    read_result,
)
from kha_train.analysis.study_page import table_lines
from kha_train.analysis.study_picture import PICTURED, picture, yardstick_of
from kha_train.errors import ConfigError
from kha_train.literal import visible
from kha_train.telemetry.format import duration, scaled

BEGIN, END = "<!-- kha study collect: begin -->", "<!-- kha study collect: end -->"
"""Lines of the page: everything between them is replaced."""
SHOWN_DIGITS = 12
"""Digits of a SHA-256 or a commit."""
PICTURES = "pictures"
"""The folder of the pictures, beside the page."""
LEGEND = """
Figures are means over seeds with 95 % Student intervals. A difference is arm - reference, paired by seed; of losses, \
bits and steps a negative one is better. One without an interval has the seeds in which the arm was better and worse, \
and p of the sign test. **Bold**: the interval excludes zero, or p is below 0.05. No interval includes the error of \
choosing rates by few seeds. Spikes are counted from the 65th step at the earliest. Equal arms of several studies are \
the same runs, computed again: they are no further evidence."""


def collected(page: Path, files: Sequence[Path]) -> str:
    """The text of `page` with what `files` hold between its marks: what contradicts the papers, and a section for every
    result. A page that does not exist begins with both marks.

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
    shown = {place.stem: _link(page, place) for place in pictures(page, files)}
    sections = [
        "\n".join(_section(result, _link(page, file), _name(file), shown.get(_name(file), ""))) + "\n\n"
        for file, result in newest
    ]
    told = "\n\n".join(_opening([result for _, result in newest]))
    verdicts = "\n".join(_verdicts(newest))
    return f"{before}{begin}\n{told}\n\n{verdicts}\n\n{''.join(sections)}{end}{after}"


def pictures(page: Path, files: Sequence[Path]) -> dict[Path, str]:
    """The pictures of the results of `PICTURED` studies, as SVG by the file that the page shows. Raises as
    `read_result`.
    """
    results = {file: read_result(file) for file in files}
    drawn = {
        page.parent / PICTURES / f"{_name(file)}.svg": picture(result, yardstick_of(result, list(results.values())))
        for file, result in results.items()
        if result["study"] in PICTURED
    }
    return {place: svg for place, svg in drawn.items() if svg is not None}


def _opening(results: Sequence[ResultFile]) -> Iterator[str]:
    """The paragraphs before the sections: contradictions, and whether all results are of one version of the code."""
    found = [contradictions(result) for result in results]
    lines = [line for one in found for line in one.lines]
    printed, agreeing = (sum(getattr(one, name) for one in found) for name in ("printed", "agreeing"))
    if lines:
        yield "**What contradicts the papers, at the sizes stated.** " + visible(" ".join(lines))
    elif not printed:
        yield "**What contradicts the papers: nothing.** No difference that they print was run here."
    else:
        yield (
            f"**What contradicts the papers: nothing.** Of {printed} differences that they print and that were run "
            f"here, {agreeing} have the printed sign and an interval that excludes zero; the other "
            f"{printed - agreeing} are open: the interval includes zero, or there is none."
        )
    known = sorted({code for result in results for code in result["code_sha256"] if code})
    unknown = [result["study"] for result in results if not result["code_sha256"] or None in result["code_sha256"]]
    if len(known) > 1 or unknown:
        parts = [f"{len(known)} versions of the code ({_digests(known)})"] if known else []
        parts += [f"versions without a recorded hash ({', '.join(unknown)})"] if unknown else []
        yield f"**These results are not of one version of the code**: {' and '.join(parts)}."
    else:
        yield f"All results are of one version of `kha_train/` and `configs/`: {_digests(known)}."


def _verdicts(newest: Sequence[tuple[Path, ResultFile]]) -> Iterator[str]:
    """A table of all results by name: question and verdict, each with a link to its section."""
    named = sorted(newest, key=lambda one: (one[1]["study"], _name(one[0])))
    rows = [
        [f"[{result['study']}](#{_anchor(_title(result, _name(file)))})", result["question"], verdict(result)]
        for file, result in named
    ]
    yield from table_lines(["study", "question", "verdict: arm - reference, paired by seed"], rows)
    yield LEGEND


def _name(file: Path) -> str:
    """What a result is called: its file, or its directory where the file is as `kha study run` wrote it."""
    return file.resolve().parent.name if file.name == "result.json" else file.stem


def _title(result: ResultFile, name: str) -> str:
    """The heading of a result's section; its `name` is shown where it is not the usual one."""
    date = f"{day(result['ended'])}: " if result["ended"] is not None else ""
    own = f" ({name})" if name != f"{result['study']}-{result['scale']}" else ""
    return f"{date}the study `{result['study']}`, scale {result['scale']}{own}"


def _anchor(title: str) -> str:
    """The address of a heading within a page, as GitHub and mkdocs make it."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def _link(page: Path, file: Path) -> str:
    return Path(os.path.relpath(file, page.parent)).as_posix()


def _section(result: ResultFile, link: str, name: str, shown: str) -> Iterator[str]:
    yield f"## {_title(result, name)}\n"
    yield f"**Question.** {visible(result['question'])} ({visible(result['source'])})\n"
    yield f"**What may be said.** {visible(result['sentence'])}\n"
    if shown:
        yield f"![Paired differences of the study {result['study']} with their intervals]({shown})\n"
    if result["not_shown"]:
        yield f"**What it does not show**: {visible(result['not_shown'])}.\n"
    yield f"```sh\n# needs hours\n{visible(result['command'])}\n```\n"
    yield f"{_origin(result)} Numbers, runs and overrides: [{Path(link).name}]({link}).\n"
    yield from table_lines(*_arms(result))
    yield ""
    yield f"Learning rates: {visible(result['rates'])}."
    yield from _rates(result)
    if result["caveats"]:
        yield ""
        yield from (f"- {visible(caveat)}" for caveat in result["caveats"])
    yield ""
    yield from _compared(result)
    if result["difference_law"]:
        yield from _law(result["difference_law"])
    if result["published"]:
        yield ""
        at = f"printed ({result['published_at']})" if result["published_at"] else "printed"
        yield from table_lines(["published", "arm", at, "here"], [_published(one) for one in result["published"]])


def _rates(result: ResultFile) -> Iterator[str]:
    """A table of the measure that chooses rates, where there was a choice."""
    rates = sorted({rate for arm in result["arms"].values() for rate in arm["by_rate"]}, key=float)
    if len(rates) > 1:
        rows = [
            [name, *(_at_rate(arm["by_rate"].get(rate, {})) for rate in rates)] for name, arm in result["arms"].items()
        ]
        yield ""
        yield from table_lines([f"{result['rate_measure']} at rate", *rates], rows)


def _at_rate(values: Mapping[str, float | None]) -> str:
    known = [value for value in values.values() if value is not None]
    return f"{sum(known) / len(known):.4g}" if known else "-"


def _compared(result: ResultFile) -> Iterator[str]:
    """A table of the differences from the reference, a row for each arm and a column for each measure."""
    measures = [str(one["name"]) for one in result["measures"]]
    rows: dict[tuple[str, str], dict[str, ComparisonEntry]] = {}
    for one in (*result["comparisons"], *result["gains"]):
        rows.setdefault((one["arm"], one["reference"]), {})[one["measure"]] = one
    yield from table_lines(
        ["paired by seed", "seeds", *measures],
        [
            [
                f"{arm} - {reference}",
                str(min(len(one["differences"]) for one in row.values())),
                *(_difference(row[measure]) if measure in row else "-" for measure in measures),
            ]
            for (arm, reference), row in rows.items()
        ],
    )


def _difference(one: ComparisonEntry) -> str:
    if one["interval"] is not None:
        told = _between(one["interval"])
    elif len(one["differences"]) < 2:
        told = ", ".join(f"{value:+.4g}" for value in one["differences"].values()) or "-"
    else:
        p = f", p {one['sign_test']:.2g}" if one["sign_test"] is not None else ""
        told = f"{one['better']} better, {one['worse']} worse{p}"
    return f"**{told}**" if differs(one) else told


def _law(law: LawEntry) -> Iterator[str]:
    middle = f"{scaled(law['middle_parameters'])} active parameters, {scaled(law['middle_tokens'])} tokens"
    yield f"\nThe law of these differences, `{law['formula']}`, fitted to {law['cells']} cells around {middle}:\n"
    yield from table_lines(
        ["coefficient", "nats [95 % over seeds]"], [[name, _between(one)] for name, one in law["coefficients"].items()]
    )
    yield "\nThe largest size, predicted by the law of the others. An error that excludes zero contradicts the law:\n"
    rows = [
        [one["family"], scaled(one["parameters"]), scaled(one["tokens"]),
         *(_between(one[key]) for key in ("predicted", "observed", "error"))]
        for one in law["largest"]
    ]  # fmt: skip
    yield from table_lines(["family", "active", "tokens", "predicted", "observed", "error"], rows)


def _between(one: IntervalEntry) -> str:
    return f"{one['mean']:+.4g} [{one['low']:+.4g}, {one['high']:+.4g}]"


def _origin(result: ResultFile) -> str:
    seeds = sorted({seed for arm in result["arms"].values() for seed in arm["seeds"]})
    spent = f", whose times add up to {duration(result['seconds'])}" if result["seconds"] is not None else ""
    sizes = {name: arm["size"] for name, arm in result["arms"].items() if arm["reference"] is None}
    words = [f"{result['trials']} trials{spent}; {len(result['arms'])} arms, seeds {', '.join(map(str, seeds))}."]
    words += [f"{name}: {size_in_words(size)}." for name, size in sizes.items() if size]
    machines = "; ".join(machine for machine in result["machines"] if machine)
    words.append(f"On {machines}." if machines else "")
    code = [f"version {_digests(result['code_sha256'])}"] if any(result["code_sha256"]) else []
    code.append(f"commit {_digests(result['commits'])}")
    words.append(f"Code {', '.join(code)}, study's file {_digests([result['study_sha256']])}")
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


def day(seconds: float) -> str:
    """The day of a time in seconds since 1970."""
    moment = datetime.fromtimestamp(seconds, UTC)
    return f"{moment.day} {moment:%B %Y}"
