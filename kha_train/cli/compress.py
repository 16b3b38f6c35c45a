"""`kha compress RUN`: fewer key/value heads in the cache of a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from kha_train.cli.output import print_json
from kha_train.cli.progress import progress_bar
from kha_train.errors import ConfigError
from kha_train.literal import say
from kha_train.record.finding import find_run
from kha_train.telemetry.terminal import LiteralConsole

if TYPE_CHECKING:
    from kha_train.export.compress_scan import Scan


def compress(
    run: Annotated[Path, typer.Argument(help="A run directory (its newest checkpoint) or one step directory.")],
    kv_heads: Annotated[
        str, typer.Option(help="Key/value heads that are left: one number, or with --scan several, such as 1,2.")
    ] = "",
    layers: Annotated[
        str, typer.Option(help="Which layers: all (if not given), middle (half), deep (all but the first 3), or 0,2-3.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="The directory of the new run.")] = None,
    scan: Annotated[
        bool, typer.Option("--scan", help="Measure each layer and groups of layers instead, and write nothing.")
    ] = False,
    rows: Annotated[int, typer.Option(help="With --scan: rows of each set that are scored.", min=1)] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compress the cache of a trained model: key/value heads become fewer virtual heads, by an SVD (MEA, app. F).

    The new run has weights alone. It evaluates and generates as it is; `run.init_from` trains it on. The old run is not
    changed. Raises ConfigError without --out or a number of heads, for options that --scan does not use, and as
    `compress_run` and `scan`.
    """
    run, counts = find_run(run), _numbers(kv_heads)
    if scan and (layers or out):
        given, value = ("--layers", layers) if layers else ("--out", str(out))
        raise ConfigError(
            "--scan measures each layer and group of layers, and writes nothing", field=given, value=value
        )
    if scan:
        from kha_train.export.compress_scan import scan as scan_model

        found = scan_model(run, counts, rows, progress_bar)
        if as_json:
            print_json(found.to_plain(), indent=2)
        else:
            _print_scan(found)
        return
    if out is None:
        raise ConfigError("not given", field="--out", allowed="the directory of the new run")
    if len(counts) != 1:
        raise ConfigError("one number is needed", field="--kv-heads", value=kv_heads, allowed="1 up to the model's")
    _write(run, layers or "all", counts[0], out, as_json)


def _write(run: Path, layers: str, kv_heads: int, out: Path, as_json: bool) -> None:
    from kha_train.export.compress import command_of, compress_run

    made = compress_run(run, layers, kv_heads, out, progress_bar)
    if as_json:
        print_json({"out": str(out), **made.to_plain()}, indent=2)
        return
    table = Table("layer", "projection", "heads", "weight lost")
    for loss in made.losses:
        table.add_row(str(loss.layer), loss.projection, str(loss.heads), f"{100 * loss.lost:.2f} %")
    LiteralConsole().print(table)
    before, after = made.cache_numbers
    say(f"cache: {before:,} numbers a token before, {after:,} after ({100 * after / before:.1f} %)")
    say(f"written: {out}, from step {made.step} of {made.source}")
    say(f"to train it on, add to the settings of the old run: {command_of(made, out)}")


def _print_scan(scan: Scan) -> None:
    """The scores of the model as it is, and for each point by how much they rise."""
    shown = _shown(list(scan.whole.scores))
    table = Table("layers", "heads", "cache", *(name.removeprefix("evaluation/") for name in shown))
    whole = scan.whole
    table.add_row("as it is", str(whole.kv_heads), "100 %", *(f"{whole.scores[name]:.4f}" for name in shown))
    for point in scan.points:
        share, rises = point.cache_numbers / whole.cache_numbers, scan.rises(point)
        cells = (f"{rises[name]:+.4f}" for name in shown)
        table.add_row(point.layers, str(point.kv_heads), f"{100 * share:.0f} %", *cells)
    LiteralConsole(width=200).print(table)
    say(f"step {scan.step} of {scan.source}, {scan.rows} rows of each set; --json has every score")


def _shown(names: list[str]) -> list[str]:
    """The entries that fit into a table: of those in buckets, the last bucket of each figure."""
    last = {name.rpartition("_from_")[0]: name for name in names if "_from_" in name}
    return [name for name in names if "_from_" not in name or (name in last.values() and "accuracy" not in name)]


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 1,2", param_hint="--kv-heads") from None
