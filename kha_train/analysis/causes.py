"""What replays of an event say: which change removes it, by how much, and whether that is a single cause.

An event is judged by the rule that opened it: with m and s of its opening, a step stands out at z = (x - m) / s >=
`OPEN_Z` or when it is not finite. The share of an event that is left is its area (the sum of (x - m)+ over the replayed
steps) over that of the control. A change removes the event when no step of the replay stands out and at most half of it
is left: an event that just opened would else be removed by any small change. A replay that diverged ends early: each
step that it did not reach stands out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

from kha_train.record.files import read_json
from kha_train.stability.events import OPEN_Z, Observation, SpikeEvent

FOLDER, VERDICT_FILE = "replay", "verdict.json"
WITHIN = {"precision": "router precision", "clipping": "rate"}
"""A family of changes -> the smaller one that it contains: a whole run in fp32 has its router in fp32, and a lower
rate bounds the update as clipping does. Where both remove an event, the smaller change is the cause."""
MOST_LEFT = 0.5
CHANCE = "rounding"
"""The family whose only change is the order of sums: an event that it removes has no cause to be found by replays."""


class Excess(NamedTuple):
    """How far replayed steps lie above the baseline: number of steps that stand out, and area in nats x steps."""

    standing_out: int
    area: float


@dataclass(frozen=True)
class Arm:
    """The replays of one change. `accuses` names the cause that it tests, `family` groups changes of the same kind.
    `removed` and `left` have an entry for each replay: whether the event is gone, and the share of it that is left.
    `reason`: why it was not replayed, "" if it was.
    """

    name: str
    family: str
    change: str
    accuses: str
    removed: tuple[bool, ...] = ()
    left: tuple[float, ...] = ()
    runs: tuple[str, ...] = ()
    reason: str = ""

    @property
    def removes(self) -> bool:
        """Whether every replay lost the event."""
        return bool(self.removed) and all(self.removed)

    @property
    def words(self) -> str:
        """The result in words."""
        return _words(self.reason, self.removed, self.left)


@dataclass(frozen=True)
class Verdict:
    """What replays say of one event. `differences`: how the control differs from the record, in words; nothing is
    judged then. `cause` is the family of the single cause, None without one; `answer` says it in a sentence.
    """

    run_id: str
    start_step: int
    end_step: int
    first: int
    last: int
    source: str
    answer: str
    cause: str | None = None
    differences: tuple[str, ...] = ()
    arms: tuple[Arm, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `VERDICT_FILE` holds them."""
        return asdict(self)


class SavedArm(TypedDict):
    """An arm in `VERDICT_FILE`."""

    name: str
    family: str
    change: str
    accuses: str
    removed: list[bool]
    left: list[float]
    runs: list[str]
    reason: str


class SavedVerdict(TypedDict):
    """`VERDICT_FILE`."""

    run_id: str
    start_step: int
    end_step: int
    first: int
    last: int
    answer: str
    cause: str | None
    differences: NotRequired[list[str]]
    arms: list[SavedArm]


def words_of(arm: SavedArm) -> str:
    """As `Arm.words`, of a saved arm."""
    return _words(arm["reason"], arm["removed"], arm["left"])


def _words(reason: str, removed: Sequence[bool], left: Sequence[float]) -> str:
    if reason:
        return f"not replayed: {reason}"
    gone = "removes it" if all(removed) else "does not remove it"
    if any(removed) and not all(removed):
        gone = f"removes it in {sum(removed)} of {len(removed)} replays"
    shares = [share for share in left if math.isfinite(share)]
    return f"{gone}; {100 * sum(shares) / len(shares):.0f} % of it left" if shares else gone


def excess(lines: Iterable[Mapping[str, Any]], event: SpikeEvent, before: int, last: int) -> Excess:
    """How the `lines` of a record of steps after `before`, to `last`, stand above the baseline of `event`. The step
    before the event is one of them: leaving out a batch moves the next ones there. A step without a line stands out,
    and then the area is infinite."""
    first = max(event.start_step - 1, before + 1)
    count, area, missing = 0, 0.0, last - first + 1
    for line in lines:
        if not first <= line["step"] <= last:
            continue
        missing -= 1
        seen = Observation(line["step"], float(line["train/loss"]), float(line["train/grad_norm"]))
        above = seen.loss - event.baseline
        count += not seen.finite or above / event.scale >= OPEN_Z
        if math.isfinite(above):
            area += max(above, 0.0)
    return Excess(count + missing, area if not missing else math.inf)


def share_left(found: Excess, control: Excess) -> float:
    """The share of the event that is left: by area, or by steps that stand out where the control's has no area."""
    if control.area > 0:
        return found.area / control.area
    return found.standing_out / control.standing_out if control.standing_out else math.nan


def is_removed(found: Excess, control: Excess) -> bool:
    """Whether the event of the `control` is gone."""
    return not found.standing_out and not share_left(found, control) > MOST_LEFT


def judge(arms: Sequence[Arm]) -> tuple[str | None, str]:
    """The family of the single cause (None: there is none) and the verdict in a sentence."""
    removing = [arm for arm in arms if arm.removes]
    if any(any(arm.removed) for arm in arms if arm.family == CHANCE):
        return None, "no single cause: even another rounding of the same steps removes it, so any change may"
    families = dict.fromkeys(arm.family for arm in removing)
    causes = [family for family in families if WITHIN.get(family) not in families]
    if len(causes) == 1:
        first = next(arm for arm in removing if arm.family == causes[0])
        left = f", {100 * max(first.left):.0f} % of it left" if all(map(math.isfinite, first.left)) else ""
        others = len({arm.name for arm in arms if arm.removed} - {arm.name for arm in removing})
        beside = (
            f"; {others} other change{'s do' if others != 1 else ' does'} not" if others else "; nothing else was tried"
        )
        if not any(arm.removed for arm in arms if arm.family == CHANCE):
            beside += "; not held against another rounding, which may remove it too"
        return causes[0], f"{first.accuses}: the event is gone {first.change}{left}{beside}"
    if causes:
        told = "; ".join(arm.change for arm in removing)
        return None, f"no single cause: each of these changes removes it: {told}"
    done = [arm for arm in arms if arm.removed]
    if not done:
        return None, "no verdict: no change was replayed"
    told = f"no single cause: none of {len(done)} changes removes it"
    means = [(sum(arm.left) / len(arm.left), arm.change) for arm in done]
    least, change = min((one for one in means if math.isfinite(one[0])), default=(math.nan, ""))
    return None, f"{told}; the most effective, {change}, leaves {100 * least:.0f} % of it" if change else told


def read_verdicts(run_dir: Path) -> list[SavedVerdict]:
    """The verdicts of the replays in `run_dir`, by step. Raises DataError for a damaged file."""
    found = [read_json(path, SavedVerdict) for path in sorted((run_dir / FOLDER).glob(f"*/{VERDICT_FILE}"))]
    return sorted((one for one in found if one is not None), key=lambda one: one["start_step"])
