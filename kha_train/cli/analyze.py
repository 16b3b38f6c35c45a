"""`kha analyze RUN...`: what the attention heads of trained checkpoints look like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from kha_train.analysis.heads.inspection import PROBE_TOKENS, Inspection, read_inspections
from kha_train.analysis.heads.matches import Match, read_matches
from kha_train.analysis.heads.page import write_page
from kha_train.analysis.heads.table import answer_of, match_answer, print_inspections, print_match
from kha_train.cli.output import note, print_json
from kha_train.cli.progress import progress_bar
from kha_train.errors import CheckpointError, KhaError
from kha_train.literal import say
from kha_train.record.finding import find_run, find_runs
from kha_train.record.labels import distinct
from kha_train.telemetry.terminal import LiteralConsole


def analyze(
    runs: Annotated[list[Path], typer.Argument(help="Runs, sweeps or folders of runs.")],
    every_checkpoint: Annotated[
        bool, typer.Option("--every-checkpoint", help="All saved checkpoints, not only the newest.")
    ] = False,
    tokens: Annotated[int, typer.Option(help="Tokens to look at, rounded up to whole rows.", min=1)] = PROBE_TOKENS,
    data: Annotated[str, typer.Option(help="A dataset to look at instead of the run's validation set.")] = "",
    silence: Annotated[
        bool, typer.Option(help="Measure the loss without each head: one more forward for every head of every layer.")
    ] = True,
    match: Annotated[
        Path | None, typer.Option(help="A run whose heads are matched with those of the others. Needs the extra lab.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Compute saved results again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look into the attention heads and learned matrices of a run's newest checkpoint, on the CPU.

    The result is saved in the directory `analysis` of the run, and computed only once. Training is not disturbed. A
    damaged run or checkpoint among several is passed over: the others are looked at, and the command ends with its
    error.
    """
    from kha_train.analysis.heads.analyze import Request, analyze_run, checkpoints_of
    from kha_train.analysis.heads.match import match_runs

    request = Request(tokens, data, silence, every_checkpoint, again)
    found = find_runs(runs, note, read=checkpoints_of)
    reference = find_run(match) if match else None
    answers: list[dict[str, object]] = []
    faults: list[KhaError] = []

    def damaged(checkpoint: Path, error: CheckpointError) -> None:
        note(f"checkpoint {checkpoint} is passed over: {error}")
        # Of a run's newest checkpoint, the one before it takes the place.
        faults.extend([error] * every_checkpoint)

    for run, label in zip(found, distinct([run.name for run in found], list(map(str, found))), strict=True):
        try:
            inspections = analyze_run(run, request, damaged, progress_bar)
            others = [reference] if reference and run.resolve() != reference.resolve() else []
            matches = [match_runs(run, other, other.name, request, progress_bar) for other in others]
        except KhaError as error:
            if len(found) == 1:
                raise
            note(f"{run} is passed over: {error}")
            faults.append(error)
            continue
        answers.append(_told(run, label, inspections, matches, as_json))
    if as_json:
        print_json({"runs": answers}, indent=2)
    if faults:
        raise faults[0]


def _told(
    run: Path, label: str, inspections: Sequence[Inspection], matches: Sequence[Match], as_json: bool
) -> dict[str, object]:
    """Writes the page of a run, and returns its part of the JSON object, which is printed as tables otherwise."""
    # None is current if the run went back behind its newest checkpoint meanwhile.
    saved = read_inspections(run) or inspections
    page = write_page(run, label, saved, read_matches(run))
    if not as_json:
        print_inspections(label, inspections[-1], saved, LiteralConsole())
        for one in matches:
            print_match(label, one, LiteralConsole())
        say(f"page: {page}")
    checkpoints, matched = [answer_of(run, one) for one in inspections], [match_answer(run, one) for one in matches]
    return {"run": str(run), "page": str(page), "checkpoints": checkpoints, "matches": matched}
