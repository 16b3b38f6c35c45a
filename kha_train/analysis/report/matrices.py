"""Section: the learned interaction matrices over training."""

# N probed steps

from __future__ import annotations

from kha_train.analysis.report.content import Block, Figure, Section, Series, Text
from kha_train.analysis.report.context import Context
from kha_train.analysis.report.curves import grouped_points

FROM_IDENTITY = "kha/from_identity"
LOGIT = "attn/max_logit"
CAPTIONS = {
    FROM_IDENTITY: "Largest Frobenius distance of a matrix (gates aside) from the identity, of all layers.",
    LOGIT: "Largest attention logit of all layers over sampled queries.",
}


def section(context: Context) -> Section | None:
    """What the probes of training recorded of the matrices."""
    blocks: list[Block] = []
    for name, caption in CAPTIONS.items():
        curves = [
            Series(label, context.style(run), "points", context.x(run, found.steps_N), found.values_N)
            for run, label in enumerate(context.labels)
            if (found := context.sampled[run].probed.get(name)) is not None
        ]
        if curves:
            figure = Figure(
                name.replace("/", "-"), name, caption, name, context.axes, tuple(grouped_points(context, curves))
            )
            blocks.append(figure)
    if not blocks:
        return None
    blocks.append(Text("Recorded on probed steps (stability.probe_every).", "soft"))
    return Section("matrices", "Interaction matrices over training", tuple(blocks))
