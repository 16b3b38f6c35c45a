"""Section: what was certified, and how to check it."""

from __future__ import annotations

from kha_train.analysis.certify.certified import Certified, Null, Replay, SeedsNeeded
from kha_train.analysis.certify.null import command_for_null
from kha_train.analysis.certify.verify import REPORT_LINKS, RUN_LINKS
from kha_train.analysis.report.content import Block, Row, Section, Subtitle, Table, Text
from kha_train.analysis.report.context import Context

CHECK = (
    "To check: python verify.py, beside this page; it needs Python alone. It reads every file of the runs again, names "
    "each field that has changed since, and computes the differences of the pairs from the records."
)
LIMIT = (
    "A chain shows that nothing has changed since it was made, if you kept the seal that the command printed. It does "
    "not show that the files were right then: whoever changes a record and makes a new chain gets another seal. That a "
    "record follows from code and data is shown by recomputing it."
)

UNPAIRED = (
    "The runs of such a pair read other samples at each step, or start from other weights; those of a fair pair do "
    "neither. So equal arms that are paired usually differ less, and these differences set a stricter bound."
)


def section(context: Context) -> Section | None:
    """The chains of the runs. Nothing for a comparison without a certificate."""
    certified = context.comparison.certified
    if certified is None:
        return None
    covered = [Row(name, (covers,)) for name, covers in (RUN_LINKS | REPORT_LINKS).items()]
    blocks: list[Block] = [
        Table(("link", "covers"), tuple(covered)),
        Table(("chain", "SHA-256 of its last link"), tuple(Row(one.label, (one.head,)) for one in certified.chains)),
        Text(CHECK),
        Text(LIMIT, "soft"),
    ]
    blocks += _nulls(context, certified)
    blocks += _needs(certified)
    blocks += _replays(certified)
    going = [one.label for one in certified.chains if not one.ended]
    if going:
        words = f"{', '.join(going)}: the last attempt has not ended. When the run goes on, the certificate expires."
        blocks.append(Text(words, "warning"))
    return Section("certificate", "Certificate", tuple(blocks))


def _nulls(context: Context, certified: Certified) -> list[Block]:
    """How large differences are that mean nothing, and where the effects lie."""
    blocks: list[Block] = [Subtitle("Differences that mean nothing")]
    if not certified.nulls:
        words = f"No A/A runs were given. To make one: {command_for_null(context.runs[0])}"
        return [*blocks, Text(f"{words}; then name it and the run that it repeats, each with --null.", "soft")]
    for null in certified.nulls:
        singles = ", ".join(f"{one.other} \N{MINUS SIGN} {one.reference} {one.difference:+.2g}" for one in null.pairs)
        plural = "" if null.freedom == 1 else "s"
        words = (
            f"A/A runs ({null.kind}), steps {null.first_step} to {null.last_step}: the largest of {len(null.pairs)} "
            f"differences is {null.largest:.2g} nats per token; standard deviation {null.spread:.2g} with "
            f"{null.freedom} degree{plural} of freedom; 95 % of such differences are within "
            f"\N{PLUS-MINUS SIGN}{null.bound:.2g}."
        )
        blocks.append(Text(words))
        blocks += [Text(_place(null, need)) for need in certified.needs if need.seeds]
        blocks.append(Text(f"Differences: {singles}.", "soft"))
        blocks += [] if null.paired else [Text(UNPAIRED, "soft")]
        blocks += [Text(words, "warning") for words in null.caveats]
    return blocks


def _place(null: Null, need: SeedsNeeded) -> str:
    """Where an effect lies among differences that mean nothing. A mean over n pairs varies less by sqrt(n)."""
    bound = null.bound / need.seeds**0.5
    above = sum(abs(pair.difference) >= abs(need.effect) for pair in null.pairs)
    where = "outside" if abs(need.effect) > bound else "within"
    return (
        f"{need.variant}: the {'stated' if need.stated else 'measured'} effect of {need.effect:+.4f} lies {where} "
        f"\N{PLUS-MINUS SIGN}{bound:.2g}, the range of means over {need.seeds} such pairs; {above} of "
        f"{len(null.pairs)} A/A differences are at least as large."
    )


def _needs(certified: Certified) -> list[Block]:
    """How many seeds the effects need."""
    rows = [Row(need.variant, (f"{need.effect:+.4f}", _spread(need), _seeds(need))) for need in certified.needs]
    if not rows:
        return []
    assumed = (
        "Seeds with which a two-sided t test at 5 % finds the effect with a probability of 80 %, by the noncentral t "
        "distribution. It assumes independent, normal differences, one a seed. In brackets: from the 95 % limits of "
        "the standard deviation, which few seeds determine badly."
    )
    measured = (
        " The effects are the measured ones: such a number describes this result and plans no other. State the "
        "smallest effect that matters with --effect."
    )
    words = assumed + ("" if all(need.stated for need in certified.needs) else measured)
    head = ("variant", "effect, nats per token", "standard deviation over seeds", "seeds needed")
    return [Subtitle("Seeds needed"), Table(head, tuple(rows)), Text(words, "soft")]


def _spread(need: SeedsNeeded) -> str:
    if need.spread is None:
        return f"unknown from {need.seeds} seed{'s' * (need.seeds != 1)}"
    low, high = need.spread_limits
    return f"{need.spread:.2g} [{low:.2g}, {high:.2g}], {need.seeds} seeds"


def _seeds(need: SeedsNeeded) -> str:
    if need.spread is None:
        return "-"
    told = ["more than 1,000" if one is None else str(one) for one in (need.needed, *need.needed_limits)]
    return f"{told[0]} [{told[1]}, {told[2]}]"


def _replays(certified: Certified) -> list[Block]:
    if not certified.replays:
        return [Text("No stretch was recomputed: --replay N draws and recomputes N of them.", "soft")]
    rows = tuple(Row(one.run, (_steps(one), one.outcome, _compared(one))) for one in certified.replays)
    words = f"Stretches between two saved states, drawn with seed {certified.replay_seed}; timings are left out."
    return [
        Subtitle("Recomputed"),
        Table(("run", "steps", "outcome", "compared bit for bit"), rows),
        Text(words, "soft"),
    ]


def _steps(one: Replay) -> str:
    return f"{one.first + 1} to {one.last}" if one.last else "-"


def _compared(one: Replay) -> str:
    """What was compared, or why nothing was, and every difference."""
    if one.outcome == "not replayed":
        return one.reason
    compared = f"{one.lines} lines with {one.entries:,} entries, {one.tensors:,} tensors"
    return "; ".join(filter(None, (compared, *one.differences, one.reason)))
