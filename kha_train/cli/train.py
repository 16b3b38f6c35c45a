"""`kha train`: one run."""

from __future__ import annotations

from typing import Annotated

import typer

from kha_train.config.compose import compose

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings, such as attention=kha_mlp engine=zero2 run.steps=1000", metavar="[KEY=VALUE]..."),
]


def train(overrides: Overrides = None) -> None:
    """Train one model; resumes by itself when run.dir holds a checkpoint.

    Under torchrun, or srun with one task a rank, every rank runs this: `torchrun --nproc-per-node 2 -m kha_train ...`
    """
    config = compose(overrides or [])
    # Settings are judged before anything heavy is imported.
    from kha_train.train.run import train as train_run

    outcome = train_run(config)
    if not outcome.finished:
        typer.echo(f"stopped in good order after step {outcome.step}; the same command goes on from there", err=True)
