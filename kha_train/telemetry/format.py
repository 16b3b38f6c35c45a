"""Formats a step of `metrics.jsonl` as one line of a given width; the least important parts are dropped first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

MAX_WIDTH = 120
"""Maximum number of characters of a step line on wide terminals."""
MOST_DAYS = 9999
"""A duration of more days is abbreviated, or it would leave no room for the rest of its line."""


def scaled(number: float) -> str:
    """A positive number with a suffix: 812, 18.2k, 1.31M."""
    for factor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{suffix}" if number < 999.5 * factor else f"{number / factor:.0f}{suffix}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """Seconds as 0:45, 12:05, 4:12:33 or 3d 04:12; a question mark when unknown. Beyond `MOST_DAYS` days, which no run
    lasts, it is abbreviated.
    """
    if not math.isfinite(seconds):
        return "?"
    if seconds >= 86400 * MOST_DAYS:
        return f">{MOST_DAYS}d"
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def scientific(number: float) -> str:
    """2.9e-4 rather than 2.9e-04."""
    mantissa, _, exponent = f"{number:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def fixed(number: float, digits: int) -> str:
    """`digits` decimals, but scientific where that would be long: 3.412, 1.2e+9."""
    return f"{number:.{digits}f}" if abs(number) < 1e5 or not math.isfinite(number) else f"{number:.{digits}g}"


def step_line(
    line: dict[str, Any],
    total_steps: int,
    *,
    loss_average: float = math.nan,
    seconds_left: float = math.nan,
    memory_total_gib: float | None = None,
    checkpoint_step: int | None = None,
    width: int = MAX_WIDTH,
) -> str:
    """A metrics line formatted for the console, at most `width` characters; missing values are left out.

    A part is shown completely or not at all; step, loss and the time left go last.
    """
    step = line["step"]
    # (rank of importance, text): when the line is too long, the highest rank is dropped first.
    parts: list[tuple[int, str]] = []
    if "train/loss" in line:
        parts.append((0, f"loss {fixed(line['train/loss'], 3)}"))
        if math.isfinite(loss_average):
            parts.append((5, f"ema {fixed(loss_average, 3)}"))
    if line.get("train/skipped"):
        parts.append((0, "SKIPPED"))
    if "train/grad_norm" in line:
        parts.append((2, f"gnorm {fixed(line['train/grad_norm'], 2)}"))
    if "train/lr" in line:
        parts.append((4, f"lr {scientific(line['train/lr'])}"))
    if "train/tokens_per_second" in line:
        parts.append((2, f"{scaled(line['train/tokens_per_second'])} tok/s"))
    if "train/mfu" in line:
        parts.append((3, f"MFU {fixed(100 * line['train/mfu'], 1)}%"))
    if "memory/peak_gib" in line:
        of_total = f"/{memory_total_gib:.0f}" if memory_total_gib else ""
        parts.append((6, f"mem {fixed(line['memory/peak_gib'], 1)}{of_total}G"))
    if "moe/maxvio" in line:
        parts.append((7, f"bal {fixed(line['moe/maxvio'], 2)}"))
    parts.append((1, f"ETA {duration(seconds_left)}"))
    if checkpoint_step is not None:
        parts.append((8, f"ckpt {checkpoint_step}"))
    heads = (
        f"step {step}/{total_steps} {100 * step / max(total_steps, 1):.2f}%",
        f"step {step}/{total_steps}",
        f"step {step}",
    )
    return _fit(heads, parts, width)


def _fit(heads: Sequence[str], parts: list[tuple[int, str]], width: int) -> str:
    """The longest of `heads` and as many `parts` as fit. A shorter head is used before parts of rank 0 and 1 are
    dropped.
    """
    while True:
        for head in heads if all(rank <= 1 for rank, _ in parts) else heads[:1]:
            text = " | ".join([head, *(part for _, part in parts)])
            if len(text) <= width:
                return text
        if not parts:
            return heads[-1][:width]
        parts.remove(max(parts, key=lambda part: part[0]))
