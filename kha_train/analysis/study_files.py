"""The file `result.json` of a study, as later readers see it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypedDict

from kha_train.config.compose import PACKAGE
from kha_train.errors import ConfigError
from kha_train.foreign.typed import Absent
from kha_train.record.files import read_json


class IntervalEntry(TypedDict):
    """A mean over seeds with its interval."""

    mean: float
    low: float
    high: float


class SizeEntry(TypedDict):
    """The parameters of a run and the tokens that it read."""

    parameters: int
    active_parameters: int
    tokens: int


class MeasureEntry(TypedDict):
    """A measure: its name in results and what it is."""

    name: str
    kind: str
    larger_is_better: bool
    tokens: float


class ArmEntry(TypedDict):
    """An arm in `result.json`, as far as it is read."""

    reference: str | None
    stands_for: Annotated[str | None, Absent(None)]
    size: Annotated[SizeEntry | None, Absent(None)]
    rate: float | None
    rate_at_edge: bool | None
    by_rate: Annotated[dict[str, dict[str, float | None]], Absent({})]
    seeds: list[int]
    means: dict[str, float | None]
    intervals: dict[str, IntervalEntry | None]
    values: dict[str, dict[str, float | None]]
    diverged: int


class ComparisonEntry(TypedDict):
    """An arm against its reference in one measure, or of `gains` such a difference against another. Without an
    `interval`, the sign test decides.
    """

    arm: str
    reference: str
    measure: str
    differences: dict[str, float]
    interval: IntervalEntry | None
    better: int
    worse: int
    sign_test: float | None
    sentence: str


class PublishedEntry(TypedDict):
    """What a paper prints, and what was found."""

    what: str
    arm: str
    value: float | None
    better_than: str
    ours: str


class PredictedEntry(TypedDict):
    """A cell of the largest size, predicted from the others."""

    family: str
    parameters: int
    tokens: float
    predicted: IntervalEntry
    observed: IntervalEntry
    error: IntervalEntry


class LawEntry(TypedDict):
    """A law of differences: see `difference_law`."""

    formula: str
    middle_parameters: float
    middle_tokens: float
    coefficients: dict[str, IntervalEntry]
    cells: int
    largest: list[PredictedEntry]


class ResultFile(TypedDict):
    """`result.json`, as far as it is read."""

    study: str
    scale: str
    question: str
    source: str
    not_shown: str
    yardstick: Annotated[str, Absent("")]
    command: str
    began: float | None
    ended: float | None
    seconds: float | None
    trials: int
    study_sha256: str
    commits: list[str | None]
    code_sha256: Annotated[list[str | None], Absent([])]
    data_content_ids: list[str | None]
    machines: list[str]
    complete: bool
    measures: list[MeasureEntry]
    rate_measure: Annotated[str, Absent("")]
    rates: str
    arms: dict[str, ArmEntry]
    comparisons: list[ComparisonEntry]
    gains: Annotated[list[ComparisonEntry], Absent([])]
    published: Annotated[list[PublishedEntry], Absent([])]
    published_at: Annotated[str, Absent("")]
    published_higher_is_better: Annotated[bool, Absent(False)]
    difference_law: Annotated[LawEntry | None, Absent(None)]
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


def published_results(folder: Path | None) -> list[ResultFile]:
    """The results in `folder`, oldest first; without one, those in `docs/results` of the checkout, if this is one.

    Raises ConfigError when `folder` is none, and as `read_result` does.
    """
    if folder is not None and not folder.is_dir():
        raise ConfigError("no such folder", field="--results", value=str(folder))
    place = folder or PACKAGE.parent / "docs" / "results"
    found = [read_result(file) for file in sorted(place.glob("*.json"))]
    return sorted(found, key=lambda result: (result["ended"] or 0, result["study"], result["scale"]))
