"""`kha bench`: measured figures, each printed with the protocol it was measured by."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="bench", help="Measured figures with their protocol.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")]


@app.command()
def spikes(
    seed: Annotated[int | None, typer.Option(help="Of the curves; fresh ones each time unless set.")] = None,
    spiky_steps: Annotated[int, typer.Option(min=2000, help="Steps of the curve full of spikes, per noise.")] = 60_000,
    clean_steps: Annotated[int, typer.Option(min=1000, help="Steps of the curve without any, per noise.")] = 100_000,
    as_json: Json = False,
) -> None:
    """Spike rules on labelled synthetic curves: what each finds, what it makes up; and the monitor's cost per step."""
    from kha_train.bench import spikes as bench

    seed = secrets.randbelow(10**6) if seed is None else seed
    scores = bench.run_bench(seed, spiky_steps, clean_steps, list(bench.NOISES))
    seconds = bench.monitor_cost()
    if as_json:
        plain = {noise: {rule: score.to_dict() for rule, score in rules.items()} for noise, rules in scores.items()}
        typer.echo(json.dumps({"seed": seed, "noises": plain, "monitor_seconds_per_step": seconds}))
        return
    typer.echo(
        f"labelled synthetic curves, seed {seed}: per noise {spiky_steps} steps full of spikes, {clean_steps} clean; "
        f"found = alarm within {bench.FOUND_WITHIN} steps of the start"
    )
    for noise, rules in scores.items():
        typer.echo(f"\n{noise}: {bench.NOISES[noise].__doc__}\n\n{bench.format_table(rules)}")
    typer.echo(f"\nwhole monitor, plain Python: {1e6 * seconds:.0f} microseconds of CPU time a step")


@app.command()
def checkpoint(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Of the configuration; model=small without any.")
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Steps between two saves that the cost is reckoned for.")] = 50,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds a mode.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Steps a round.")] = 10,
    as_json: Json = False,
) -> None:
    """What a checkpoint costs: written beside training and blocking it, in interleaved rounds of one run."""
    from kha_train.bench import checkpoint as bench

    found = bench.measure(overrides or ["model=small", "data.global_batch_size=8"], every, rounds, steps)
    typer.echo(json.dumps(found.to_dict()) if as_json else bench.format_measured(found))


@app.command()
def attention(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Of the configuration: its model's shape and micro-batch are measured.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds.")] = 20,
    as_json: Json = False,
) -> None:
    """What an interaction costs, eager and folded: one attention layer forward and backward, against plain gqa."""
    from kha_train.bench import attention as bench

    found = bench.measure(overrides or [], rounds)
    typer.echo(json.dumps(found.to_dict()) if as_json else bench.format_measured(found))


@app.command()
def data(
    cache: Annotated[Path, typer.Option(help="Where tokens and the peers' environment are kept (2 GB).")] = Path(
        "~/.cache/kha_train/bench"
    ),
    tokens: Annotated[int, typer.Option(min=10_000_000, help="Tokens to read.")] = 200_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="How often each loader runs, in turn.")] = 3,
    cpu_seconds: Annotated[float, typer.Option(help="The most CPU time of one run, after warming up.")] = 3.0,
    as_json: Json = False,
) -> None:
    """Token loaders, ours and the peers that install: tokens a CPU-second, start, memory, seek to step 3000 (ours: and
    to sample 1e12)."""
    from kha_train.bench import data as bench

    result = bench.run_bench(
        cache.expanduser(),
        tokens=tokens,
        rounds=rounds,
        cpu_seconds=cpu_seconds,
        say=lambda text: typer.echo(text, err=True),
    )
    typer.echo(json.dumps(result) if as_json else f"{bench.__doc__}\n{bench.format_table(result)}")
