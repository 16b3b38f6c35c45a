"""`kha eval MODEL...`: what checkpoints and exports score in tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from kha_train.cli.output import note, print_json
from kha_train.cli.progress import progress_bar
from kha_train.errors import CheckpointError, ConfigError, KhaError
from kha_train.literal import say
from kha_train.record.finding import find_runs, is_export
from kha_train.telemetry.terminal import LiteralConsole

if TYPE_CHECKING:
    from kha_train.evaluate.checkpoints import Request
    from kha_train.evaluate.results import Evaluation


def eval_(
    models: Annotated[
        list[Path] | None, typer.Argument(help="Runs, folders of runs, checkpoints or exports.", show_default=False)
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Names, such as validation,answers,hellaswag: tasks of ours and of lm-evaluation-harness. Without it, "
            "all that the run measures itself."
        ),
    ] = "",
    data: Annotated[str, typer.Option(help="The directory with datasets of the harness's tasks.")] = "",
    include: Annotated[str, typer.Option(help="A directory with task files of your own.")] = "",
    shots: Annotated[int | None, typer.Option(help="Examples before each question.", min=0)] = None,
    limit: Annotated[int, typer.Option(help="Score so many documents of each task only (0: all).", min=0)] = 0,
    run: Annotated[Path | None, typer.Option(help="For exports: a run whose validation sets and tasks count.")] = None,
    prefix: Annotated[str, typer.Option(help="The special token before a text that nothing precedes: eos, bos.")] = "",
    batch_size: Annotated[int, typer.Option(help="Rows at a time; no figure depends on it.", min=1)] = 16,
    every_checkpoint: Annotated[
        bool, typer.Option("--every-checkpoint", help="All saved checkpoints, not only the newest.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Let task files run Python, and tasks run what the model writes.")
    ] = False,
    list_: Annotated[bool, typer.Option("--list", help="List tasks instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score checkpoints and exports: bits per byte by domain, tasks of a run, tasks of lm-evaluation-harness.

    Data are read from this machine; nothing is downloaded. The results of a run are saved in its directory
    `evaluation`. Raises as `evaluate_run`, and ConfigError without a model.
    """
    from kha_train.evaluate.checkpoints import Request
    from kha_train.evaluate.harness_data import Choice

    if list_:
        _list(as_json)
        return
    if not models:
        raise ConfigError("name a run, a checkpoint or an export", field="MODEL", fix="kha eval RUN")
    names = tuple(name for name in tasks.split(",") if name)
    request = Request(names, Choice((), data, include, limit, shots, run_code), prefix, batch_size)
    answers: list[dict[str, Any]] = []
    faults: list[KhaError] = []
    for place, evaluation in _every_one(_places(models), request, run, every_checkpoint, device, faults):
        answers.append({"model": str(place), **asdict(evaluation)})
        if not as_json:
            _print(place, evaluation)
    if as_json:
        print_json({"evaluations": answers}, indent=2)
    if faults:
        raise faults[0]


def _every_one(
    places: list[Path], request: Request, run: Path | None, every: bool, device: str, faults: list[KhaError]
) -> Iterator[tuple[Path, Evaluation]]:
    """The evaluations of all `places`. Of several, one that cannot be scored is passed over, and joins `faults`."""
    for place in places:
        try:
            for evaluation in _evaluated(place, request, run, every, device, faults):
                yield place, evaluation
        except KhaError as error:
            if len(places) == 1:
                raise
            note(f"{place} is passed over: {error}")
            faults.append(error)


def _places(models: list[Path]) -> list[Path]:
    """Checkpoints and exports as they are named, and the runs among and below the others."""
    from kha_train.checkpoint.layout import is_checkpoint

    whole = [path for path in models if is_checkpoint(path) or is_export(path)]
    others = [path for path in models if path not in whole]
    return [*whole, *(find_runs(others, note) if others else [])]


def _evaluated(
    place: Path, request: Request, run: Path | None, every: bool, device: str, faults: list[KhaError]
) -> Iterator[Evaluation]:
    """The evaluations of one run, checkpoint or export. Those of a run are saved. Raises as `evaluate_run`."""
    from kha_train.checkpoint.layout import home_of
    from kha_train.config.compose import load
    from kha_train.evaluate.checkpoints import evaluate_model, evaluate_run, suite_of, torch_device
    from kha_train.evaluate.results import save

    if is_export(place):
        from kha_train.export.scoring import open_export

        config = load(run / "config.yaml") if run else None
        suite = suite_of(request, config)
        yield evaluate_model(
            open_export(place, request.prefix, torch_device(device)), config, suite, request, progress_bar
        )
        return

    def damaged(checkpoint: Path, error: CheckpointError) -> None:
        note(f"checkpoint {checkpoint} is passed over: {error}")
        # Of a run's newest checkpoint, the one before it takes the place.
        faults.extend([error] * every)

    for evaluation in evaluate_run(place, request, damaged, progress_bar, every=every, device=device):
        save(home_of(place), evaluation)
        yield evaluation


def _print(place: Path, evaluation: Evaluation) -> None:
    """A table of all figures, with the standard errors of those of the harness."""
    say(f"{place}" if evaluation.step is None else f"{place}, step {evaluation.step}")
    table = Table("figure", "value", "standard error", "documents", "version", box=None)
    for name, value in evaluation.entries.items():
        table.add_row(name, f"{value:.4f}", "", "", "")
    for task, found in evaluation.harness.items():
        result = found.result
        documents = f"{result.samples} of {result.documents}" if result.documents else ""
        for name, figure in result.figures.items():
            error = "" if figure.error is None else f"{figure.error:.4f}"
            value_ = "-" if figure.value is None else f"{figure.value:.4f}"
            table.add_row(f"{task} {name}", value_, error, documents, result.version)
    LiteralConsole().print(table)


def _list(as_json: bool) -> None:
    """The tasks of ours, and those of the paper by their names in the harness."""
    from kha_train.evaluate.paper_tasks import PAPER_TASKS
    from kha_train.evaluate.task_files import SHIPPED, read_tasks
    from kha_train.variants.registry import TASKS

    own = ["validation", *(name for name in TASKS if name != "harness")]
    shipped = sorted(read_tasks(SHIPPED))
    if as_json:
        print_json({"own": own, "shipped": shipped, "paper": [task._asdict() for task in PAPER_TASKS]}, indent=2)
        return
    say(f"tasks of a run: {', '.join(own)}")
    say(f"with the package, for the harness: {', '.join(shipped)}")
    table = Table("task of the paper", "in the harness", "answers are", "remarks", box=None)
    for task in PAPER_TASKS:
        table.add_row(task.paper, task.harness or "none", task.asks, task.note)
    LiteralConsole().print(table)
