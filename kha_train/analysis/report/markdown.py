"""Writes sections as Markdown, with links to the pictures and numbers beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from kha_train.analysis.report.content import Block, Figure, Maps, Result, Section, Subtitle, Table, Text
from kha_train.literal import visible

MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~])")
"""Characters that mean something in Markdown or in the HTML that it may hold."""


def document(title: str, mark: str, evidence: str, sections: Sequence[Section], folder: str) -> str:
    """The whole document. `mark` is in a comment at its beginning; pictures and numbers are in `folder`."""
    lines = [f"<!-- {mark} -->", "", f"# {plain(title)}", "", f"**{plain(evidence)}**", ""]
    for section in sections:
        lines += [f"## {plain(section.title)}", ""]
        for block in section.blocks:
            lines += [*_block(block, folder), ""]
    return "\n".join(lines)


def plain(words: str) -> str:
    """`words` without any meaning as markup."""
    return MARKUP.sub(r"\\\1", visible(words))


def _block(block: Block, folder: str) -> Iterator[str]:
    if isinstance(block, Subtitle):
        yield f"### {plain(block.words)}"
    elif isinstance(block, Text):
        around = "**" if block.kind in ("answer", "warning") else ""
        yield f"{around}{plain(block.words)}{around}"
    elif isinstance(block, Result):
        yield from _result(block)
    elif isinstance(block, Table):
        yield from _table(block)
    elif isinstance(block, Maps):
        yield f"![{plain(block.title)}]({folder}/{block.name}.svg)"
        yield ""
        yield f"{plain(block.title)}. {plain(block.caption)} [Numbers]({folder}/{block.name}.csv)."
    else:
        yield from _figure(block, folder)


def _result(one: Result) -> Iterator[str]:
    number = f"**{plain(one.number)}**" if one.bold else plain(one.number)
    yield f"- {plain(one.names)}: {number} {plain(one.beside)}".rstrip()
    if one.explained:
        yield f"  {plain(one.explained)}"
    for words in one.warnings:
        yield f"  **{plain(words)}**"


def _table(table: Table) -> Iterator[str]:
    if table.folded:
        yield from (plain(table.folded), "")
    yield f"| {' | '.join(map(plain, table.head))} |"
    yield f"|{'---|' * len(table.head)}"
    for row in table.rows:
        note = f" ({plain(row.note)})" if row.note else ""
        yield f"| {plain(row.name)}{note} | {' | '.join(map(plain, row.values))} |"


def _figure(figure: Figure, folder: str) -> Iterator[str]:
    first = figure.axes[0]
    yield f"![{plain(figure.title)}]({folder}/{figure.name}-{first.key}.svg)"
    yield ""
    others = ", ".join(f"[{axis.key}]({folder}/{figure.name}-{axis.key}.svg)" for axis in figure.axes[1:])
    also = f" Also over {others}." if others else ""
    yield f"{plain(figure.title)}. {plain(figure.caption)}{also} [Numbers]({folder}/{figure.name}.csv)."
