"""Section: the health of the router and of the layers, by layer."""

# L layers

from __future__ import annotations

import re

import numpy as np

from kha_train.analysis.layers import Sampled
from kha_train.analysis.report.content import Axis, Block, Figure, Section, Series, Text
from kha_train.analysis.report.context import Context
from kha_train.analysis.runs import RunData
from kha_train.metric import BY_LAYER
from kha_train.record import declared_in

LAYER = Axis("layer", "layer", whole=True)
ROUTER = ("moe/maxvio", "moe/load_cv", "moe/load_entropy", "moe/bias_range", "moe/dead_fraction")
OTHERS = ("layer/grad_norm", "layer/update_norm", "layer/activation_rms")
MOST_BANDS = 3
"""More bands than this cannot be told apart."""
MEANING = (
    "By layer: mean over the last quarter of the sampled steps. Over training: the mean over layers; of up to three "
    "runs, with a band from the lowest to the highest layer. Both are read from lines spread over each run."
)
NO_STATISTICS = (
    "Gradient, update and activation norms by layer were not recorded. telemetry.layer_statistics_every=N records them."
)


def section(context: Context) -> Section | None:
    """Figures by layer and over training of everything that a run recorded by layer."""
    recorded = {
        name for run, sampled in zip(context.runs, context.sampled, strict=True) for name in _known(run, sampled)
    }
    if not recorded:
        words = "No run recorded figures by layer: there is no router, or the runs are of an older release."
        return Section("router", "Router and layers", (Text(words, "soft"),))
    blocks: list[Block] = [Text(MEANING, "soft")]
    for name in (*ROUTER, *OTHERS, *sorted(recorded - {*ROUTER, *OTHERS})):
        if name in recorded and _is_zero(context, name):
            blocks.append(
                Text(f"{name} is 0 in every layer of every run at all sampled steps. {context.meaning(name)}")
            )
        elif name in recorded:
            blocks += [_profile(context, name), _training(context, name)]
    if not recorded & set(OTHERS):
        blocks.append(Text(NO_STATISTICS, "soft"))
    return Section("router", "Router and layers", tuple(blocks))


def _is_zero(context: Context, name: str) -> bool:
    return not any(sampled.by_layer[name].values_SL.any() for sampled in context.sampled if name in sampled.by_layer)


def _known(run: RunData, sampled: Sampled) -> set[str]:
    """The recorded figures that this release knows, or that the run declared."""
    declared = declared_in(run.run)
    return {name for name in sampled.by_layer if name in (*ROUTER, *OTHERS) or f"{name}{BY_LAYER}" in declared}


def _file(name: str) -> str:
    """The name of a metric, which may be a stranger's, as part of a file's name."""
    return re.sub(r"[^\w]", "-", name, flags=re.ASCII)[:60]


def _profile(context: Context, name: str) -> Figure:
    """Each layer's late mean, one line a run; one a variant, its band over runs, where there are too many."""
    late = [found.late() if (found := sampled.by_layer.get(name)) is not None else None for sampled in context.sampled]
    curves = []
    if context.grouped:
        for variant, runs in context.variants.items():
            known = [one for run in runs if (one := late[run]) is not None]
            if known and len({len(one) for one in known}) == 1:
                values = np.stack(known)
                x = {LAYER.key: np.arange(values.shape[1], dtype=np.float64)}
                band = values.min(axis=0), values.max(axis=0)
                curves.append(Series(variant, context.variant_style(variant), "points", x, values.mean(axis=0), *band))
    else:
        for run, values_L in enumerate(late):
            if values_L is not None:
                x = {LAYER.key: np.arange(len(values_L), dtype=np.float64)}
                curves.append(Series(context.labels[run], context.style(run), "points", x, values_L))
    return Figure(f"{_file(name)}-layers", f"{name} by layer", context.meaning(name), name, (LAYER,), tuple(curves))


def _training(context: Context, name: str) -> Figure:
    """The mean over layers at the sampled steps of every run; of the first run of every variant, where there are too
    many.
    """
    chosen = [runs[0] for runs in context.variants.values()] if context.grouped else list(range(len(context.runs)))
    curves = []
    for run in chosen:
        found = context.sampled[run].by_layer.get(name)
        if found is not None:
            values = found.values_SL
            x = context.x(run, found.steps_S)
            edges = (values.min(axis=1), values.max(axis=1)) if len(chosen) <= MOST_BANDS else (None, None)
            curves.append(Series(context.labels[run], context.style(run), "line", x, values.mean(axis=1), *edges))
    words = "The first run of each variant." if context.grouped else ""
    return Figure(f"{_file(name)}-training", f"{name} over training", words, name, context.axes, tuple(curves))
