"""What a comparison may say, one sentence for each variant: the difference over seeds, and the runs that diverged."""

from __future__ import annotations

from kha_train.analysis.compare import AcrossSeeds, Comparison
from kha_train.analysis.rates import VariantEvents


def answers(comparison: Comparison) -> tuple[str, ...]:
    """One sentence for each variant beside the reference's; one about all runs where there is no other variant."""
    reference, *others = dict.fromkeys(run.variant for run in comparison.runs)
    if not others:
        count = len(comparison.runs)
        if count == 1:
            return (f"{reference}: {comparison.evidence}.",)
        return (f"{count} runs of {reference}: no other variant to compare with, so their differences are seeds.",)
    found = {one.variant: one for one in comparison.across_seeds}
    return tuple(
        f"{_difference(variant, reference, found.get(variant))}{_lost(comparison, (reference, variant))}."
        for variant in others
    )


def _difference(variant: str, reference: str, found: AcrossSeeds | None) -> str:
    names = f"{variant} against {reference}"
    if found is None:
        return f"{names}: no fair pair with finite losses, so nothing can be said"
    count = len(found.differences)
    if found.interval is None:
        return f"{names}: train loss {found.differences[0]:+.4f} nats per token in one seed. 1 seed: not evidence"
    interval = found.interval
    told = f"{interval.mean:+.4f} nats per token, 95 % over {count} seeds: {interval.low:+.4f} to {interval.high:+.4f}"
    signs = found.sign_test.words
    if interval.excludes_zero:
        which = "lower" if interval.mean < 0 else "higher"
        weak = "; fewer than 3 seeds: weak evidence" if count < 3 else ""
        return f"{names}: {which} train loss, {told}; {signs}{weak}"
    return f"{names}: no difference in train loss that {count} seeds show, {told}; {signs}"


def _lost(comparison: Comparison, variants: tuple[str, str]) -> str:
    """The runs of `variants` that diverged or did not recover, as the end of a sentence."""
    told = [words for one in comparison.events if one.variant in variants for words in lost_words(one)]
    return f". {'; '.join(told)}" if told else ""


def lost_words(events: VariantEvents) -> list[str]:
    """How many runs of a variant diverged, and how many others had a loss that rose and stayed up."""
    count, told = len(events.runs), []
    if events.diverged:
        told.append(f"{len(events.diverged)} of {count} {events.variant} runs diverged ({', '.join(events.diverged)})")
    others = [label for label in events.unrecovered if label not in events.diverged]
    if others:
        told.append(f"{len(others)} of {count} {events.variant} runs did not recover from a rise ({', '.join(others)})")
    return told
