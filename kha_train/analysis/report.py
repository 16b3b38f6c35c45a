"""The comparison as one HTML file without scripts or outside files, readable on a phone and in the dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape as html_escape
from pathlib import Path

import numpy as np

from kha_train.analysis import figures
from kha_train.analysis.compare import Comparison, Pair, honesty_rows, loss_difference, no_difference, result_rows
from kha_train.analysis.evaluations import VALIDATION
from kha_train.analysis.figures import Band, Curve
from kha_train.analysis.statistics import display_decay, exponential_average
from kha_train.analysis.summary import Quantity
from kha_train.analysis.validation_sets import ScoredSet, validations
from kha_train.literal import visible
from kha_train.record.files import mark_of
from kha_train.record.redact import Redactor

LIGHT = ("#1261b5", "#c4501b", "#0f7d5c", "#9a3a96", "#8a6d00", "#b3274a", "#3f6f8f", "#6a6a6a")
DARK = ("#6cb2ff", "#ff9a62", "#4fd3a5", "#e08bdb", "#e0c04a", "#ff7f9d", "#9cc6e0", "#b5b5b5")

NOT_KNOWN_TO_BE_EQUAL = (
    "The rows were not recorded: the runs are of an older release, and may have scored different rows."
)
STYLE = """
:root { color-scheme: light dark; --page: #fdfdfc; --card: #ffffff; --ink: #22262b; --soft: #626a73; --grid: #e3e5e8;
  --note: #fff6dd; %(light)s }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1c2024; --ink: #e4e7ea; --soft: #9aa3ac;
  --grid: #343a41; --note: #3a3216; %(dark)s } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 60rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .2rem 0 .6rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
p { margin: .4rem 0; overflow-wrap: anywhere; }
.soft, td small, th small, figcaption { color: var(--soft); font-size: .84rem; font-weight: 400; }
.result { background: var(--card); border: 1px solid var(--grid); border-radius: .6rem; padding: .7rem .9rem;
  margin: .6rem 0; }
.result b { font-size: 1.12rem; font-variant-numeric: tabular-nums; }
.evidence { display: inline-block; background: var(--note); border-radius: .4rem; padding: .1rem .5rem;
  font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; padding: 0; margin: .6rem 0; list-style: none;
  font-size: .92rem; }
.legend i { display: inline-block; width: 1.1rem; height: .22rem; border-radius: 2px; margin-right: .45rem;
  vertical-align: middle; }
figure { margin: .5rem 0 1rem; }
svg { display: block; width: 100%%; max-width: 38rem; height: auto; font-family: inherit; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--grid); border-radius: .6rem; }
table { border-collapse: collapse; width: 100%%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .8rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--grid); }
tr:last-child > * { border-bottom: 0; }
th:first-child { text-align: left; min-width: 9.5rem; max-width: 21rem; font-weight: 500; }
th small { display: block; line-height: 1.3; }
thead th { font-weight: 650; white-space: nowrap; }
code { font-size: .88em; overflow-wrap: anywhere; }
"""


PAGE = "<!doctype html>"
"""The beginning of the page."""


def page_in(out: Path) -> Path:
    """The file that `write_report` writes in the directory `out`."""
    return out / "index.html"


def mark_of_page(runs: Sequence[Path]) -> str:
    """The mark in the head of the page about `runs`; no other page has it."""
    command, _, digest = mark_of("compare", runs).partition(" ")
    return f'<meta name="{command}" content="{digest}">'


def write_report(comparison: Comparison, out: Path) -> Path:
    """Writes `page_in(out)` and returns its path; creates the directory if needed. Replaces an existing page: call
    `record.files.check_replaceable` first.
    """
    out.mkdir(parents=True, exist_ok=True)
    page = page_in(out)
    page.write_text(Redactor.from_environment().text(report_html(comparison)), encoding="utf-8")
    return page


def report_html(comparison: Comparison) -> str:
    """The whole page as text."""
    reference, *others = dict.fromkeys(run.variant for run in comparison.runs)
    title = f"{', '.join(others)} against {reference}" if others else f"{len(comparison.runs)} x {reference}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        *_results(comparison),
        _legend(comparison),
        *_loss_figure(comparison),
        *_difference_figure(comparison),
        *_validation_figures(comparison),
        "<h2>Results</h2>",
        _results_table(comparison),
        f"<p>{escape(comparison.validation_words)}</p>" if comparison.validation_words else "",
        *_evaluations(comparison),
        "<h2>Different settings</h2>",
        _settings(comparison),
        "<h2>Did they read the same data?</h2>",
        *(f"<p>{escape(pair.data_words)}. {_first_gap(pair)}</p>" for pair in comparison.pairs),
        "<h2>During the runs</h2>",
        _honesty_table(comparison),
        *(f"<p>{escape(words)}.</p>" for words in comparison.notes()),
        "<h2>Run directories</h2>",
        *(f"<p>{escape(run.label)}: <code>{escape(str(run.path))}</code></p>" for run in comparison.runs),
        *(f"<p>Skipped: {escape(words)}.</p>" for words in comparison.passed_over),
    ]
    head = (
        f'{PAGE}<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{mark_of_page([run.path for run in comparison.runs])}"
        f"<title>{escape(title)}</title><style>{_style()}</style></head>"
    )
    return f"{head}<body>{''.join(parts)}</body></html>\n"


def _style() -> str:
    def variables(palette: Sequence[str]) -> str:
        return " ".join(f"--series-{number}: {color};" for number, color in enumerate(palette))

    return STYLE % {"light": variables(LIGHT), "dark": variables(DARK)}


def _color(number: int) -> int:
    return number % len(LIGHT)


def _results(comparison: Comparison) -> Iterable[str]:
    yield f'<p><span class="evidence">{escape(comparison.evidence)}</span></p>'
    for found in comparison.across_seeds:
        if found.interval is not None:
            mean, low, high = found.interval.mean, found.interval.low, found.interval.high
            singles = ", ".join(f"{one:+.4f}" for one in found.differences)
            yield (
                f'<div class="result">{escape(found.variant)} &minus; {escape(found.reference)}, '
                f"{found.interval.seeds} seeds<br><b>{mean:+.4f}</b> nats per token "
                f'<span class="soft">95 % interval {low:+.4f} to {high:+.4f}</span><p class="soft">Mean of the paired '
                f"differences below, one a seed ({singles}); Student interval over the seeds.</p></div>"
            )
    for pair in comparison.pairs:
        reference, other = comparison.runs[pair.reference].label, comparison.runs[pair.other].label
        names = f"{escape(other)} &minus; {escape(reference)}"
        if pair.difference is None:
            yield f'<div class="result">{names}: {escape(no_difference(pair))}{_caveats(pair)}</div>'
            continue
        over = f"{pair.first_step} to {pair.last_step} (the last half of the common steps, "
        over += f"{pair.difference.count} finite pairs)"
        interval = pair.interval
        if interval is None:
            block = pair.difference.block
            blocks = f" A block has {block} steps, chosen from their autocorrelation." if block > 1 else ""
            yield (
                f'<div class="result">{names}: no claim<p class="soft">The difference of train loss at equal steps is '
                f"{pair.difference.mean:+.4f} nats per token, mean over steps {over}; "
                f"{pair.difference.no_interval}.{blocks}</p>{_caveats(pair)}</div>"
            )
            continue
        yield (
            f'<div class="result">{names}<br><b>{interval.mean:+.4f}</b> nats per token '
            f'<span class="soft">95 % interval {interval.low:+.4f} to {interval.high:+.4f}</span>'
            f'<p class="soft">Difference of train loss at equal steps, mean over steps {over}. Below zero: '
            f"{escape(other)} has the lower loss. Interval: Student's t over {interval.count // interval.block} blocks "
            f"of {interval.block} steps, a length that follows their autocorrelation; it holds for this seed and this "
            f"order of data only.</p>"
            f"{_caveats(pair)}</div>"
        )


def _caveats(pair: Pair) -> str:
    return "".join(f'<p class="evidence">not a fair pair: {escape(caveat)}</p>' for caveat in pair.caveats)


def _first_gap(pair: Pair) -> str:
    if pair.first_gap is None:
        return ""
    return (
        f"Before any update, in step 1, their losses differ by {pair.first_gap:+.2g}: next to nothing where both start "
        "as one function, as an interaction that begins as the identity does."
    )


def _legend(comparison: Comparison) -> str:
    items = (
        f'<li><i style="background: var(--series-{_color(number)})"></i>{escape(run.label)}</li>'
        for number, run in enumerate(comparison.runs)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _shared_decay(comparison: Comparison) -> float:
    return display_decay(max(len(run.columns) for run in comparison.runs))


def _loss_figure(comparison: Comparison) -> Iterable[str]:
    curves = []
    decay = _shared_decay(comparison)
    for number, run in enumerate(comparison.runs):
        loss = run.column("train/loss")
        smooth = exponential_average(loss, decay)
        curves.append(Curve(run.steps, _color(number), raw_N=loss, smooth_N=smooth))
    yield "<h2>Train loss</h2>"
    yield _figure(
        figures.draw("loss", curves, x_label="optimiser step", y_label="nats per token"),
        "Token cross-entropy of each optimiser step over the global batch, without auxiliary terms. Faint: as "
        "recorded. Bold: exponential average, half-life 1 % of the longest run. Gaps: not a finite number.",
    )


def _difference_figure(comparison: Comparison) -> Iterable[str]:
    curves, bands = [], []
    for pair in comparison.pairs:
        steps, difference = loss_difference(comparison.runs[pair.reference], comparison.runs[pair.other])
        color = _color(pair.other)
        if pair.different_from is not None or not np.isfinite(difference).any():
            continue
        smooth = exponential_average(difference, _shared_decay(comparison))
        curves.append(Curve(steps, color, raw_N=difference, smooth_N=smooth))
        if pair.interval is not None:
            found = pair.interval
            bands.append(Band(pair.first_step, pair.last_step, found.mean, found.low, found.high, color))
    if curves:
        yield "<h2>Paired difference of train loss</h2>"
        yield _figure(
            figures.draw("difference", curves, x_label="optimiser step", y_label="nats per token", bands=bands),
            "Loss of the coloured run minus loss of its reference at the same step; below zero the coloured run has "
            "the lower loss. Dashed with a band, where there is an interval: the mean over the last half and its 95 %.",
        )


def _evaluations(comparison: Comparison) -> Iterable[str]:
    """The last figures of named validation sets and of tasks, a table each."""
    for one in comparison.evaluations:
        yield f"<h2>{escape(one.entries)}</h2>"
        yield _table(comparison, [(_named(quantity), values) for quantity, values in one.rows()])
        yield f"<p>{escape(one.words)}</p>" if one.words else ""


def _validation_figures(comparison: Comparison) -> Iterable[str]:
    """Figures of the bits per byte of every validation set."""
    yield from _figures_of(comparison, VALIDATION, "Validation", VALIDATION)
    for number, one in enumerate(comparison.evaluations):
        if one.entries.startswith(VALIDATION):
            title = f"Validation: {one.entries.partition('/')[2]}"
            yield from _figures_of(comparison, one.entries, title, f"{VALIDATION}-{number}-")


def _figures_of(comparison: Comparison, entries: str, title: str, name: str) -> Iterable[str]:
    """One figure per set of scored rows: curves of different sets are not drawn together. Ids begin with `name`."""
    by_set: dict[ScoredSet | None, list[Curve]] = {}
    for number, run in enumerate(comparison.runs):
        scored = [one for one in validations(run, entries) if np.isfinite(one.bits_per_byte)]
        for scored_set in dict.fromkeys(one.scored_set for one in scored):
            points = [one for one in scored if one.scored_set == scored_set]
            steps, bits = (
                np.array(values) for values in zip(*((p.step, p.bits_per_byte) for p in points), strict=True)
            )
            curve = Curve(steps, _color(number), smooth_N=bits, marker=True)
            by_set.setdefault(scored_set, []).append(curve)
    if by_set:
        yield f"<h2>{escape(title)}</h2>"
    for number, (scored_set, curves) in enumerate(by_set.items()):
        rows = NOT_KNOWN_TO_BE_EQUAL if scored_set is None else f"Scored here: {scored_set}."
        rows = f"The same rows at every point: {scored_set}." if scored_set and len(by_set) == 1 else rows
        yield _figure(
            figures.draw(f"{name}{number}", curves, x_label="optimiser step", y_label="bits per byte"),
            f"Cross-entropy on held-out rows in bits, divided by the bytes of the text that was predicted. {rows}",
        )


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _results_table(comparison: Comparison) -> str:
    return _table(comparison, [(_named(one), values) for one, values in result_rows(comparison)])


def _honesty_table(comparison: Comparison) -> str:
    rows = [(_named(one), values) for one, values in honesty_rows(comparison)]
    name = "end of the last attempt<small>running: still training, or killed without a word</small>"
    return _table(comparison, [*rows, (name, [summary.end_state for summary in comparison.summaries])])


def _named(quantity: Quantity) -> str:
    return f"{escape(quantity.name)}<small>{escape(quantity.definition)}</small>"


def _settings(comparison: Comparison) -> str:
    if not comparison.differences:
        return "<p>Only the run's name and directory.</p>"
    items = comparison.differences.items()
    rows = [(f"<code>{escape(key)}</code>", ["-" if v is None else str(v) for v in values]) for key, values in items]
    return _table(comparison, rows)


def _table(comparison: Comparison, rows: list[tuple[str, list[str]]]) -> str:
    head = "".join(f"<th>{escape(run.label)}</th>" for run in comparison.runs)
    body = "".join(
        f"<tr><th>{name}</th>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>" for name, values in rows
    )
    return f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def escape(text: str) -> str:
    """`text` as the page shows it: markup is escaped, and invisible or directional characters are made visible."""
    return html_escape(visible(text))
