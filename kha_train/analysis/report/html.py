"""Writes sections as one HTML page without scripts or outside files, for wide and narrow, light and dark screens.

The x axis of all curves, and whether raw values are shown, are chosen by radio buttons and style rules alone.
"""

# R, C rows and columns of a matrix

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kha_train.analysis.heatmap import heatmap
from kha_train.analysis.report.content import Axis, Block, Figure, Maps, Result, Row, Section, Subtitle, Table, Text
from kha_train.analysis.report.svg import DARK, LIGHT, color_rules, draw, text, variables

CURVES = (("both", "raw and smoothed"), ("smooth", "smoothed"), ("raw", "raw"))
"""What the second control offers."""
STYLE = """
:root { color-scheme: light dark; --page: #fdfdfc; --card: #ffffff; --ink: #22262b; --soft: #5f6771; --grid: #e1e4e8;
  --note: #fff3cf; --chosen: #22262b; --on: #ffffff; %(light)s }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1c2024; --ink: #e4e7ea; --soft: #9aa3ac;
  --grid: #343a41; --note: #443a12; --chosen: #e4e7ea; --on: #14171a; %(dark)s } }
* { box-sizing: border-box; }
html { scroll-padding-top: 4.5rem; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 68rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .2rem 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem; padding-top: .5rem; border-top: 1px solid var(--grid); }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; overflow-wrap: anywhere; max-width: 52rem; }
a { color: inherit; }
.soft, td small, th small, figcaption { color: var(--soft); font-size: .84rem; font-weight: 400; }
.answer { font-size: 1.12rem; font-weight: 600; }
.contents { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .9rem; margin: .6rem 0; }
.result { background: var(--card); border: 1px solid var(--grid); border-radius: .6rem; padding: .7rem .9rem;
  margin: .6rem 0; overflow-wrap: anywhere; }
.result b { font-size: 1.12rem; } .result b, .result .number { font-variant-numeric: tabular-nums; }
.evidence { display: table; background: var(--note); border-radius: .4rem; padding: .1rem .5rem; font-weight: 600; }
.switch { position: fixed; top: 0; left: 0; opacity: 0; pointer-events: none; }
.control { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .3rem 1rem; padding: .45rem 0;
  background: var(--page); border-bottom: 1px solid var(--grid); font-size: .86rem; align-items: center; }
.control span { display: inline-flex; align-items: center; gap: .1rem; }
.control label { padding: .12rem .5rem; border-radius: .4rem; cursor: pointer; }
.view { display: none; }
figure { margin: .5rem 0; background: var(--card); border: 1px solid var(--grid); border-radius: .6rem;
  padding: .5rem .6rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%%, 27rem), 1fr)); gap: .6rem; }
.figures figure { margin: 0; } figure strong { font-size: .92rem; overflow-wrap: anywhere; }
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); gap: .5rem; max-width: 44rem; }
.maps figure { margin: 0; padding: .3rem; } .map { --plus: var(--s0); --minus: var(--s1); max-width: 12rem; }
svg { display: block; width: 100%%; max-width: 40rem; height: auto; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--grid); border-radius: .6rem;
  margin: .5rem 0; }
table { border-collapse: collapse; width: 100%%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .7rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--grid); }
td { max-width: 24rem; overflow-wrap: break-word; }
tr:last-child > * { border-bottom: 0; }
th:first-child { text-align: left; min-width: 9.5rem; max-width: 21rem; font-weight: 500; }
th small { display: block; line-height: 1.3; }
thead th { font-weight: 650; } thead th:first-child { font-weight: 650; }
summary { cursor: pointer; padding: .3rem 0; }
code { font-size: .88em; overflow-wrap: anywhere; }
%(switches)s
@media print { .control, .contents { display: none; } figure { break-inside: avoid; } }
"""


def page(title: str, mark: str, evidence: str, sections: Sequence[Section], axes: Sequence[Axis]) -> str:
    """The whole page. `mark` goes into its head, `evidence` below the title; `axes` are what the control offers."""
    control, switches = _control(axes), _switches(axes)
    rules = STYLE % {"light": variables(LIGHT), "dark": variables(DARK), "switches": _rules(axes)}
    links = "".join(f'<a href="#{one.key}">{text(one.title)}</a>' for one in sections)
    parts, shown = [], False
    for section in sections:
        if section.figures() and not shown:
            # A sticky bar stays in sight from where the first figure begins.
            parts.append(control)
            shown = True
        parts.append(f'<h2 id="{section.key}">{text(section.title)}</h2>')
        parts += _blocks(section.blocks, axes)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{mark}'
        f"<title>{text(title)}</title><style>{color_rules()}{rules}</style></head><body>"
        f'{switches}<main><h1>{text(title)}</h1><p><span class="evidence">{text(evidence)}</span></p>'
        f'<nav class="contents">{links}</nav>{"".join(parts)}</main></body></html>\n'
    )


def _switches(axes: Sequence[Axis]) -> str:
    """The radio buttons, before everything that they switch."""
    names = [("axis", axis.key) for axis in axes] + [("curve", key) for key, _ in CURVES]
    first = {("axis", axes[0].key), ("curve", CURVES[0][0])}
    return "".join(
        f'<input class="switch" type="radio" name="{group}" id="{group}-{key}" aria-label="{group}: {key}"'
        f"{' checked' if (group, key) in first else ''}>"
        for group, key in names
    )


def _control(axes: Sequence[Axis]) -> str:
    over = "".join(f'<label for="axis-{axis.key}">{text(axis.key)}</label>' for axis in axes)
    curve = "".join(f'<label for="curve-{key}">{text(words)}</label>' for key, words in CURVES)
    return f'<div class="control"><span>All curves over {over}</span><span>as {curve}</span></div>'


def _rules(axes: Sequence[Axis]) -> str:
    """What each radio button shows, and which label is marked as chosen."""
    ids = [f"axis-{axis.key}" for axis in axes] + [f"curve-{key}" for key, _ in CURVES]
    chosen = ", ".join(f"#{one}:checked ~ main label[for={one}]" for one in ids)
    focused = ", ".join(f"#{one}:focus-visible ~ main label[for={one}]" for one in ids)
    views = ", ".join(f"#axis-{axis.key}:checked ~ main .view-{axis.key}" for axis in axes)
    return (
        f"{chosen} {{ background: var(--chosen); color: var(--on); }} {focused} {{ outline: 2px solid var(--s0); }}\n"
        f"{views} {{ display: block; }}\n"
        "#curve-smooth:checked ~ main .raw { display: none; }\n"
        "#curve-raw:checked ~ main .has-raw .line { display: none; }\n"
        "#curve-raw:checked ~ main .raw { opacity: .8; }"
    )


def _blocks(blocks: Sequence[Block], axes: Sequence[Axis]) -> Iterator[str]:
    row: list[str] = []
    for block in blocks:
        if isinstance(block, Figure):
            row.append(_figure(block, axes))
            continue
        if row:
            yield f'<div class="figures">{"".join(row)}</div>'
            row = []
        yield _block(block)
    if row:
        yield f'<div class="figures">{"".join(row)}</div>'


def _block(block: Text | Result | Table | Maps | Subtitle) -> str:
    if isinstance(block, Maps):
        return _maps(block)
    if isinstance(block, Subtitle):
        return f"<h3>{text(block.words)}</h3>"
    if isinstance(block, Text):
        if block.kind == "warning":
            return f'<p class="evidence">{text(block.words)}</p>'
        kind = {"soft": ' class="soft"', "answer": ' class="answer"'}.get(block.kind, "")
        return f"<p{kind}>{text(block.words)}</p>"
    return _result(block) if isinstance(block, Result) else _table(block)


def _result(one: Result) -> str:
    number = f"<b>{text(one.number)}</b>" if one.bold else f'<span class="number">{text(one.number)}</span>'
    beside = f' <span class="soft">{text(one.beside)}</span>' if one.beside else ""
    explained = f'<p class="soft">{text(one.explained)}</p>' if one.explained else ""
    warnings = "".join(f'<p class="evidence">{text(words)}</p>' for words in one.warnings)
    return f'<div class="result">{text(one.names)}<br>{number}{beside}{explained}{warnings}</div>'


def _table(table: Table) -> str:
    head = "".join(f"<th>{text(words)}</th>" for words in table.head)
    body = "".join(
        f"<tr><th>{_name(row)}</th>{''.join(f'<td>{text(value)}</td>' for value in row.values)}</tr>"
        for row in table.rows
    )
    found = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return f"<details><summary>{text(table.folded)}</summary>{found}</details>" if table.folded else found


def _maps(block: Maps) -> str:
    drawn = "".join(
        f"<figure>{heatmap(values_RC, label, block.largest)}<figcaption>{text(label)}</figcaption></figure>"
        for label, values_RC in block.maps
    )
    return f'<h3>{text(block.title)}</h3><p class="soft">{text(block.caption)}</p><div class="maps">{drawn}</div>'


def _name(row: Row) -> str:
    name = f"<code>{text(row.name)}</code>" if row.code else text(row.name)
    return f"{name}<small>{text(row.note)}</small>" if row.note else name


def _figure(figure: Figure, axes: Sequence[Axis]) -> str:
    caption = f"<strong>{text(figure.title)}</strong>"
    below = f"<figcaption>{text(figure.caption)}</figcaption>"
    has_raw = ' class="has-raw"' if any(one.kind == "raw" for one in figure.series) else ""
    if len(figure.axes) == 1 and figure.axes[0] not in axes:
        return f"<figure{has_raw}>{caption}{draw(figure, figure.axes[0])}{below}</figure>"
    views = []
    for axis in axes:
        known = axis in figure.axes and any(axis.key in one.x for one in figure.series)
        drawn = draw(figure, axis) if known else f'<p class="soft">Not known over {text(axis.key)}.</p>'
        views.append(f'<div class="view view-{axis.key}">{drawn}</div>')
    return f"<figure{has_raw}>{caption}{''.join(views)}{below}</figure>"
