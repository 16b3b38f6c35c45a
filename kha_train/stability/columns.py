"""Turns rows of any framework's log into observations: finds the columns of step and loss, and reads their values.

A row is its position (for errors) and its cells by name. A cell is a JSON value or text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from .errors import CurveError, DamagedCurveError
from .events import Observation

Row = tuple[str, Mapping[str, Any]]

NAMES: dict[str, tuple[str, ...]] = {
    "loss": (
        "train/loss", "loss", "lm_loss", "train/lm_loss", "training_loss", "training/loss", "train_loss_step",
        "train_loss", "reduced_train_loss", "train/ce_loss", "loss/train/total", "loss_metrics/global_avg_loss",
    ),
    "step": (
        "step", "train/global_step", "trainer/global_step", "global_step", "train/step", "iteration", "train/iteration",
        "_step",
    ),
    "grad_norm": (
        "train/grad_norm", "grad_norm", "gradient_norm", "train/gradient_norm", "optim/total_grad_norm",
        "total_grad_norm",
    ),
    "tokens": (
        "tokens", "train/tokens", "num_input_tokens_seen", "train/num_input_tokens_seen", "consumed_tokens",
        "throughput/total_tokens",
    ),
    "lr": ("train/lr", "lr", "learning_rate", "train/learning_rate"),
    "samples_first": ("samples_first",),
    "samples_last": ("samples_last",),
}  # fmt: skip
"""Field of an observation -> its names in logs, preferred ones first. W&B's own `_step` counts rows, so a column with
the optimiser step comes before it.
"""
KNOWN = {alias: field for field, aliases in NAMES.items() for alias in aliases}
READ = (
    "a file: metrics.jsonl, W&B history rows or CSV export, trainer_state.json, a Megatron log, or CSV, TSV or JSON "
    "lines with step and loss"
)
"""What is read, as errors say it."""
MISSING = frozenset(("", "null", "none", "na", "n/a", "-"))
"""Text that stands for a missing value. `nan` is a value: the loss was not a number."""
LARGEST = 2**53
"""The largest count that is read: every integer up to here is exact as a double."""
SHOWN = 200
"""Number of characters of a foreign file that an error shows."""


def alias_of(name: str) -> str:
    """`name` without the run that W&B puts before it, in the spelling of `NAMES`: "my run - Train/Loss" becomes
    train/loss.

    Other names are returned in that spelling too.
    """
    return _spelled(_split(name)[1])


@lru_cache(maxsize=4096)
def is_known(name: str) -> bool:
    """Whether a column of this name is used."""
    return alias_of(name) in KNOWN


def names_both(names: Iterable[str]) -> bool:
    """Whether `names` include a step and a loss."""
    return {"step", "loss"} <= {KNOWN.get(alias_of(name)) for name in names}


def is_given(value: object) -> bool:
    """Whether a cell holds a value."""
    return value is not None and not (isinstance(value, str) and value.strip().lower() in MISSING)


def observations(rows: Sequence[Row], path: str) -> list[Observation]:
    """An observation for each row with a loss, in order.

    Raises CurveError when there is no column for the step or the loss, when there are several, and when steps are
    fractions; DamagedCurveError for a value that is not a number and for a loss without a step.
    """
    if not rows:
        return []
    seen = dict.fromkeys(name for _, cells in rows for name in cells)
    known = [name for name in seen if is_known(name)]
    missing = [field for field in ("step", "loss") if field not in {KNOWN[alias_of(name)] for name in known}]
    if missing:
        raise CurveError(
            f"it has no column for {' or '.join(missing)}", field=path, value=",".join(seen)[:SHOWN], allowed=READ
        )
    loss = _column("loss", known, rows, path)
    if loss is None:
        return []
    rows = [(where, cells) for where, cells in rows if is_given(cells.get(loss))]
    run = _split(loss)[0]
    beside = [name for name in known if _split(name)[0] in ("", run)]
    columns = {field: _column(field, beside, rows, path) for field in NAMES} | {"loss": loss}
    return [_observation(cells, columns, where) for where, cells in rows]


def _column(field: str, known: Sequence[str], rows: Sequence[Row], path: str) -> str | None:
    """The preferred name of `field` with a value in a row, if possible in every row for steps; None without any. Raises
    as `observations`.
    """
    named = sorted((name for name in known if KNOWN[alias_of(name)] == field), key=_preference)
    count = {name: sum(is_given(cells.get(name)) for _, cells in rows) for name in named}
    used = [name for name in named if count[name]]
    if not used:
        return None
    runs = list(dict.fromkeys(_split(name)[0] for name in used))
    if field == "loss" and len(runs) > 1:
        shown = ", ".join(run or "(no run)" for run in runs)[:SHOWN]
        raise CurveError("it holds the loss of several runs", field=path, value=shown, fix="keep one run per file")
    chosen = next((name for name in used if count[name] == len(rows)), used[0]) if field == "step" else used[0]
    alike = [name for name in used if _preference(name) == _preference(chosen)]
    if len(alike) > 1:
        raise CurveError(f"two columns hold the {field}", field=path, value=",".join(alike)[:SHOWN], fix="keep one")
    return chosen


def _preference(name: str) -> tuple[int, bool]:
    """The sort key of a name within its field. A run's own step comes before W&B's heading "Step", which counts
    rows.
    """
    run, _ = _split(name)
    alias = alias_of(name)
    return NAMES[KNOWN[alias]].index(alias), not run


def _observation(cells: Mapping[str, Any], columns: Mapping[str, str | None], where: str) -> Observation:
    def cell(field: str) -> Any:
        name = columns[field]
        value = cells.get(name) if name is not None else None
        return value if is_given(value) else None

    if cell("step") is None:
        raise DamagedCurveError("a loss without a step", field=where)

    def whole(name: str, absent: int) -> int:
        return absent if cell(name) is None else _whole(cell(name), name, where)

    def number(name: str) -> float:
        return math.nan if cell(name) is None else _float(cell(name), name, where)

    return Observation(
        step=_whole(cell("step"), "step", where),
        tokens=whole("tokens", 0),
        samples_first=whole("samples_first", -1),
        samples_last=whole("samples_last", -1),
        loss=number("loss"),
        grad_norm=number("grad_norm"),
        lr=number("lr"),
    )


def _float(value: Any, name: str, where: str) -> float:
    try:
        return float(_number(value, name, where))
    except OverflowError as error:
        raise DamagedCurveError(f"{name} is too large for a float", field=where) from error


def _whole(value: Any, name: str, where: str) -> int:
    """Raises CurveError for a fraction: the file is valid but has another axis, and rounding would merge rows."""
    number = _number(value, name, where)
    if not abs(number) <= LARGEST:
        raise DamagedCurveError(
            f"{name} is not a valid count", field=where, value=str(number)[:40], allowed=f"at most {LARGEST}"
        )
    if number != int(number):
        raise CurveError(
            f"{name} is a fraction",
            field=where,
            value=number,
            allowed="integers",
            fix="export the curve over optimiser steps, not over epochs or time" if name == "step" else "",
        )
    return int(number)


def _number(value: Any, name: str, where: str) -> int | float:
    if type(value) is int or type(value) is float:
        return value
    if isinstance(value, str) and "_" not in value:
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    shown = value if type(value) is bool else str(value)[:40]
    raise DamagedCurveError(f"{name} is not a number", field=where, value=shown)


def _split(name: str) -> tuple[str, str]:
    """The run and the metric in a heading of W&B's export; other names have no run."""
    run, dash, metric = name.rpartition(" - ")
    return (run.strip(), metric) if dash and _spelled(metric) in KNOWN else ("", name)


def _spelled(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_").replace(".", "/")
