"""What `kha compare --certify` adds to a comparison, as plain values for the page, for JSON and for the certificate."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from kha_train.foreign.documents import Json

Bar = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]
"""Opens a progress bar with a name and a total; inside the block, the function that adds to what is done."""


@dataclass(frozen=True)
class Chain:
    """The links of one run, as `verify.run_links` makes them. `ended` says whether its last attempt had ended; the
    files of a run that goes on change.
    """

    label: str
    path: str
    links: tuple[dict[str, Json], ...]
    ended: bool

    @property
    def head(self) -> str:
        """The SHA-256 of the last link, which covers all others."""
        return str(self.links[-1]["sha256"])


@dataclass(frozen=True)
class NullPair:
    """Two A/A runs, by their labels, and the difference of their train losses over the window."""

    reference: str
    other: str
    difference: float


@dataclass(frozen=True)
class Null:
    """Differences that mean nothing, of one `kind` of A/A runs, over the steps `first_step` to `last_step`.

    `spread` is the standard deviation of the difference of two such runs, with `freedom` degrees of freedom; 95 % of
    such differences are within +-`bound`. `paired`: both runs of a pair read the same data and begin alike. `caveats`
    are settings in which the A/A runs differ among themselves or from the reference of the comparison.
    """

    kind: str
    first_step: int
    last_step: int
    pairs: tuple[NullPair, ...]
    freedom: int
    spread: float
    bound: float
    paired: bool
    caveats: tuple[str, ...]

    @property
    def largest(self) -> float:
        """The largest difference, without its sign."""
        return max(abs(pair.difference) for pair in self.pairs)


@dataclass(frozen=True)
class SeedsNeeded:
    """How many seeds find `effect` (nats per token) of a variant with a probability of 80 % at 5 %, two-sided.

    `stated`: the effect was chosen; otherwise it is the measured one. `spread` is the standard deviation of the paired
    differences over `seeds` seeds, which has the 95 % limits `spread_limits`; `needed` and `needed_limits` follow from
    them. They are None with fewer than two seeds; a number of seeds also is where more than 1,000 are needed.
    """

    variant: str
    effect: float
    stated: bool
    seeds: int
    spread: float | None
    needed: int | None
    spread_limits: tuple[float | None, float | None]
    needed_limits: tuple[int | None, int | None]


@dataclass(frozen=True)
class Replay:
    """Steps `first` + 1 to `last` of a run, computed again: `lines` of the record with `entries` in all, and the
    `tensors` of the checkpoint after `last`. `differences` are in words. `reason` says why a stretch was not replayed,
    or what may have caused differences.
    """

    run: str
    first: int
    last: int
    outcome: Literal["equal", "differs", "not replayed"]
    lines: int = 0
    entries: int = 0
    tensors: int = 0
    differences: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Certified:
    """The chains of all runs, in the order of the comparison. `needs` has an entry for each variant with fair pairs.
    `replays` were drawn with `replay_seed`.
    """

    chains: tuple[Chain, ...]
    nulls: tuple[Null, ...] = ()
    needs: tuple[SeedsNeeded, ...] = ()
    replays: tuple[Replay, ...] = ()
    replay_seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the fields of the links."""
        return {
            "chains": [{"run": one.label, "sha256": one.head, "ended": one.ended} for one in self.chains],
            "nulls": [{**asdict(one), "largest": one.largest} for one in self.nulls],
            "seeds_needed": [asdict(one) for one in self.needs],
            "replays": [asdict(one) for one in self.replays],
            "replay_seed": self.replay_seed,
        }
