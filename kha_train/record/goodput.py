"""How the wall time of a run was spent: on steps that still count, and on everything else by cause."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kha_train.record.totals import Totals


@dataclass(frozen=True)
class Goodput:
    """Seconds from the first start to the last sign of life, in categories that add up to `wall`.

    `productive`: applied steps of the surviving curve, without their wait for data. `skipped`: surviving steps that
    were not applied. `lost`: steps undone by a restart or a rewind. `data_wait`: waiting for batches. `checkpoint`:
    training paused for a save. `starting`: from the start of an attempt to its first step. `down`: between two
    attempts. `other`: validation, recording and the rest.
    """

    wall: float
    productive: float
    skipped: float
    lost: float
    data_wait: float
    checkpoint: float
    starting: float
    down: float

    @property
    def other(self) -> float:
        """The time in no other category."""
        claimed: float = sum(seconds for name, seconds in asdict(self).items() if name != "wall")
        return self.wall - claimed

    @property
    def share(self) -> float:
        """Productive time / wall time, 0 to 1."""
        return self.productive / self.wall if self.wall > 0 else 0.0

    def to_dict(self) -> dict[str, float]:
        """All categories and the share, for `run.json`."""
        return {"goodput": self.share, **asdict(self), "other": self.other}


def goodput_of(totals: Totals, attempts: Sequence[Mapping[str, Any]]) -> Goodput | None:
    """The goodput of a run so far, from the `totals` of its record and the `attempts` of its run.json. None before its
    first step, and where the record lacks the start times of attempts or the durations of steps.
    """
    if not (totals.lines and attempts) or totals.untimed or any("started" not in attempt for attempt in attempts):
        return None
    starting = down = 0.0
    last_sign = attempts[0]["started"]
    for attempt in attempts:
        signs = totals.attempts.get(attempt["attempt"])
        began, ended = attempt["started"], attempt.get("ended", attempt["started"])
        down += max(0.0, began - last_sign)
        starting += max(0.0, (signs["began"] if signs else ended) - began)
        seen = [signs["last"]] if signs else []
        last_sign = max(last_sign, ended if attempt["state"] != "lost" else began, *seen)
    return Goodput(
        wall=last_sign - attempts[0]["started"],
        starting=starting,
        down=down,
        **{name: totals.seconds(name) for name in totals.sums},
    )
