"""`kha study list|show|run|report|collect`: a named question, its cost, its runs and what may be said of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from kha_train.analysis.studies import Scale, ScaledStudy, load_study, study_names
from kha_train.analysis.study_claims import verdict
from kha_train.analysis.study_collection import SHOWN_DIGITS, collected, day, pictures
from kha_train.analysis.study_files import ResultFile, published_results
from kha_train.analysis.study_page import arm_rows, rate_rows
from kha_train.analysis.study_results import StudyResult, judge
from kha_train.cli.output import note, print_json
from kha_train.cli.status import status_table
from kha_train.cli.sweep import GpusPerNode, Local, Nodes, Parallel, Processes, RetryFailed, Sbatch, Site
from kha_train.cli.train import Overrides
from kha_train.config.compose import compose
from kha_train.literal import say
from kha_train.operate import slurm, study
from kha_train.operate.ahead import processors
from kha_train.operate.datasets import make_dataset
from kha_train.operate.slurm import JobOptions
from kha_train.operate.study import Progress, StudyPlan
from kha_train.operate.study_costs import RunCost, StudyCosts, study_costs
from kha_train.operate.sweep import statuses, sweep_directory
from kha_train.output import harmless_output
from kha_train.record.files import write_text, written_as
from kha_train.telemetry.format import duration, scaled
from kha_train.telemetry.terminal import LiteralConsole

app = typer.Typer(name="study", help="Answer a named question by runs of several arms.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="A study of `kha study list`, or a .yaml file of your own.", metavar="NAME")]
ScaleOption = Annotated[str, typer.Option(help="cpu: two cores; paper: the printed shapes; h200_15min: one GPU.")]
Parent = Annotated[Path, typer.Option("--dir", help="Parent of the study's directory.")]
Called = Annotated[str | None, typer.Option("--name", help="Name of the directory; default: NAME-SCALE.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
PARENT = Path("runs/study")


@app.command("list")
def list_(
    results: Annotated[
        Path | None, typer.Option(help="Folder of results; default: docs/results of the checkout.", metavar="FOLDER")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the studies that are shipped: question, source, and the date and verdict of every published result."""
    published = published_results(results)
    found = {name: load_study(name, "cpu") for name in study_names()}
    if as_json:
        told: dict[str, dict[str, Any]] = {
            name: {"question": one.study.question, "source": one.study.source, "arms": list(one.arms), "results": []}
            for name, one in found.items()
        }
        for result in published:
            own = told.setdefault(result["study"], {"question": result["question"], "results": []})
            own["results"].append(_published(result))
        print_json(told, indent=2)
        return
    for name in sorted({*found, *(result["study"] for result in published)}):
        own_results = [result for result in published if result["study"] == name]
        asked = f"{found[name].study.question} ({found[name].study.source})" if name in found else "not shipped"
        say(f"{name:<15} {asked}")
        for result in own_results:
            about = _published(result)
            say(f"{'':<15} {about['date']}, scale {about['scale']}, code {about['code']}: {about['verdict']}")


def _published(result: ResultFile) -> dict[str, Any]:
    """A published result in `kha study list`."""
    ended, code = result["ended"], [one[:SHOWN_DIGITS] for one in result["code_sha256"] if one]
    return {
        "date": day(ended) if ended is not None else "no date",
        "scale": result["scale"],
        "code": ", ".join(code) or "without a hash",
        "verdict": verdict(result),
    }


@app.command("show")
def show_(
    name: Name,
    overrides: Overrides = None,
    scale: ScaleOption = "cpu",
    parent: Parent = PARENT,
    called: Called = None,
    as_json: AsJson = False,
) -> None:
    """Show a study before anything runs: question, arms, rates, seeds, and the cost and time of each run and in all."""
    plan = _plan(name, overrides, scale, parent, called)
    finished = study.finished_runs(plan, rates_only=True)
    costs = study_costs(plan, finished)
    if as_json:
        print_json({**_about(plan.scaled), "directory": str(plan.directory), **costs.to_dict()}, indent=2)
        return
    _show(plan, costs, LiteralConsole(width=140))


@app.command("run")
def run_(
    name: Name,
    overrides: Overrides = None,
    scale: ScaleOption = "cpu",
    parent: Parent = PARENT,
    called: Called = None,
    local: Local = False,
    processes: Processes = 1,
    parallel: Parallel = 0,
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = 0,
    sbatch: Sbatch = None,
    site: Site = "",
    retry_failed: RetryFailed = False,
    as_json: AsJson = False,
) -> None:
    """Train what a study lacks, here with --local or as a SLURM job array, and report when it is complete.

    All runs are validated first. The same command continues after any stop: finished runs stay, others resume. With
    --local and --parallel 0, runs on a CPU take all processors, and others are trained one after another. On SLURM, a
    study that chooses rates first needs the command once more when its first runs are finished.
    """
    plan = _plan(name, overrides, scale, parent, called)
    make_dataset(plan.scaled.scale.dataset, plan.directory.parent, note)
    if local:
        result = _run_here(plan, processes, parallel or _at_a_time(plan, processes), retry_failed, quiet=as_json)
        _report(plan, result, as_json)
        return
    options = JobOptions(nodes, gpus_per_node, parallel, slurm.parse_sbatch(sbatch or []), site)
    result, started = study.submit_study(plan, options, retry_failed)
    if started is None:
        _report(plan, result, as_json)
        return
    labels = [point.label for point in started.points]
    left = {status.name: status.state for status in started.before if status.name not in labels}
    if as_json:
        print_json({"directory": str(plan.directory), "job": started.job, "started": labels, "left": left})
        return
    for label, state in left.items():
        say(f"left as it is: {label} ({state})")
    if started.job:
        say(f"submitted {len(labels)} runs as job {started.job}")
    say(f"watch: kha status --watch {plan.directory}; when they are finished, the same command continues")


@app.command("report")
def report_(
    name: Name,
    overrides: Overrides = None,
    scale: ScaleOption = "cpu",
    parent: Parent = PARENT,
    called: Called = None,
    as_json: AsJson = False,
) -> None:
    """Report on the finished runs of a study: result.json, result.md and a comparison report for every reference."""
    plan = _plan(name, overrides, scale, parent, called)
    _report(plan, judge(plan.scaled, study.finished_runs(plan)), as_json)


@app.command("collect")
def collect_(
    results: Annotated[list[Path], typer.Argument(help="Files result.json of complete studies.")],
    page: Annotated[Path, typer.Option(help="A Markdown page with the two marks that docs/studies.md names.")],
) -> None:
    """Write the results of studies into a page, between two marks, and pictures of some beside it."""
    text, drawn = collected(page, results), pictures(page, results)
    with written_as("--page", page, "choose a page that you can write"):
        write_text(page, text)
        for place, svg in drawn.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            write_text(place, svg)
    for place in (page, *drawn):
        say(f"written: {place}")


def _plan(name: str, overrides: Sequence[str] | None, scale: str, parent: Path, called: str | None) -> StudyPlan:
    found = load_study(name, scale)
    directory = sweep_directory(parent, called or f"{found.name}-{found.scale_name}")
    return study.plan_study(found, directory, overrides or ())


def _at_a_time(plan: StudyPlan, processes: int) -> int:
    """How many runs this machine trains at a time: as many as have processors of their own, one on a GPU."""
    if plan.scaled.computes:
        return 1
    point = next(iter(plan.points.values()))
    return max(1, processors() // processes) if compose(point.overrides).engine.device == "cpu" else 1


def _run_here(plan: StudyPlan, processes: int, parallel: int, retry_failed: bool, quiet: bool) -> StudyResult:
    console = LiteralConsole(stderr=True)
    told: list[str] = []
    # The table only mirrors the record: if it cannot be printed, the runs are trained all the same.
    with harmless_output(), Live(console=console, auto_refresh=False) as live:

        def watch(now: Progress) -> None:
            left = now.seconds_left()
            line = f"{now.finished} of {now.needed} runs finished"
            line += f", about {duration(left)} left" if left is not None else ""
            if console.is_terminal and not quiet:
                training = [] if plan.scaled.computes else [status_table(statuses(now.training), console)]
                live.update(Group(line, *training), refresh=True)
            elif not quiet and now.finished != len(told) - 1:
                told.extend([line] * (now.finished + 1 - len(told)))
                note(f"{plan.scaled.name}: {line}")

        try:
            return study.run_here(plan, processes, parallel, retry_failed, watch)
        except KeyboardInterrupt:
            note("stopped in good order: the same command continues")
            raise


def _report(plan: StudyPlan, result: StudyResult, as_json: bool) -> None:
    written = study.write_results(plan, result)
    if as_json:
        print_json({**result.to_dict(), "written": [str(path) for path in written]}, indent=2)
        return
    console = LiteralConsole(width=140)
    console.print(_table(*arm_rows(result)))
    console.print(_table(*rate_rows(result)))
    for one in (*result.compared, *result.gains):
        console.print(one.sentence(), soft_wrap=True)
    for caveat in (f"learning rates: {result.how_chosen}", *result.caveats()):
        console.print(caveat, style="dim", soft_wrap=True)
    console.print(result.sentence, style="bold", soft_wrap=True)
    for path in written:
        say(f"report: {path}")


def _about(found: ScaledStudy) -> dict[str, Any]:
    scale = found.scale
    return {
        "study": found.name,
        "scale": found.scale_name,
        "question": found.study.question,
        "source": found.study.source,
        "notes": list(found.study.notes),
        "needs": scale.needs,
        "compared": {arm.name: {"overrides": arm.overrides, "against": arm.reference} for arm in found.arms.values()},
        "rates": {arm: scale.rates_of(arm) for arm in found.arms},
        "rate_seeds": scale.rate_seeds,
        "seeds": scale.seeds,
        "measures": [measure.name for measure in found.measures],
    }


def _show(plan: StudyPlan, costs: StudyCosts, console: Console) -> None:
    """Print the study, a row for each arm's runs of equal cost, what an arm lacks on its machine, and the total."""
    found, scale = plan.scaled, plan.scaled.scale
    console.print(found.study.question, style="bold")
    apart = f"chosen on seeds {_listed(scale.rate_seeds)}" if found.chooses_apart else "all compared"
    told = (
        f"source: {found.study.source}",
        *found.study.notes,
        f"measures: {', '.join(measure.name for measure in found.measures)}; rates by {found.rate_measure.name}",
        f"rates: {'; '.join(_rates(scale))} ({apart}); seeds: {_listed(scale.seeds)}",
        f"needs: {scale.needs}" if scale.needs else "",
    )
    for text in filter(None, told):
        console.print(text, soft_wrap=True)
    head = ["arm", "runs for", "finished", "steps", "tokens", "FLOP", "time a run", "cost a run", "GiB a rank"]
    fits = {fit.arm: fit for fit in costs.fits}
    rows = []
    for arm in found.arms.values():
        purpose = {"rate": "the choice of its rate", "compared": f"against {arm.reference}" if arm.reference else "-"}
        for role, words in purpose.items():
            runs = [run for run in costs.runs if (run.trial.arm, run.trial.role) == (arm.name, role)]
            if runs:
                rows.append([arm.name, words, *_cost_cells(runs), f"{fits[arm.name].memory_gib:.1f}"])
    console.print(_table(head, rows))
    for fit in costs.fits:
        if fit.needs:
            words = f"{fit.arm} cannot start on {fit.devices} devices of {fit.machine}: {fit.needs}"
            console.print(words, soft_wrap=True)
    total, left, cost = costs.seconds(), costs.seconds(finished=False), costs.cost()
    words = f"in all: {len(costs.runs)} runs, {sum(run.flops for run in costs.runs):.2e} FLOP"
    words += f", {duration(total)} one after another" if total is not None else ""
    words += f", cost {cost:,.0f}" if cost is not None else ""
    words += f"; left: {duration(left)}" if left is not None and left != total else ""
    console.print(words, style="bold")
    console.print(f"time is based on {costs.basis}", style="dim")


def _rates(scale: Scale) -> list[str]:
    """The rates of all arms, then those of arms that have their own."""
    own = [(f"{each.arm} ", each.rates) for each in scale.arm_rates]
    return [f"{whose}{', '.join(f'{rate:g}' for rate in rates)}" for whose, rates in (("", scale.rates), *own)]


def _cost_cells(runs: Sequence[RunCost]) -> list[str]:
    one = runs[0]
    return [
        f"{sum(run.finished for run in runs)}/{len(runs)}",
        f"{one.steps:,}",
        scaled(one.tokens) if one.tokens else "-",
        f"{one.flops:.2e}",
        "?" if one.seconds is None else duration(one.seconds),
        "-" if one.cost is None else f"{one.cost:,.0f}",
    ]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for number, name in enumerate(head):
        table.add_column(name, justify="left" if number < 2 else "right")
    for row in rows:
        table.add_row(*row)
    return table
