"""The page of `kha analyze`: `<run.dir>/analysis/index.html`, one file without scripts or outside files, in the light
and in the dark.
"""

# R, C rows and columns   L layers   H heads

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from kha_train.analysis.figures import spread
from kha_train.analysis.heads.inspection import (
    FOLDER,
    HeadOutputs,
    Inspection,
    LayerInspection,
    LearnedMatrix,
    PerHead,
    Square,
)
from kha_train.analysis.heads.matches import Match
from kha_train.analysis.heads.table import MATCH_HEADINGS, MATCH_MEANING, MEANINGS, layer_row, match_rows, short
from kha_train.analysis.heatmap import heatmap, largest_of, spectra
from kha_train.analysis.report.svg import text
from kha_train.record.files import check_replaceable, mark_of
from kha_train.record.redact import Redactor

PAGE = "<!doctype html>"
MOST_STEPS, MOST_MAPS = 12, 4
"""Of more checkpoints, so many are shown in tables and as heat-maps, evenly spread, with the first and the newest."""
STYLE = """
:root { color-scheme: light dark; --page: #fdfdfc; --card: #ffffff; --ink: #22262b; --soft: #626a73; --grid: #e3e5e8;
  --plus: #1261b5; --minus: #c4501b; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1c2024; --ink: #e4e7ea; --soft: #9aa3ac;
  --grid: #343a41; --plus: #6cb2ff; --minus: #ff9a62; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 68rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .2rem 0 .6rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; }
h3 { font-size: .98rem; margin: 1.2rem 0 .3rem; }
p { margin: .4rem 0; overflow-wrap: anywhere; max-width: 52rem; }
.soft, figcaption, dd { color: var(--soft); font-size: .86rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; font-size: .86rem; }
dd { margin: 0; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--grid); border-radius: .6rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .6rem; text-align: right; white-space: nowrap; }
thead th { font-weight: 650; }
td.heat { background: color-mix(in srgb, var(--tone) var(--part), transparent); }
.row { display: flex; flex-wrap: wrap; gap: .8rem; }
section { max-width: 100%; }
section h3 { margin: .6rem 0 .2rem; }
figure { margin: 0; width: 11rem; max-width: 46%; }
svg { display: block; width: 100%; height: auto; }
svg.map { background: var(--card); border: 1px solid var(--grid); }
code { font-size: .9em; overflow-wrap: anywhere; }
"""
BY_HEAD: dict[str, Callable[[LayerInspection], PerHead | None]] = {
    "entropy": lambda layer: layer.weights.entropy if layer.weights else None,
    "distance": lambda layer: layer.weights.distance if layer.weights else None,
    "sink": lambda layer: layer.weights.sink if layer.weights else None,
    "diversity": lambda layer: layer.weights.divergence if layer.weights else None,
    "head_rank": lambda layer: layer.outputs.ranks if layer.outputs else None,
    "rise": lambda layer: layer.rise,
    "rise_error": lambda layer: layer.rise_error,
}
"""What each head has a number of; the names are those of `MEANINGS`."""
OVER_TRAINING = (
    "cosine", "centred_cosine", "cka", "entropy", "distance", "sink", "diversity", "gate", "matrix_distance",
    "rise_mean",
)  # fmt: skip
BY_PAIR: dict[str, Callable[[HeadOutputs], Square]] = {
    "cosine": lambda outputs: outputs.cosine,
    "centred_cosine": lambda outputs: outputs.centred_cosine,
    "cka": lambda outputs: outputs.cka,
}


def write_page(run_dir: Path, label: str, saved: Sequence[Inspection], matches: Sequence[Match] = ()) -> Path:
    """Writes the page about the results `saved` of a run, at least one, and its `matches` with other runs, and returns
    its path. Raises ConfigError when something else is in its place, OSError.
    """
    path, mark = run_dir / FOLDER / "index.html", mark_of("analyze", ())
    check_replaceable(path, mark, str(path), False, (PAGE.encode(),))
    page = Redactor.from_environment().text(page_html(label, saved, mark, matches))
    path.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path


def page_html(label: str, saved: Sequence[Inspection], mark: str, matches: Sequence[Match] = ()) -> str:
    """The whole page as text, about the newest of `saved`, and how it came there; `mark` says whose page it is."""
    newest = saved[-1]
    title = f"{label}: {newest.base} x {newest.interaction}"
    parts = [
        f"<h1>{text(title)}, step {newest.step}</h1>",
        *_probe(newest),
        "<h2>Layers</h2>",
        _layers_table(newest),
        *_over_training(saved),
        *_heads(newest),
        *_pairs(newest),
        *_matrices(saved),
        *_gates(newest),
        *_clusters(newest),
        *_matches(matches),
    ]
    head = (
        f'{PAGE}<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="generator" content="{mark}"><title>{text(title)}</title><style>{STYLE}</style></head>'
    )
    return f"{head}<body>{''.join(parts)}</body></html>\n"


def _probe(newest: Inspection) -> Iterator[str]:
    probe = newest.probe
    yield (
        f"<p>Loss {newest.loss:.4f} nats per token on {probe.tokens} tokens in {probe.documents} documents or parts of "
        f"them ({probe.rows} rows of <code>{text(probe.field)}</code>), attention weights of {probe.queries} tokens. "
        f"Rows: <code>{probe.digest[:16]}</code>; only results of the same rows compare.</p>"
    )
    for name, reason in newest.absent.items():
        yield f'<p class="soft">No {text(name)}: {text(reason)}.</p>'


def _layers_table(newest: Inspection) -> str:
    rows = [layer_row(layer) for layer in newest.layers]
    shown = [name for name in MEANINGS if any(row.get(name) is not None for row in rows)]
    head = "".join(f"<th>{text(MEANINGS[name].heading)}</th>" for name in shown)
    body = "".join(
        f"<tr><th>{row['layer']}</th>{''.join(f'<td>{short(row[name])}</td>' for name in shown)}</tr>" for row in rows
    )
    meanings = "".join(f"<dt>{text(MEANINGS[n].heading)}</dt><dd>{text(MEANINGS[n].meaning)}</dd>" for n in shown)
    table = f"<table><thead><tr><th>layer</th>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div><dl>{meanings}</dl>'


def _over_training(saved: Sequence[Inspection]) -> Iterator[str]:
    """Each figure by layer and step, of results of the same rows as the newest."""
    same = [one for one in saved if one.probe.digest == saved[-1].probe.digest]
    if len(same) < 2:
        return
    yield "<h2>Over training</h2><div class='row'>"
    shown = spread(same, MOST_STEPS)
    by_step = [[layer_row(layer) for layer in one.layers] for one in shown]
    for name in OVER_TRAINING:
        if any(row[name] is not None for rows in by_step for row in rows):
            table = [[rows[layer][name] for rows in by_step] for layer in range(len(by_step[0]))]
            yield _strip(MEANINGS[name].heading, [str(one.step) for one in shown], table)
    yield "</div>"


def _heads(newest: Inspection) -> Iterator[str]:
    yield "<h2>Heads</h2><div class='row'>"
    for name, of in BY_HEAD.items():
        rows = [row for layer in newest.layers if (row := of(layer)) is not None]
        if rows:
            yield _strip(MEANINGS[name].heading, [f"head {head}" for head in range(len(rows[0]))], rows)
    yield "</div>"


def _strip(title: str, heads: Sequence[str], rows: Sequence[Sequence[float | None]]) -> str:
    """A table of numbers by layer, whose cells are coloured from the smallest to the largest number or, where some are
    negative, from zero by their size and sign.
    """
    finite = [value for row in rows for value in row if value is not None and math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    if low < 0:
        low, high = 0.0, max(map(abs, finite))
    body = []
    for layer, row in enumerate(rows):
        cells = "".join(_cell(value, low, high) for value in row)
        body.append(f"<tr><th>{layer}</th>{cells}</tr>")
    head = "".join(f"<th>{text(one)}</th>" for one in heads)
    table = f"<table><thead><tr><th>layer</th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<section><h3>{text(title)}</h3><div class="scroll">{table}</div></section>'


def _cell(value: float | None, low: float, high: float) -> str:
    if value is None or not math.isfinite(value):
        return f"<td>{short(value)}</td>"
    tone = "plus" if value >= 0 else "minus"
    part = round(60 * (abs(value) - low) / (high - low)) if high > low else 0
    return f'<td class="heat" style="--tone: var(--{tone}); --part: {part}%">{short(value)}</td>'


def _pairs(newest: Inspection) -> Iterator[str]:
    """Heat-maps of the similarity of every two heads."""
    yield "<h2>Pairs of heads</h2>"
    yield '<p class="soft">Full colour is 1 or -1.</p>'
    for name, of in BY_PAIR.items():
        yield f"<h3>{text(MEANINGS[name].heading)}</h3><div class='row'>"
        for layer in newest.layers:
            if layer.outputs:
                yield _figure(heatmap(np.array(of(layer.outputs)), f"layer {layer.layer}", 1.0), f"layer {layer.layer}")
        yield "</div>"


def _matrices(saved: Sequence[Inspection]) -> Iterator[str]:
    """Every learned matrix of the newest checkpoint by layer, what differs from the identity in a few checkpoints, and
    the singular values of the newest.
    """
    if not saved[-1].matrices():
        return
    yield "<h2>Learned matrices</h2>"
    yield (
        '<p class="soft">Rows are inputs, columns outputs (x M). First the matrix, then M - I, what differs from the '
        "matrix at which heads pass unchanged. |M - I| is its Frobenius norm; mass, the share of the diagonal in the "
        "squared norm of M; off / on, the norm off the diagonal over that on it. Lines are the singular values of each "
        "layer, the last layer the strongest.</p>"
    )
    shown = spread(saved, MOST_MAPS)
    for name, newest in saved[-1].matrices().items():
        yield f"<h3><code>{text(name)}</code>, {newest[0].acts}</h3>"
        yield from _maps({f"step {saved[-1].step}": [one.array_RC() for one in newest]}, [list(map(_facts, newest))])
        of_steps = {f"step {one.step}, M - I": one.matrices().get(name, ()) for one in shown}
        if newest[0].identity is not None:
            apart = {title: [one.apart_RC() for one in matrices] for title, matrices in of_steps.items()}
            yield from _maps(apart, [[_distance(one) for one in matrices] for matrices in of_steps.values()])
        series = [(f"layer {layer}", one.singular) for layer, one in enumerate(newest)]
        yield f"<div class='row'>{_figure(spectra(series), 'singular values')}</div>"


def _maps(by_step: dict[str, list[np.ndarray]], captions: list[list[str]]) -> Iterator[str]:
    """A row of heat-maps by layer for each title, all of one scale."""
    largest = largest_of([matrix_RC for matrices in by_step.values() for matrix_RC in matrices])
    for (title, matrices), facts in zip(by_step.items(), captions, strict=True):
        yield f"<p class='soft'>{text(title)}, full colour {short(largest)}</p><div class='row'>"
        for layer, (matrix_RC, fact) in enumerate(zip(matrices, facts, strict=True)):
            yield _figure(heatmap(matrix_RC, f"{title}, layer {layer}", largest), f"layer {layer}: {fact}")
        yield "</div>"


def _distance(matrix: LearnedMatrix) -> str:
    return f"|M - I| {short(matrix.distance)}"


def _facts(matrix: LearnedMatrix) -> str:
    facts = {"diagonal": matrix.diagonal_mean, "mass": matrix.diagonal_mass, "off / on": matrix.off_diagonal_ratio}
    return ", ".join(f"{name} {short(value)}" for name, value in facts.items() if value is not None)


def _gates(newest: Inspection) -> Iterator[str]:
    gates = [(layer.layer, gate) for layer in newest.layers for gate in layer.gates]
    if not gates:
        return
    yield (
        "<h2>Gates</h2><p class='soft'>Of maps 0.5 everywhere before training, of head outputs near it. Closed: the "
        "share below 0.1.</p>"
    )
    body = "".join(
        f"<tr><th>{layer}</th><td><code>{text(gate.name)}</code></td><td>{short(gate.mean)}</td>"
        f"<td>{short(gate.deviation)}</td><td>{short(gate.closed)}</td>"
        f"<td>{' '.join(map(short, gate.head_means))}</td></tr>"
        for layer, gate in gates
    )
    head = "<th>layer</th><th>gate</th><th>mean</th><th>deviation</th><th>closed</th><th>means of heads</th>"
    yield f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _clusters(newest: Inspection) -> Iterator[str]:
    clusters = [(layer.layer, one) for layer in newest.layers for one in layer.clusters]
    if not clusters:
        return
    yield "<h2>Clusters of compositions</h2>"
    yield (
        '<p class="soft">Heads grouped by the cosine of how they are composed. p: the share of matrices with shuffled '
        "coefficients that have as good a silhouette. Importance: the share of the variance of the loss rise that lies "
        "between the groups, and the share of shuffled groups that reach it. One layer in twenty has p below 0.05 by "
        "chance.</p>"
    )
    body = "".join(
        f"<tr><th>{layer}</th><td><code>{text(one.name)}</code></td><td>{' '.join(map(str, one.labels))}</td>"
        f"<td>{short(one.silhouette)}</td><td>{short(one.p)}</td><td>{short(one.importance_share)}</td>"
        f"<td>{short(one.importance_p)}</td></tr>"
        for layer, one in clusters
    )
    titles = ("layer", "matrix", "group of each head", "silhouette", "p", "importance", "p of it")
    head = "".join(f"<th>{title}</th>" for title in titles)
    yield f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _matches(matches: Sequence[Match]) -> Iterator[str]:
    """Which heads play the part of those of other runs, with the similarities of all pairs as heat-maps."""
    if not matches:
        return
    yield f"<h2>Heads of other runs</h2><p class='soft'>{text(MATCH_MEANING)}</p>"
    head = "".join(f"<th>{text(title)}</th>" for title in MATCH_HEADINGS)
    for match in matches:
        both = f"{match.reference}, step {match.reference_step}, beside step {match.step} of this run"
        for name, rows in match_rows(match).items():
            yield f"<h3>{text(both)}: {text(name)}</h3>"
            body = "".join(f"<tr>{''.join(f'<td>{text(one)}</td>' for one in row)}</tr>" for row in rows)
            yield f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
            yield '<p class="soft">Rows: heads of the other run; columns: heads of this run; full colour is 1.</p>'
            yield "<div class='row'>"
            for layer, one in match.by_kind()[name]:
                yield _figure(heatmap(np.array(one.similarity), f"layer {layer}", 1.0), f"layer {layer}")
            yield "</div>"


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{text(caption)}</figcaption></figure>"
