"""What results say in a line, and where they contradict the papers.

A result contradicts a paper where the paper prints that an arm is better than another, and the paired difference here,
in the measure that decides, has the other sign and an interval over seeds that excludes zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from kha_train.analysis.statistics import SIGN_SEEDS, SeedInterval, over_seeds
from kha_train.analysis.study_files import ComparisonEntry, ResultFile, SizeEntry
from kha_train.analysis.study_pairs import NO_INTERVAL, SIGNIFICANT, counted
from kha_train.telemetry.format import scaled


def verdict(result: ResultFile) -> str:
    """How many arms differ from their reference in the measure that decides, which, and which cannot be shown to."""
    deciding = result["measures"][0]["name"]
    compared = [one for one in result["comparisons"] if one["measure"] == deciding]
    found = [_told(one) for one in compared if differs(one)]
    unable = [_told(one) for one in compared if cannot_differ(one)]
    seeds = min((len(one["differences"]) for one in compared), default=0)
    told = f"{len(found)} of {len(compared)} arms differ in {deciding} ({counted(seeds, 'seed')})"
    told += f": {', '.join(found)}" if found else ""
    return f"{told}; too few seeds differ for a sign test of {', '.join(unable)}" if unable else told


def differs(one: ComparisonEntry) -> bool:
    """Whether the interval excludes zero; without one, whether the sign test has p below 0.05."""
    interval = one["interval"]
    if interval is not None:
        return not interval["low"] <= 0 <= interval["high"]
    return one["sign_test"] is not None and one["sign_test"] < SIGNIFICANT


def cannot_differ(one: ComparisonEntry) -> bool:
    """Whether there is no interval, and too few seeds have a sign for the sign test to have p below 0.05."""
    return one["interval"] is None and 0 < one["better"] + one["worse"] < SIGN_SEEDS


class Contradictions(NamedTuple):
    """How published differences stand against those found here. `lines` are the contradictions, with both differences
    and both sizes. `agreeing` have the printed sign and an interval that excludes zero, the `open` ones an interval
    that includes zero, or none.
    """

    lines: list[str]
    agreeing: int
    open: int

    @property
    def printed(self) -> int:
        """How many published differences were run here."""
        return len(self.lines) + self.agreeing + self.open


def contradictions(result: ResultFile) -> Contradictions:
    """Every published difference of two arms that both ran. A pair of which a paper prints both signs is left out."""
    pairs = list(_printed(result))
    signs: dict[tuple[str, str], set[bool]] = {}
    for one in pairs:
        signs.setdefault((one.arm, one.other), set()).add(one.better)
    lines, agreeing, undecided = [], 0, 0
    measure = result["measures"][0]
    for one in pairs:
        if len(signs[one.arm, one.other]) > 1:
            continue
        found = None if measure["kind"] in NO_INTERVAL else _difference(result, one.arm, one.other, measure["name"])
        if found is None or not found.excludes_zero:
            undecided += 1
        elif ((found.mean > 0) == measure["larger_is_better"]) == one.better:
            agreeing += 1
        else:
            lines.append(_against(result, one, found))
    return Contradictions(lines, agreeing, undecided)


def _told(one: ComparisonEntry) -> str:
    """The difference of an arm in a few words."""
    pair, interval = f"{one['arm']} - {one['reference']}", one["interval"]
    if interval is None:
        return f"{pair} better in {one['better']}, worse in {one['worse']}"
    return f"{pair} {interval['mean']:+.3g}"


class _Printed(NamedTuple):
    """A published difference: an arm, another arm, what is printed of them, and whether the arm is better there."""

    arm: str
    other: str
    words: str
    better: bool


def _printed(result: ResultFile) -> Iterator[_Printed]:
    """What is printed of pairs that ran here."""
    arms, sign = result["arms"], 1 if result["published_higher_is_better"] else -1
    stand_ins = {name: arm["stands_for"] or name for name, arm in arms.items()}
    values = {(one["what"], one["arm"]): one["value"] for one in result["published"]}
    for one in result["published"]:
        for name in (name for name, stands_for in stand_ins.items() if stands_for == one["arm"]):
            reference = one["better_than"] or arms[name]["reference"] or ""
            if reference not in arms:
                continue
            if one["value"] is None:
                yield _Printed(name, reference, f"{one['what']}: `{one['arm']}` is better than `{reference}`", True)
                continue
            base = values.get((one["what"], stand_ins[reference]))
            if base is not None and base != one["value"]:
                words = f"{one['what']}: `{one['arm']}` - `{stand_ins[reference]}` is {one['value'] - base:+.4g}"
                yield _Printed(name, reference, words, sign * (one["value"] - base) > 0)


def _against(result: ResultFile, printed: _Printed, found: SeedInterval) -> str:
    """The line of a pair whose difference here, `found`, contradicts what is printed."""
    at = f" ({result['published_at']})" if result["published_at"] else ""
    ours = f"{result['measures'][0]['name']} {found.mean:+.4g} [{found.low:+.4g}, {found.high:+.4g}]"
    here = f"`{printed.arm}` - `{printed.other}`: {ours}, {_here(result, printed.arm)}{found.seeds} seeds"
    return f"{printed.words}{at}. Here, {here} (study `{result['study']}`, scale {result['scale']})."


def _difference(result: ResultFile, name: str, other: str, measure: str) -> SeedInterval | None:
    """The paired difference over seeds; None with fewer than two, and where a value is not finite."""
    ours, theirs = (result["arms"][arm]["values"][measure] for arm in (name, other))
    pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    known = [a - b for a, b in pairs if a is not None and b is not None]
    return over_seeds(known) if len(known) == len(pairs) and all(map(math.isfinite, known)) else None


def _here(result: ResultFile, name: str) -> str:
    size = result["arms"][name]["size"]
    return f"{size_in_words(size)}, " if size else ""


def size_in_words(size: SizeEntry) -> str:
    """The parameters of a run and its tokens."""
    active, total, tokens = (scaled(size[key]) for key in ("active_parameters", "parameters", "tokens"))
    return f"{active} active of {total} parameters, {tokens} tokens"
