"""Where the wall time of a run went: steps that still count, and everything else by its cause."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from kha_train.record.reader import read_discarded, read_events, read_metrics, read_run

TIMED = frozenset(("time", "attempt", "train/step_seconds", "data/wait_seconds", "train/skipped"))
"""What a line must tell for its time to be accounted for."""


@dataclass(frozen=True)
class Goodput:
    """Seconds from the first start to the last sign of life, in buckets that add up to `wall`.

    `productive`: steps of the surviving curve that were applied, without their wait for data. `skipped`: surviving
    steps that were not applied. `lost`: steps undone by a restart or a rewind. `data_wait`: waiting for batches.
    `checkpoint`: training stood still for a save. `starting`: from the start of an attempt to its first step. `down`:
    between two attempts. `other`: validation, recording and the rest.
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
        """What no bucket claims."""
        return self.wall - sum(seconds for name, seconds in asdict(self).items() if name != "wall")

    @property
    def share(self) -> float:
        """Productive time over wall time, 0 to 1."""
        return self.productive / self.wall if self.wall > 0 else 0.0

    def to_dict(self) -> dict[str, float]:
        """All buckets and the share, for `run.json`."""
        return {"goodput": self.share, **asdict(self), "other": self.other}


def goodput(run_dir: Path) -> Goodput | None:
    """The goodput of a run so far; None before its first step, and where the record does not tell when its attempts
    began or how long its steps took. Raises DataError for a damaged record."""
    lines, undone = read_metrics(run_dir), read_discarded(run_dir)
    attempts, by_attempt = read_run(run_dir).get("attempts"), {}
    timed = all(line.keys() >= TIMED for line in [*lines, *undone])
    if not (lines and attempts and timed and all("started" in attempt for attempt in attempts)):
        return None
    for line in sorted([*lines, *undone], key=lambda line: line["time"]):
        by_attempt.setdefault(line["attempt"], []).append(line)
    starting = down = 0.0
    last_sign = attempts[0]["started"]
    for attempt in attempts:
        steps = by_attempt.get(attempt["attempt"], [])
        began, ended = attempt["started"], attempt.get("ended", attempt["started"])
        first = steps[0]["time"] - steps[0]["train/step_seconds"] if steps else ended
        down += max(0.0, began - last_sign)
        starting += max(0.0, first - began)
        last_sign = max(last_sign, ended if attempt["state"] != "lost" else began, *(step["time"] for step in steps))
    saves = [event for event in read_events(run_dir) if event["kind"] == "checkpoint_saved"]
    return Goodput(
        wall=last_sign - attempts[0]["started"],
        productive=sum(_busy(line) for line in lines if not line["train/skipped"]),
        skipped=sum(_busy(line) for line in lines if line["train/skipped"]),
        lost=sum(_busy(line) for line in undone),
        data_wait=sum(line["data/wait_seconds"] for line in [*lines, *undone]),
        checkpoint=sum(save["stall_seconds"] for save in saves),
        starting=starting,
        down=down,
    )


def _busy(line: dict[str, float]) -> float:
    """Seconds of a step without its wait for data."""
    return line["train/step_seconds"] - line["data/wait_seconds"]
