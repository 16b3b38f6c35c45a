"""What a section of the report consists of, for every form in which it is written: page, Markdown, pictures, CSV."""

# N points of a series  R, C rows and columns of a matrix

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Kind = Literal["raw", "line", "points", "band", "mean", "spike", "diverged"]


class Axis(NamedTuple):
    """One x axis: its name in controls and files, its label, and whether it has whole numbers only."""

    key: str
    label: str
    whole: bool = False


class Style(NamedTuple):
    """How the lines of one run or variant look, as numbers: lines that lie on each other differ in dash and marker."""

    color: int
    dash: int


@dataclass(frozen=True)
class Series:
    """One line, band or set of marks. `x` has the values of every axis for which they are known. `raw` is drawn faint;
    `points` has a marker at each point; `band` fills from `low_N` to `high_N`; `mean` is a horizontal line with its
    band; `spike` and `diverged` are marks of events.
    """

    name: str
    style: Style
    kind: Kind
    x: Mapping[str, np.ndarray]
    y_N: np.ndarray
    low_N: np.ndarray | None = None
    high_N: np.ndarray | None = None


@dataclass(frozen=True)
class Figure:
    """A figure, drawn once for each of its `axes`. `y_range` bounds the y axis, so that it shows what differs; None: as
    far as the values go. `zero` draws a line at zero. `caption` says what is drawn and how.
    """

    name: str
    title: str
    caption: str
    y_label: str
    axes: tuple[Axis, ...]
    series: tuple[Series, ...]
    y_range: tuple[float, float] | None = None
    zero: bool = False


@dataclass(frozen=True)
class Maps:
    """Matrices as heat-maps of one scale, full at +-`largest`: each a label and its values [R, C]."""

    name: str
    title: str
    caption: str
    largest: float
    maps: tuple[tuple[str, np.ndarray], ...]


@dataclass(frozen=True)
class Text:
    """A paragraph. `answer` is the result of the whole, `warning` what a reader must not miss; `soft` explains."""

    words: str
    kind: Literal["plain", "answer", "soft", "warning"] = "plain"


class Row(NamedTuple):
    """A row of a table: its name, its values, and their definition. `code`: the name is an identifier."""

    name: str
    values: tuple[str, ...]
    note: str = ""
    code: bool = False


@dataclass(frozen=True)
class Result:
    """A result: its `names`, the `number`, which is emphasised only if `bold`, and what it means."""

    names: str
    number: str
    bold: bool
    beside: str = ""
    explained: str = ""
    warnings: tuple[str, ...] = ()

    def row(self) -> Row:
        """The result as a row of a table."""
        return Row(self.names, (f"{self.number} {self.beside}".strip(), self.explained, " ".join(self.warnings) or "-"))


@dataclass(frozen=True)
class Table:
    """A table. `folded` says under which words it is closed at first; "": it is open."""

    head: tuple[str, ...]
    rows: tuple[Row, ...]
    folded: str = ""


@dataclass(frozen=True)
class Subtitle:
    """A heading inside a section."""

    words: str


Block = Text | Result | Table | Figure | Maps | Subtitle


@dataclass(frozen=True)
class Section:
    """A part of the report. `key` is its anchor."""

    key: str
    title: str
    blocks: tuple[Block, ...] = ()

    def figures(self) -> tuple[Figure, ...]:
        """The figures of the section, in order."""
        return tuple(block for block in self.blocks if isinstance(block, Figure))

    def maps(self) -> tuple[Maps, ...]:
        """The heat-maps of the section, in order."""
        return tuple(block for block in self.blocks if isinstance(block, Maps))
