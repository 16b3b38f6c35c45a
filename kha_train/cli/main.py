"""The `kha` command with its sub-commands. Only this file ends the process with an exit code."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from importlib import import_module
from inspect import getdoc, signature
from types import TracebackType
from typing import Annotated, Any

import typer

from kha_train.cli.options import OverridesCommand
from kha_train.config.home import provide_home
from kha_train.errors import ConfigError, KhaError, MachineError
from kha_train.literal import say
from kha_train.output import harmless_output, hold_standard_descriptors
from kha_train.record.markers import leave_outcome
from kha_train.record.provenance import with_version
from kha_train.record.redact import Redactor
from kha_train.record.streams import redacted_streams

HELP = "Pretraining of mixture-of-experts language models with cross-head attention."
COMMANDS = {
    "quickstart": "quickstart:quickstart",
    "train": "train:train",
    "doctor": "doctor:doctor",
    "plan": "plan:plan",
    "compare": "compare:compare",
    "analyze": "analyze:analyze",
    "kernel-pca": "kernel_pca:kernel_pca",
    "export": "export:export",
    "generate": "generate:generate",
    "import": "import_model:import_model",
    "compress": "compress:compress",
    "eval": "eval:eval_",
    "spikes": "spikes:spikes",
    "replay": "replay:replay",
    "sweep": "sweep:sweep_command",
    "launch-arguments": "sweep:launch_arguments",
    "status": "status:status",
    "metrics": "metrics:metrics",
    "config": "config:app",
    "study": "study:app",
    "data": "data:app",
    "checkpoint": "checkpoint:app",
    "bench": "bench:app",
}
"""Name of a command -> its file in this folder, and the function or command group in that file."""
HIDDEN = ("launch-arguments",)
SHOWING_DATA = (("generate",), ("data", "inspect"))
"""Commands that print text from the data or from a model."""


def _print_version(asked: bool) -> None:
    if asked:
        say(", ".join(with_version(name) for name in ("kha_train", "torch", "deepspeed")))
        raise typer.Exit


def build(names: Sequence[str]) -> typer.Typer:
    """The `kha` command with the sub-commands `names`; only their files are imported."""
    settings = {"help_option_names": ["-h", "--help"]}
    app = typer.Typer(
        name="kha", help=HELP, no_args_is_help=True, context_settings=settings, pretty_exceptions_enable=False
    )
    # The callback keeps a single sub-command under its name.
    app.callback()(_options)
    for name in names:
        file, _, member = COMMANDS[name].partition(":")
        found = getattr(import_module(f"kha_train.cli.{file}"), member)
        if isinstance(found, typer.Typer):
            app.add_typer(found)
        else:
            takes_settings = "overrides" in signature(found).parameters
            app.command(name, hidden=name in HIDDEN, cls=OverridesCommand if takes_settings else None)(found)
    for group in (app, *(entry.typer_instance for entry in app.registered_groups)):
        for command in group.registered_commands if group else ():
            command.help = _help_of(command.callback)
    return app


def _help_of(command: Callable[..., object] | None) -> str:
    """The docstring of a command up to "Raises": the rest is for readers of the code."""
    return re.split(r"\s*\bRaises (?=as |[A-Z])", getdoc(command) or "")[0].strip()


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    """Options of `kha` itself; its help text is `HELP`."""


def __getattr__(name: str) -> Any:
    """`app`: the whole command, built on first access (PEP 562)."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return build(list(COMMANDS))


def run(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Prints a KhaError as one line (exit 3: a table) on standard error and ends with its exit code (1-6,
    75: see docs).

    KHA_DEBUG=1 adds the traceback. With several ranks, rank 0 alone prints an error that all ranks agreed on. Launch
    logs keep what is printed here, so secrets are hidden.
    """
    hold_standard_descriptors()
    given = list(sys.argv[1:] if arguments is None else arguments)
    # A training run's output only mirrors its record, so it may get lost. The output of other commands is their result.
    trains = given[:1] == ["train"] and not {"--dry-run", "--help"} & set(given)
    with harmless_output() if trains else nullcontext():
        _run(arguments, given, trains)


def _run(arguments: Sequence[str] | None, given: list[str], trains: bool) -> None:
    try:
        # Typer ends the process itself: with 0, with 2 after printing a usage error, with 130 after Ctrl-C.
        if not trains:
            # `kha train` sets up its home in its run directory. Most other commands work without one.
            with suppress(OSError):
                provide_home()
        with redacted_streams(verbatim=any(given[: len(command)] == list(command) for command in SHOWING_DATA)):
            build(given[:1] if given and given[0] in COMMANDS else list(COMMANDS))(args=arguments)
    except (KhaError, OSError) as caught:
        error = caught if isinstance(caught, KhaError) else _as_own(caught)
        if error is None:
            raise
        if os.environ.get("KHA_DEBUG") == "1":
            _print_traceback(type(caught), caught, caught.__traceback__)
        complain_of(error)
        if error is caught:
            leave_outcome(f"{'fatal' if error.fatal else 'failed'} {error.exit_code}")
        sys.exit(error.exit_code)
    finally:
        # Set here, because Typer installs its own hook before.
        sys.excepthook = _print_traceback


def complain_of(error: KhaError) -> None:
    """Print the line of `error` on standard error. An error that all ranks agreed on is printed by rank 0 only."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    if rank == "0" or not error.agreed:
        where = "" if rank == "0" else f"rank {rank}: "
        _complain(f"{where}{error.line()}")


def _as_own(error: OSError) -> KhaError | None:
    """A MachineError for a full or failing disk, a ConfigError for an unusable path; None for anything else."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        return MachineError(
            f"{error.strerror}", field=error.filename, fix="free some space, or repair the disk, and start again"
        )
    return None if error.filename is None else ConfigError(f"{error.strerror}", field=str(error.filename))


def _complain(text: str) -> None:
    say(Redactor.from_environment().text(text), err=True)


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _complain("".join(traceback.format_exception(kind, error, trace)).rstrip())
