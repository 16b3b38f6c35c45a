"""Curves for the test vectors of docs/spike_score.md, and random ones. `python -m tests.stability.curves` writes the
vectors: a change of any of their documents is a new version of the specification.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any, NamedTuple

from kha_train.stability.document import SPECIFICATION, document, plain
from kha_train.stability.events import Observation

VECTORS = Path(__file__).parent / "vectors"


class Curve(NamedTuple):
    """Rows as a file may hold them, and the planned steps."""

    rows: list[Observation]
    planned: list[int]


def noisy(steps: int, seed: int, fall: float = 0.0, digits: int = 4) -> list[Observation]:
    """A loss around 3, `fall` nats lower at the end, and a norm around 1."""
    drawn = random.Random(seed)
    return [
        Observation(
            step,
            round(3.0 + fall * math.exp(-4 * step / steps) + drawn.gauss(0, 0.02), digits),
            round(math.exp(drawn.gauss(0, 0.1)), digits),
            512 * step,
            round(1e-3 * min(1.0, step / 50), 6),
            4 * (step - 1),
            4 * step - 1,
        )
        for step in range(1, steps + 1)
    ]


def changed(rows: list[Observation], **columns: dict[int, float]) -> list[Observation]:
    """`rows` with values set, each column by step."""
    return [row._replace(**{name: by[row.step] for name, by in columns.items() if row.step in by}) for row in rows]


def risen(rows: list[Observation], first: int, last: int, by: float) -> list[Observation]:
    """`rows` with the losses of the steps `first` to `last` higher `by`."""
    return [row._replace(loss=row.loss + by) if first <= row.step <= last else row for row in rows]


def named() -> dict[str, Curve]:
    """The curves of the vectors, each for a part of the specification."""
    nan, inf = math.nan, math.inf
    calm = noisy(300, 1)
    long = noisy(1300, 2)
    lonely = [row._replace(grad_norm=nan, tokens=0, lr=nan, samples_first=-1, samples_last=-1) for row in calm]
    shifted = risen(noisy(2600, 3), 200, 2600, 1.5)
    odd = {70: 1e101, 90: -1e101, 120: inf, 150: -inf, 180: 9e99, 240: -9e99}
    return {
        "one_row": Curve(calm[:1], []),
        "too_short": Curve(calm[:40], []),
        "calm": Curve(calm, []),
        "narrow_and_wide": Curve(risen(risen(calm, 150, 153, 2.0), 200, 230, 0.8), []),
        "falling": Curve(risen(noisy(400, 4, fall=6.0), 100, 104, 1.0), []),
        "overlapping": Curve(risen(risen(calm, 150, 151, 3.0), 154, 155, 2.0), []),
        "slow_rise": Curve(changed(calm, loss={step: 3 + 0.05 * (step - 150) for step in range(150, 180)}), []),
        "unknown_everything": Curve(risen(lonely, 100, 101, 4.0), []),
        "not_finite": Curve(changed(calm, loss={100: nan, 101: nan, 200: inf, 250: -inf}, grad_norm={210: inf}), []),
        "not_finite_first": Curve(changed(calm, loss={1: nan, 2: nan, 5: nan}), []),
        "unusable": Curve(changed(calm, loss=odd, grad_norm={60: 1e101, 95: -inf}), []),
        "constant": Curve(
            changed(calm, loss=dict.fromkeys(range(301), 2.5), grad_norm=dict.fromkeys(range(301), 1.0)), []
        ),
        "open_at_the_end": Curve(risen(calm, 290, 300, 2.0), []),
        "level_shift": Curve(risen(shifted, 2400, 2403, 2.0), []),
        "planned": Curve(risen(risen(calm, 150, 300, 2.0), 148, 149, 2.0), [150, 260]),
        "diverging": Curve(changed(calm, loss={step: 3.0 * 1.1 ** (step - 200) for step in range(200, 240)}), []),
        "five_times_four": Curve(risen(risen(calm, 120, 123, 5.0), 160, 164, 5.0), []),
        "scores_of_others": Curve(changed(risen(long, 1100, 1102, 1.0), grad_norm={1200: 9.0, 1250: 0.01}), []),
        "repeated_steps": Curve([*calm[:200], *risen(calm[150:], 170, 172, 2.0)], []),
        "every_tenth_step": Curve([row._replace(step=10 * row.step) for row in risen(calm, 100, 102, 2.0)], []),
        "tokens_that_stand": Curve(changed(calm, tokens={100: 0}), []),
    }


def random_curve(seed: int) -> Curve:
    """A curve with whatever may happen to one."""
    drawn = random.Random(seed)
    steps = drawn.choice([3, 65, 130, 400, 400, 1500, 1500, 2700])
    rows = noisy(steps, seed, fall=drawn.choice([0.0, 0.0, 5.0]), digits=drawn.choice([1, 3, 17]))
    for _ in range(drawn.randint(0, 6)):
        first = drawn.randint(1, steps)
        width = drawn.choice([1, 1, 3, 12, 60, steps])
        rows = risen(rows, first, first + width - 1, drawn.choice([0.1, 0.3, 1.0, 4.0, 1e6, -1.0]))
    values = [math.nan, math.inf, -math.inf, 1e101, -1e120, 1e99]
    for name in ("loss", "grad_norm"):
        places = [drawn.randint(1, steps) for _ in range(drawn.choice([0, 0, 1, 4]))]
        rows = changed(rows, **{name: {step: drawn.choice(values) for step in places}})
    if drawn.random() < 0.2:
        rows = [row._replace(tokens=0, grad_norm=math.nan) for row in rows]
    if drawn.random() < 0.2:
        start = drawn.randint(0, steps - 1)
        rows = [*rows, *rows[start : start + 50]]
    planned = [drawn.randint(1, steps)] if drawn.random() < 0.3 else []
    return Curve(rows, planned)


def as_vector(curve: Curve) -> dict[str, Any]:
    """What a file of `VECTORS` holds."""
    found = document(curve.rows, curve.planned)
    rows = [list(row) for row in curve.rows]
    return plain({"specification": SPECIFICATION, "planned": curve.planned, "rows": rows, "document": found})


def _text(vector: dict[str, Any]) -> str:
    """One row a line."""
    rows = ",\n".join(json.dumps(row) for row in vector["rows"])
    head = {key: vector[key] for key in ("specification", "planned")}
    tail = json.dumps(vector["document"], indent=1, allow_nan=False)
    return f'{json.dumps(head)[:-1]}, "rows": [\n{rows}\n], "document": {tail}}}\n'


if __name__ == "__main__":
    for name, curve in named().items():
        (VECTORS / f"{name}.json").write_text(_text(as_vector(curve)))
