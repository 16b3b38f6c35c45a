"""What results say in a line, and where they contradict the papers.

A result contradicts a paper where the paper prints that an arm is better than another, and the paired difference here,
in the measure that decides, has the other sign and an interval over seeds that excludes zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from kha_train.analysis.statistics import SeedInterval, over_seeds
from kha_train.analysis.study_files import ComparisonEntry, ResultFile
from kha_train.analysis.study_results import NO_INTERVAL, SIGNIFICANT
from kha_train.telemetry.format import scaled


def verdict(result: ResultFile) -> str:
    """How many arms differ from their reference in the measure that decides, and which."""
    deciding = result["measures"][0]["name"]
    compared = [one for one in result["comparisons"] if one["measure"] == deciding]
    found = [f"{one['arm']} {_size_of(one)}" for one in compared if differs(one)]
    seeds = min((len(one["differences"]) for one in compared), default=0)
    told = f"{len(found)} of {len(compared)} arms differ in {deciding} ({seeds} seed{'s' * (seeds != 1)})"
    return f"{told}: {', '.join(found)}" if found else told


def differs(one: ComparisonEntry) -> bool:
    """Whether the interval excludes zero; without one, whether the sign test has p below 0.05."""
    interval = one["interval"]
    if interval is not None:
        return not interval["low"] <= 0 <= interval["high"]
    return one["sign_test"] is not None and one["sign_test"] < SIGNIFICANT


def contradictions(result: ResultFile) -> list[str]:
    """Every published difference that `result` contradicts, with both differences and both sizes."""
    return [line for pair in _printed(result) for line in _against(result, *pair)]


def _size_of(one: ComparisonEntry) -> str:
    interval = one["interval"]
    return f"better in {one['better']}, worse in {one['worse']}" if interval is None else f"{interval['mean']:+.3g}"


def _printed(result: ResultFile) -> Iterator[tuple[str, str, str, bool]]:
    """(arm, other arm, what is printed of them, whether the arm is better there) for all pairs that ran here."""
    arms, sign = result["arms"], 1 if result["published_higher_is_better"] else -1
    stand_ins = {name: arm["stands_for"] or name for name, arm in arms.items()}
    values = {(one["what"], one["arm"]): one["value"] for one in result["published"]}
    for one in result["published"]:
        for name in (name for name, stands_for in stand_ins.items() if stands_for == one["arm"]):
            reference = one["better_than"] or arms[name]["reference"] or ""
            if reference not in arms:
                continue
            if one["value"] is None:
                yield name, reference, f"{one['what']}: `{one['arm']}` is better than `{reference}`", True
                continue
            base = values.get((one["what"], stand_ins[reference]))
            if base is not None and base != one["value"]:
                words = f"{one['what']}: `{one['arm']}` - `{stand_ins[reference]}` is {one['value'] - base:+.4g}"
                yield name, reference, words, sign * (one["value"] - base) > 0


def _against(result: ResultFile, name: str, other: str, printed: str, better: bool) -> Iterator[str]:
    """The line of a pair whose difference here contradicts what is printed."""
    measure = result["measures"][0]
    found = None if measure["kind"] in NO_INTERVAL else _difference(result, name, other, measure["name"])
    if found is None or not found.excludes_zero or ((found.mean > 0) == measure["larger_is_better"]) == better:
        return
    at = f" ({result['published_at']})" if result["published_at"] else ""
    ours = f"{measure['name']} {found.mean:+.4g} [{found.low:+.4g}, {found.high:+.4g}]"
    here = f"`{name}` - `{other}`: {ours}, {_here(result, name)}{found.seeds} seeds"
    yield f"{printed}{at}. Here, {here} (study `{result['study']}`, scale {result['scale']})."


def _difference(result: ResultFile, name: str, other: str, measure: str) -> SeedInterval | None:
    """The paired difference over seeds; None with fewer than two, and where a value is not finite."""
    ours, theirs = (result["arms"][arm]["values"][measure] for arm in (name, other))
    pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    known = [a - b for a, b in pairs if a is not None and b is not None]
    return over_seeds(known) if len(known) == len(pairs) and all(map(math.isfinite, known)) else None


def _here(result: ResultFile, name: str) -> str:
    size = result["arms"][name]["size"]
    if size is None:
        return ""
    active, total, tokens = (scaled(size[key]) for key in ("active_parameters", "parameters", "tokens"))
    return f"{active} active of {total} parameters, {tokens} tokens, "
