"""Section: the learned interaction matrices over training, and what the heads do, as `kha analyze` saved it."""

# N probed steps  R, C rows and columns of a matrix

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kha_train.analysis.figures import spread
from kha_train.analysis.heads.inspection import Inspection
from kha_train.analysis.heads.matches import Matched
from kha_train.analysis.heads.table import layer_row
from kha_train.analysis.heatmap import largest_of
from kha_train.analysis.layers import PROBED
from kha_train.analysis.report.content import Block, Figure, Maps, Row, Section, Series, Subtitle, Table, Text
from kha_train.analysis.report.context import Context
from kha_train.analysis.report.curves import grouped_points

ANALYSED = {
    "matrix_distance": "Frobenius norm, over all learned matrices of a layer, of what differs from the identity.",
    "gate": "Mean of the sigmoid gates; 0.5 before training.",
    "centred_cosine": "Mean cosine of the outputs of two heads, each less its mean.",
    "cka": "Linear centred kernel alignment of two heads, which no change of basis alters.",
    "entropy": "Entropy of the attention weights, as a share of the largest possible.",
    "diversity": "Generalised Jensen-Shannon divergence of the heads' attention weights; 0: identical heads.",
    "rise_mean": "Rise of the loss when a head is silenced, nats per token; mean over heads.",
}
"""Figures of a layer in a result of `kha analyze`, with their meanings."""
MOST_LAYERS, MOST_STEPS, MOST_NAMES = 4, 4, 3
"""Layers, checkpoints and matrices of a variant that are drawn, the first and the last among them."""


def section(context: Context) -> Section:
    """Curves of what probes of training and `kha analyze` recorded, and the matrices of one run of each variant."""
    blocks: list[Block] = list(_probed(context))
    if blocks:
        blocks.append(Text("Recorded on probed steps of training (stability.probe_every).", "soft"))
    analysed = [number for number, (found, _) in enumerate(context.inspections) if found]
    if analysed:
        blocks += [Subtitle("Checkpoints, as kha analyze saw them"), *_analysed(context), *_maps(context)]
    blocks += _matched(context)
    blocks += [Text(words, "warning") for _, words in (*context.inspections, *context.saved_matches) if words]
    without = [label for number, label in enumerate(context.labels) if number not in analysed]
    if without:
        words = "kha analyze RUN --every-checkpoint shows heads and matrices of saved checkpoints; not done for "
        blocks.append(Text(f"{words}{', '.join(without)}.", "soft"))
    return Section("matrices", "Interaction matrices over training", tuple(blocks))


def _probed(context: Context) -> Iterator[Figure]:
    for name in PROBED:
        curves = [
            Series(label, context.style(run), "points", context.x(run, found.steps_N), found.values_N)
            for run, label in enumerate(context.labels)
            if (found := context.sampled[run].probed.get(name)) is not None
        ]
        if curves:
            yield _figure(context, name.replace("/", "-"), name, context.meaning(name), curves)


def _analysed(context: Context) -> Iterator[Figure]:
    """The mean over layers of each figure, at every checkpoint that was looked at."""
    for name, caption in ANALYSED.items():
        curves = []
        for run, (inspections, _) in enumerate(context.inspections):
            means = [(one.step, mean) for one in inspections if (mean := _mean(one, name)) is not None]
            # A checkpoint may lie behind the last surviving line, after the run went back.
            means = [(step, mean) for step, mean in means if step in context.runs[run].steps]
            if means:
                steps, values = (np.array(column) for column in zip(*means, strict=True))
                x = context.x(run, steps)
                curves.append(Series(context.labels[run], context.style(run), "points", x, values))
        if curves:
            words = f"{caption} Mean over layers."
            yield _figure(context, f"heads-{name}", name.replace("_", " "), words, curves)


def _figure(context: Context, name: str, title: str, caption: str, curves: Sequence[Series]) -> Figure:
    return Figure(name, title, caption, title, context.axes, tuple(grouped_points(context, curves)))


def _mean(one: Inspection, name: str) -> float | None:
    values = [value for layer in one.layers if (value := layer_row(layer)[name]) is not None]
    return float(np.mean(values)) if values else None


def _maps(context: Context) -> Iterator[Block]:
    """The matrices of the first analysed run of each variant: layers below each other, checkpoints side by side."""
    for variant, runs in context.variants.items():
        run = next((run for run in runs if context.inspections[run][0]), None)
        if run is None:
            continue
        chosen = spread(context.inspections[run][0], MOST_STEPS)
        names = list(dict.fromkeys(name for one in chosen for name in one.matrices()))
        for number, name in enumerate(names[:MOST_NAMES]):
            place = list(context.variants).index(variant)
            yield _map(context.labels[run], name, f"matrices-{place}-{number}", chosen)
        if len(names) > MOST_NAMES:
            left = (
                f"{len(names) - MOST_NAMES} further matrices of {context.labels[run]} are on the page of kha analyze."
            )
            yield Text(left, "soft")


def _matched(context: Context) -> list[Block]:
    """Which heads of one run play the part of which of another, for every two runs of which this is known."""
    rows = [
        Row(f"{context.labels[run]}, for {context.labels[other]}", (str(match.step), name, *_of_layers(layers)))
        for run, other, match in context.matches
        for name, layers in match.by_kind().items()
    ]
    if not rows:
        return []
    head = ("heads", "step", "matched by", "mean", "excess", "layers with p up to 0.05", "same number")
    words = (
        "As kha analyze --match saved it: heads of each layer are matched one to one, so that matched heads are as "
        "alike as possible. Excess: by how much they are more alike than all pairs. p: the share of shuffled tables "
        "whose best matching has as large an excess; one layer in twenty has p up to 0.05 by chance. Same number: "
        "heads whose partner has their own number, and how many chance would give."
    )
    return [Subtitle("Heads of one run for those of another"), Table(head, tuple(rows)), Text(words, "soft")]


def _of_layers(layers: Sequence[tuple[int, Matched]]) -> tuple[str, ...]:
    """Means over layers and counts, as a table shows them. A random matching leaves one head of a layer in place."""
    found = [one for _, one in layers]
    clear, kept = sum(one.p <= 0.05 for one in found), sum(one.kept for one in found)
    return (
        *(f"{np.mean([getattr(one, name) for one in found]):.3f}" for name in ("mean", "excess")),
        f"{clear} of {len(found)}",
        f"{kept} of {sum(len(one.partner) for one in found)}; by chance {len(found)}",
    )


def _map(label: str, name: str, file: str, chosen: Sequence[Inspection]) -> Maps:
    of_steps = [
        {layer.layer: one for layer in step.layers for one in layer.matrices if one.name == name} for step in chosen
    ]
    layers = spread(sorted({layer for found in of_steps for layer in found}), MOST_LAYERS)
    drawn = [
        (f"layer {layer}, step {step.step}", found[layer].apart_RC())
        for layer in layers
        for step, found in zip(chosen, of_steps, strict=True)
        if layer in found
    ]
    largest = largest_of([values_RC for _, values_RC in drawn])
    caption = (
        "What differs from the identity, where the matrix has one. Blue: positive, orange: negative, full at "
        f"{largest:.3g}. All on one scale."
    )
    return Maps(file, f"{label}: {name}", caption, largest, tuple(drawn))
