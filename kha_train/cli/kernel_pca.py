"""`kha kernel-pca`: exact and streaming kernel PCA of handwritten digits, or of the outputs of attention heads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kha_train.analysis.report.content import Table as Rows
from kha_train.cli.output import Overwrite, print_json
from kha_train.cli.progress import progress_bar
from kha_train.literal import say
from kha_train.record.files import check_replaceable, mark_of
from kha_train.telemetry.terminal import LiteralConsole


def kernel_pca(
    run: Annotated[Path | None, typer.Argument(help="A run, whose head outputs take the place of digits.")] = None,
    layer: Annotated[int, typer.Option(help="With a run: the layer.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("kernel-pca.html"),
    count: Annotated[int, typer.Option(min=40, max=1198, help="Vectors; of digits, half as many are held out.")] = 400,
    components: Annotated[int, typer.Option(min=2, max=32, help="Components.")] = 16,
    passes: Annotated[int, typer.Option(min=1, help="Passes over all vectors.")] = 10,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the streaming methods.")] = 3,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare exact kernel PCA with the Kernel Hebbian Algorithm, which shares only its letters with the KHA trained
    here (docs/kernel_pca.md).
    """
    mark = mark_of("kernel-pca", [run] if run else [])
    check_replaceable(out, mark, "--out", overwrite, (b"<!doctype html>",))
    out.parent.mkdir(parents=True, exist_ok=True)
    sizes = (count, components, passes, seeds)
    _of_run(run, layer, sizes, out, mark, as_json) if run else _of_digits(sizes, out, mark, as_json)
    if not as_json:
        say(f"page: {out}")


def _of_digits(sizes: tuple[int, int, int, int], out: Path, mark: str, as_json: bool) -> None:
    from kha_train.analysis.kernel_pca.page import NAMES, plain, table_of, write_page
    from kha_train.analysis.kernel_pca.trial import passes_of, run_trial

    with progress_bar("passes", passes_of(sizes[2], sizes[3], sizes[3], 1)) as advance:
        trial = run_trial(*sizes, advance)
    write_page(trial, out, mark)
    if as_json:
        print_json({"page": str(out), **plain(trial)})
        return
    _print(table_of(trial.digits), "excess reconstruction error of digits")
    images, moving = trial.images.errors(), trial.walk.errors()
    further = Table("method", "purity", "digits", "walk", title="clusters, and error after de-noising", box=None)
    for name, error in images.items():
        cells = (f"{trial.purity[name]:.3f}" if name in trial.purity else "", f"{error:.4f}", f"{moving[name]:.5f}")
        further.add_row(NAMES.get(name, name), *cells)
    LiteralConsole().print(further)


def _of_run(run: Path, layer: int, sizes: tuple[int, int, int, int], out: Path, mark: str, as_json: bool) -> None:
    from kha_train.analysis.kernel_pca.heads import head_components
    from kha_train.analysis.kernel_pca.page import plain_heads, table_of, write_heads_page
    from kha_train.analysis.kernel_pca.trial import passes_of

    with progress_bar("passes", passes_of(sizes[2], sizes[3])) as advance:
        found = head_components(run, layer, *sizes, advance)
    write_heads_page(found, out, mark)
    if as_json:
        print_json({"run": str(run), "page": str(out), **plain_heads(found)})
        return
    _print(table_of(found.problem), f"excess reconstruction error of head outputs, layer {layer}")


def _print(rows: Rows, title: str) -> None:
    table = Table(*rows.head, title=title, box=None)
    for row in rows.rows:
        table.add_row(row.name, *row.values)
    LiteralConsole().print(table)
