"""The `kha` command: its sub-commands, and the only place where the process ends with a code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from kha_train.cli import bench, checkpoint, compare, data, generate, plan, quickstart, spikes, status, sweep, train
from kha_train.errors import KhaError
from kha_train.record.markers import leave_outcome

HELP = "Pretraining of mixture-of-experts language models with cross-head attention."

app = typer.Typer(name="kha", help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(quickstart.quickstart)
app.command()(train.train)
app.command()(plan.plan)
app.command()(compare.compare)
app.command()(generate.generate)
app.command()(spikes.spikes)
app.command("sweep")(sweep.sweep_command)
app.command("launch-arguments", hidden=True)(sweep.launch_arguments)
app.command()(status.status)
app.add_typer(data.app)
app.add_typer(checkpoint.app)
app.add_typer(bench.app)


def run(arguments: Sequence[str] | None = None) -> None:
    """Entry point. A KhaError ends as one line on standard error and its exit code (0-6, 75: see docs).

    KHA_DEBUG=1 adds the traceback. With several ranks only rank 0 prints what all of them agreed on.
    """
    try:
        # Typer itself ends the process: 0, 2 after a usage error told in its own words, 130 after Ctrl-C.
        app(args=arguments)
    except KhaError as error:
        if os.environ.get("KHA_DEBUG") == "1":
            raise
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        if rank == "0" or not error.agreed:
            where = "" if rank == "0" else f"rank {rank}: "
            print(f"{where}{error.line()}", file=sys.stderr, flush=True)
        leave_outcome(f"{'fatal' if error.fatal else 'failed'} {error.exit_code}")
        sys.exit(error.exit_code)
    except OSError as error:
        if os.environ.get("KHA_DEBUG") == "1" or error.filename is None:
            raise
        print(f"file error: {error.filename}: {error.strerror}", file=sys.stderr, flush=True)
        sys.exit(1)
