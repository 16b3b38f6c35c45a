"""`kha plan`: estimate the memory, time and cost of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kha_train.cli.options import integers
from kha_train.cli.output import print_json
from kha_train.cli.train import Overrides
from kha_train.config.compose import compose
from kha_train.config.schema import RunConfig
from kha_train.estimate.plan import Plan, make_plan
from kha_train.estimate.scale import RESTART_SECONDS, Size, scale, told
from kha_train.literal import say
from kha_train.telemetry.terminal import LiteralConsole

GIB = 1024**3


def plan(
    overrides: Overrides = None,
    scaled: Annotated[
        str, typer.Option("--scale", help="Numbers of devices, as in 8,64,512: what binds at each, MFU, goodput.")
    ] = "",
    variants: Annotated[
        bool,
        typer.Option("--variants", help="The cost of every attention preset at this shape, as Markdown."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Estimate parameters, FLOPs, memory, time and cost of a run on cluster=...; exit 2 if it cannot start there."""
    if variants:
        from kha_train.operate.cost_page import cost_page, costs_as_json, variant_costs

        costs = variant_costs(overrides or [])
        if as_json:
            print_json({"variants": costs_as_json(costs)}, indent=2)
        else:
            say(cost_page(overrides or [], costs).rstrip("\n"))
        return
    config = compose(overrides or [])
    if scaled:
        sizes = scale(config, integers(scaled, "--scale"))
        if as_json:
            print_json(told(config, sizes), indent=2)
        else:
            show_sizes(config, sizes, LiteralConsole(width=140))
        return
    answer = make_plan(config)
    if as_json:
        print_json(answer.to_dict(), indent=2)
    else:
        show(answer, LiteralConsole(width=120))
    if not answer.accepted:
        raise typer.Exit(2)


def show_sizes(config: RunConfig, sizes: Sequence[Size], console: Console) -> None:
    """Print what binds at each number of devices, a line for each ZeRO stage."""
    names = ("ZeRO", "binds", "memory per rank", "step", "exposed", "MFU", "tokens/s", "goodput")
    table = _table("", "devices", *names)
    for size in sizes:
        for number, stage in enumerate(size.stages):
            table.add_row(
                f"{size.devices:,}" if number == 0 else "",
                f"{stage.zero_stage}{' *' if stage.configured else ''}",
                stage.binds,
                _gib(stage.memory_bytes),
                *(_known(stage.step_seconds, "{:.2f} s"), _known(stage.exposed_seconds, "{:.2f} s")),
                *(_known(stage.mfu, "{:.1%}"), _known(stage.tokens_per_second, "{:,.0f}")),
                _known(stage.goodput, "{:.2%}"),
                style="bold" if stage is size.best else None,
            )
    console.print(f"{config.model.name}, attention {config.attention.name}, on {config.cluster.name}", style="bold")
    console.print(table)
    for size in sizes:
        found = size.best
        goes = f"ZeRO {found.zero_stage} makes most tokens" if found else size.batch_problem or "no stage fits"
        console.print(f"{size.devices:,} devices: {size.failures_per_day:.2f} failures a day; {goes}")
    mfu, hours = config.cluster.mfu, config.cluster.hours_between_failures
    console.print(
        f"* configured | computation at {mfu:.0%} MFU | a device fails every {hours:,.0f} h, and steps go on "
        f"{RESTART_SECONDS / 60:.0f} min later, when the checkpoint is read | goodput with a checkpoint every "
        f"{config.checkpoint.every_steps:,} steps",
        style="dim",
    )


def _known(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def show(answer: Plan, console: Console) -> None:
    """Print the plan as tables."""
    for table in (_model(answer), _memory(answer), _stages(answer), _recipes(answer), _run(answer)):
        caption, table.caption, title, table.title = table.caption, None, table.title, None
        console.print(title, style="bold")
        console.print(table)
        console.print(f"{caption}\n" if caption else "", style="dim")
    for problem in (answer.batch_problem, answer.data_problem):
        if problem:
            console.print(f"cannot run yet: {problem}")
    if answer.warning:
        console.print(f"warning: {answer.warning}")
    console.print(_verdict(answer))
    for number, remedy in enumerate(answer.remedies, start=1):
        enough = "fits" if remedy.fits else "not enough"
        console.print(
            f"  {number}. {remedy.overrides}: saves {_gib(remedy.saves_bytes)}, leaves {_gib(remedy.total_bytes)} "
            f"({enough}); {remedy.price}",
        )
    if answer.fits is False:
        console.print(f"  enough: {answer.together or 'no number of these devices is enough'}")


def _verdict(answer: Plan) -> str:
    if answer.fits is None:
        return "fit is not checked: name a machine with cluster=..."
    devices, name = answer.config.cluster.devices, answer.config.cluster.name
    size = f"{_gib(answer.memory.total)} of {_gib(answer.budget_bytes or 0)} per rank"
    largest = max(answer.memory.terms, key=lambda name: answer.memory.terms[name])
    verb = "fits" if answer.fits else "DOES NOT FIT"
    return (
        f"{verb} on {name} ({devices} ranks): {size}, most of it {largest} ({_gib(answer.memory.terms[largest])}); "
        f"largest micro-batch {answer.largest_micro_batch}"
    )


def _model(answer: Plan) -> Table:
    config, parameters, flops = answer.config, answer.parameters, answer.flops
    table = _table(
        f"{config.model.name}, attention {config.attention.name}", "component", "parameters", "GFLOP per token"
    )
    components = list(parameters.by_component) + [name for name in flops.by_component if name == "scores"]
    for name in components:
        held, done = parameters.by_component.get(name, 0), flops.by_component.get(name, 0)
        if held or done:
            table.add_row(name, f"{held:,}", f"{done / 1e9:.4f}")
    table.add_row("total (forward)", f"{parameters.total:,}", f"{flops.forward / 1e9:.4f}", style="bold")
    table.add_row("active (training)", f"{parameters.active:,}", f"{flops.training / 1e9:.4f}", style="bold")
    if parameters.frozen:
        table.add_row("not trained, no parameters", f"{parameters.frozen:,}", "")
    overhead, told = answer.overhead, answer.to_dict()
    row, token = told["cache_bytes_per_row"], told["cache_bytes_per_token"]
    cache = f"{row:,} bytes per row" if row else f"{token:,} bytes per token"
    table.caption = (
        f"interaction: {overhead.parameters:+.4f} % parameters, {overhead.flops:+.3f} % FLOPs, {overhead.cache:+.0f} "
        f"% cache | cache {cache} in bf16 | causal attention counted once, training = 3 x forward"
    )
    return table


def _memory(answer: Plan) -> Table:
    engine = answer.config.engine
    title = (
        f"memory per rank: ZeRO {engine.zero_stage}, micro-batch {engine.micro_batch_size}, activation checkpointing "
        f"{engine.activation_checkpointing}"
    )
    if engine.expert_parallel > 1:
        title += f", experts shared by {engine.expert_parallel} ranks"
    table = _table(title, "term", "GiB")
    for name, size in answer.memory.terms.items():
        table.add_row(name, f"{size / GIB:.2f}")
    table.add_row("total", f"{answer.memory.total / GIB:.2f}", style="bold")
    table.caption = f"peak of a step: when {answer.memory.moment}"
    return table


def _stages(answer: Plan) -> Table:
    table = _table("ZeRO stages", "stage", "memory per rank", "sent per rank and step", "time it takes", "exposed")
    by_stage = answer.to_dict()["memory_per_rank"]["by_stage"]
    for volume in answer.communication:
        sent = f"{volume.bytes_per_step / 1e9:.2f} GB"
        times = (volume.seconds_per_step, volume.exposed_seconds_per_step)
        told = ("unknown" if time is None else f"{time:.2f} s" for time in times)
        table.add_row(str(volume.stage), _gib(by_stage[str(volume.stage)]), sent, *told)
    spread, travelling = answer.config.engine.expert_parallel, answer.communication[0].exchange_bytes_per_step
    table.caption = "exposed: not hidden behind the backward\nZeRO 3 gathers all experts although few are active"
    if spread > 1:
        sent = f"{travelling / 1e9:.2f} GB are tokens that travel to experts of other ranks and back"
        table.caption = f"exposed: not hidden behind the backward\nof what is sent {sent}, not under ZeRO 3"
    shared = answer.exchanged
    if shared["ranks"] > 1:
        seconds = "unknown" if shared["seconds_per_step"] is None else f"{shared['seconds_per_step']:.2f} s"
        table.caption += f"\n{shared['ranks']} ranks share each row: each also sends "
        table.caption += f"{shared['bytes_per_step'] / 1e9:.2f} GB around attention, {seconds}"
    return table


def _recipes(answer: Plan) -> Table:
    table = _table("model states per rank", "recipe", "bytes per parameter", "ZeRO 1", "ZeRO 2", "ZeRO 3")
    for recipe in answer.to_dict()["memory_per_rank"]["recipes"]:
        name = recipe["name"] + ("" if recipe["offered"] else " (not offered here)")
        table.add_row(name, f"{recipe['bytes_per_parameter']:.4g}", *(_gib(size) for size in recipe["states"].values()))
    return table


def _run(answer: Plan) -> Table:
    table, time, saved, data = _table("the run", "", ""), answer.time, answer.checkpoint, answer.data
    batches, most = time["batch_schedule"], "at most " if len(time["batch_schedule"]) > 1 else ""
    steps = f"{answer.config.run.steps:,} steps of {most}{time['tokens_per_step']:,}"
    table.add_row("tokens", f"{time['tokens']:,} in {steps}")
    for batch in batches[1:]:
        place = f"from step {batch['start_step']:,} on, after {batch['tokens_before']:,} tokens"
        table.add_row(f"batch of {batch['rows']:,} rows", place)
    table.add_row("compute", f"{time['total_flops']:.3g} FLOP")
    if time["hours"] is not None:
        table.add_row(
            f"time at {100 * time['mfu']:.0f} % MFU",
            f"{time['hours']:,.1f} h, {most}{time['step_seconds']:.2f} s per step",
        )
        table.add_row("device hours", f"{time['device_hours']:,.0f}")
        table.add_row("tokens/s", f"{time['tokens_per_second']:,.0f}")
    if time["cost"] is not None:
        table.add_row("cost", f"{time['cost']:,.0f}")
    table.add_row("checkpoint", f"{saved['bytes'] / 1e9:.1f} GB, {saved['kept_bytes'] / 1e9:.1f} GB kept")
    if saved["host_bytes"]:
        table.add_row("copies of it in host memory", f"{saved['host_bytes'] / 1e9:.1f} GB over all ranks")
    seconds = saved["sensible_every_seconds"]
    if saved["sensible_every_steps"] is not None and seconds is not None:
        every = f"{saved['sensible_every_steps']:,} steps ({seconds / 60:.0f} min)"
        table.add_row("sensible interval", f"{every}; checkpoint.every_steps is {saved['every_steps']:,}")
    epochs = (
        "the dataset is not here" if data["epochs"] is None else f"{data['epochs']:.2f} of {data['tokens']:,} tokens"
    )
    table.add_row("epochs", epochs)
    return table


def _table(title: str, first: str, *numbers: str) -> Table:
    table = Table(title=title, box=None, padding=(0, 2, 0, 0))
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
