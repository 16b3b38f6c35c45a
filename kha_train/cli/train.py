"""`kha train`: one run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kha_train.cli.output import print_json
from kha_train.config.compose import compose, compose_at_home
from kha_train.config.home import provide_home
from kha_train.config.presets import sweep_command
from kha_train.config.schema import RunConfig
from kha_train.config.validate_ranks import validate_batch
from kha_train.errors import ConfigError, KhaError
from kha_train.literal import say
from kha_train.telemetry.startup import Startup

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings, such as attention=kha_mlp engine=zero2 run.steps=1000", metavar="[KEY=VALUE]..."),
]


def train(
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Rehearse the job in this one process; world_size=64 sets the number of ranks."),
    ] = False,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="With --dry-run: GPUs per node.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print one JSON object.")] = False,
    ranks: Annotated[int, typer.Option(min=1, help="Train with this many processes on this machine.")] = 1,
    multirun: Annotated[bool, typer.Option("--multirun", "-m", hidden=True)] = False,
) -> None:
    """Train one model; resumes automatically when run.dir holds a checkpoint.

    With --ranks 2 two processes train it. Under torchrun, or srun with one task per rank, every rank runs this:
    `torchrun --nproc-per-node 2 -m kha_train ...`

    Raises ConfigError for --json without --dry-run.
    """
    overrides = overrides or []
    if multirun:
        _refuse_multirun(overrides)
    if as_json and not dry_run:
        raise ConfigError(
            "works with --dry-run only; a run writes its results to its record",
            field="--json",
            fix="--dry-run --json, or kha status --json",
        )
    if dry_run:
        _rehearse(overrides, ranks, ranks_per_node, as_json)
        return
    if ranks > 1:
        _launch(ranks, overrides)
    startup = Startup()
    startup.mark("interpreter and command")
    config = _composed(overrides)
    provide_home(Path(config.run.dir))
    startup.mark("configuration")
    # Settings are validated before anything heavy is imported.
    from kha_train.train.run import train as train_run

    train_run(config, startup)


def _launch(ranks: int, overrides: list[str]) -> None:
    """Train with `ranks` processes, and end with their exit code. The settings are checked once, before any starts."""
    config = compose_at_home(overrides)
    validate_batch(config, ranks)
    from kha_train.operate.launcher import launch

    raise typer.Exit(launch(ranks, ["-m", "kha_train", *overrides]))


def _composed(overrides: list[str]) -> RunConfig:
    """The configuration of this rank. All ranks of a node read the same files and refuse the same settings, so the
    first of them says so for all. Raises KhaError as `compose`.
    """
    try:
        return compose_at_home(overrides)
    except KhaError as error:
        error.agreed = os.environ.get("LOCAL_RANK", "0") != "0"
        raise


def _refuse_multirun(overrides: list[str]) -> None:
    """Raises ConfigError: users of other Hydra applications may pass `-m`."""
    problem = "one command trains one run; a sweep trains several, here or (without --local) on SLURM"
    raise ConfigError(problem, field="--multirun", fix=sweep_command(overrides))


def _rehearse(overrides: list[str], ranks: int, ranks_per_node: int, as_json: bool) -> None:
    """Rehearse `world_size` ranks, or `ranks` if that is not typed. Raises ConfigError for an invalid world size."""
    ours = [text.partition("=")[2] for text in overrides if text.startswith("world_size=")]
    settings = [text for text in overrides if not text.startswith("world_size=")]
    if not all(text.isdecimal() and int(text) for text in ours):
        raise ConfigError("is not a number of ranks", field="world_size", value=ours[-1])
    world_size = int(ours[-1]) if ours else ranks
    config = compose(settings)
    from kha_train.operate.rehearse import Layout, rehearse

    answer = rehearse(config, settings, Layout(world_size, min(ranks_per_node, world_size)))
    if as_json:
        print_json(answer, indent=2)
        return
    for section, values in answer.items():
        shown = values if isinstance(values, dict) else {"": values}
        for key, value in shown.items():
            say(f"{section} {key}".strip() + f": {f'{value:,.4g}' if isinstance(value, float) else value}")
