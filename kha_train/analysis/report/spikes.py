"""Section: spikes, divergences and areas, by variant with rates over seeds, and by run."""

from __future__ import annotations

from kha_train.analysis.answer import lost_words
from kha_train.analysis.causes import read_verdicts, words_of
from kha_train.analysis.rates import UNIT, VariantEvents
from kha_train.analysis.report.content import Block, Row, Section, Table, Text
from kha_train.analysis.report.context import Context
from kha_train.analysis.rows import spikes_words
from kha_train.analysis.summary import Summary
from kha_train.stability.statistics import shared_events

NOT_JUDGED = "too short to judge"
MEANING = (
    "Rates are over the runs that neither diverged nor failed to recover, because a run that blows up has no further "
    "spikes to count. Their interval (95 %) is for seeds whose true rates may differ. Area: the sum of the losses "
    "above the baseline during all events, in nats x steps, with the lowest and the highest run. The curves of train "
    "loss have marks at these events."
)


def section(context: Context) -> Section:
    """A table of the variants, one of the runs, and which events the runs of a pair share."""
    comparison = context.comparison
    blocks: list[Block] = [Text(f"{words}.", "warning") for events in comparison.events for words in lost_words(events)]
    head = (
        "variant", "runs", "diverged", "not recovered", "spikes", f"spikes per {UNIT:,} steps",
        "single runs", f"area per {UNIT:,} steps",
    )  # fmt: skip
    blocks.append(Table(head, tuple(_of_variant(events) for events in comparison.events)))
    blocks.append(Text(MEANING, "soft"))
    blocks.append(_runs(context))
    blocks += _shared(context)
    blocks += _replayed(context)
    return Section("spikes", "Spikes and divergences", tuple(blocks))


def _of_variant(events: VariantEvents) -> Row:
    counted = len(events.runs) - len({*events.diverged, *events.unrecovered})
    rate = "-"
    if events.rate["value"] is not None:
        rate = f"{events.rate['value']:.3g} [{events.rate['low']:.3g}, {events.rate['high']:.3g}]"
    area = events.area
    areas = f"{area.mean:.3g}, runs {area.lowest:.3g} to {area.highest:.3g}" if area else "-"
    values = (
        str(len(events.runs)),
        str(len(events.diverged)),
        str(len(events.unrecovered)),
        f"{events.spikes} in {events.steps:,} steps of {counted} run{'s' * (counted != 1)}" if events.steps else "-",
        rate,
        ", ".join(NOT_JUDGED if one is None else f"{one:.3g}" for one in events.rates),
        areas,
    )
    return Row(events.variant, values)


def _runs(context: Context) -> Table:
    summaries = context.comparison.summaries
    rows = [
        Row("loss spikes", tuple(map(spikes_words, summaries)), "narrow and wide events; - where too short to judge"),
        Row("diverged", tuple("yes" if one.honesty["diverged"] else "no" for one in summaries)),
        *(
            Row(name, tuple(_figure(one, key, style) for one in summaries), note)
            for name, key, style, note in (
                ("unrecovered events", "unrecovered_total", ".0f", "rises of the loss that did not recover"),
                ("area of all events", "area_total", ".4g", "nats x steps above the baseline"),
                ("largest height", "max_height", ".4g", "nats above the baseline"),
                ("steps inside events", "steps_in_spike_frac", ".2%", "of all steps"),
                ("non-finite steps in events", "nonfinite_steps", ".0f", "loss or gradient norm"),
            )
        ),
        *(_score(name, summaries) for name in dict.fromkeys(key for one in summaries for key in one.stability.scores)),
    ]
    return context.run_table(rows)


def _figure(summary: Summary, key: str, style: str) -> str:
    value = summary.stability.summary[key]
    return "-" if value is None else format(value, style)


def _score(name: str, summaries: tuple[Summary, ...]) -> Row:
    values = [one.stability.scores.get(name) for one in summaries]
    return Row(name, tuple("-" if value is None else f"{value:.3g} %" for value in values), code=True)


def _shared(context: Context) -> list[Block]:
    """For each pair with events, how many began at the same data: those were not caused by the variant."""
    found: list[Block] = []
    for pair in context.comparison.pairs:
        reports = [context.comparison.summaries[run].stability for run in (pair.reference, pair.other)]
        flags = shared_events([report.events for report in reports])
        if any(flags):
            told = zip((pair.reference, pair.other), flags, strict=True)
            words = ", ".join(f"{context.labels[run]} {sum(shared)} of {len(shared)}" for run, shared in told)
            found.append(Text(f"Events at the same data in both runs of a pair: {words}.", "soft"))
    return found


def _replayed(context: Context) -> list[Block]:
    """What `kha replay` found to be the cause of events of these runs."""
    found: list[Block] = []
    for number, run in enumerate(context.comparison.runs):
        for verdict in read_verdicts(run.path):
            rows = [Row(arm["name"], (arm["change"] or "-", words_of(arm))) for arm in verdict["arms"]]
            steps = f"{verdict['start_step']} to {verdict['end_step']}"
            found.append(Text(f"Replayed event of {context.labels[number]}, steps {steps}: {verdict['answer']}."))
            if rows:
                found.append(Table(("arm", "change", "result"), tuple(rows), f"arms of the replay of steps {steps}"))
    return found
