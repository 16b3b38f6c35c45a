"""Section: the answer in one sentence a variant, with its interval over seeds."""

from __future__ import annotations

from kha_train.analysis.answer import answers
from kha_train.analysis.compare import AcrossSeeds
from kha_train.analysis.report.content import Block, Result, Section, Text
from kha_train.analysis.report.context import Context

MEANING = (
    "Train loss at equal steps, mean over the last half of the common steps of each pair; one pair a seed, fair pairs "
    "alone. Below zero: the variant has the lower loss. Only an interval over seeds says anything about other seeds."
)


def section(context: Context) -> Section:
    """The sentences of `answers`, and the numbers behind them."""
    comparison = context.comparison
    blocks: list[Block] = [Text(words, "answer") for words in answers(comparison)]
    blocks += [_result(context, found) for found in comparison.across_seeds if found.interval is not None]
    if comparison.pairs:
        blocks.append(Text(MEANING, "soft"))
    return Section("answer", "Answer", tuple(blocks))


def _result(context: Context, found: AcrossSeeds) -> Result:
    interval = found.interval
    assert interval is not None
    variants = (found.variant, found.reference)
    lost = [run.label for number, run in enumerate(context.runs) if run.variant in variants and context.lost(number)]
    warnings = (f"{', '.join(lost)}: diverged, or did not recover. Steps without a finite loss are left out.",)
    singles = ", ".join(f"{one:+.4f}" for one in found.differences)
    return Result(
        names=f"{found.variant} \N{MINUS SIGN} {found.reference}, {interval.seeds} seeds",
        number=f"{interval.mean:+.4f}",
        bold=not lost,
        beside=f"nats per token, 95 % interval {interval.low:+.4f} to {interval.high:+.4f}",
        explained=f"Mean of the paired differences, one a seed ({singles}); Student interval over the seeds.",
        warnings=warnings if lost else (),
    )
