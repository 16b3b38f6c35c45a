"""Who failed first, judged from what the ranks of a start left behind.

When one rank dies, the connections of the others break, and they fail of that: a broken connection is a consequence and
never the cause. So the cause is, in this order: a rank that reported its own error; a rank that another rank
reported; a rank that left no file, where others lost their connection to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_OWN_KIND = re.compile(r"[a-z][a-z ]* error: ")
"""How the line of a KhaError begins: it tells what happened, also where that was a connection to a data store."""
_OF_ANOTHER = re.compile(r"(?:[a-z][a-z ]* error: )?rank (\d+): ")
"""How an error begins that all ranks agreed on, on the ranks that it did not happen to."""
_BROKEN = re.compile(
    r"connection (was |is )?(reset|closed|refused|aborted|lost)|broken pipe|(closed|reset|terminated) by (remote )?peer"
    r"|socket (is )?(closed|timeout)|Timed out waiting \d+ ?ms|timed out after \d+ ?ms|pair closure|connectFullMesh"
    r"|nccl(Remote|System)Error|remote process exit|NCCL communicator was aborted|collective operation timeout"
    r"|(recv|send)\w* (bytes )?failed|DistNetworkError",
    re.IGNORECASE,
)
"""What gloo, NCCL and torch's store say when the process at the other end is gone."""


def is_consequence(error: str) -> bool:
    """Whether the error of a rank only says that it lost its connection to another one."""
    return _OWN_KIND.match(error) is None and _BROKEN.search(error) is not None


def blame(
    failures: Sequence[Mapping[str, Any]], ranks: int, last_seen: Mapping[int, float], *, ended: bool = False
) -> dict[str, Any] | None:
    """The failure that began it all: rank, time, error, traceback. None where nothing is known to have failed.

    `failures` are what ranks wrote (`rank`, `time`, `error`, `traceback`, and `about`: the rank they tell of), `ranks`
    is how many there were (0: unknown), `last_seen` when each was heard of last, in seconds of one clock. That no rank
    wrote anything means something only when all of them have `ended`.
    """
    by_time = sorted(failures, key=lambda failure: failure["time"])
    told = [failure for failure in by_time if _about(failure) != failure["rank"]]
    own = [failure for failure in by_time if failure not in told and not is_consequence(failure["error"])]
    if own:
        return dict(own[0])
    if told:
        first = told[0]
        return {**first, "rank": _about(first), "error": f"rank {first['rank']} tells: {first['error']}"}
    if not (by_time or ended):
        return None
    wrote = {failure["rank"] for failure in by_time}
    silent = sorted(set(range(ranks)) - wrote, key=lambda rank: (last_seen.get(rank, float("-inf")), rank))
    if silent:
        return _silent(silent, by_time, last_seen)
    if not by_time:
        return None
    first = dict(by_time[0])
    return first | {"error": f"no rank tells a cause; its connection to another one broke: {first['error']}"}


def _about(failure: Mapping[str, Any]) -> int:
    """The rank whose failure it tells."""
    told = _OF_ANOTHER.match(failure["error"])
    return int(told[1]) if told else failure.get("about", failure["rank"])


def _first_clause(error: str) -> str:
    """What a library said first, without its advice and the place in its source; no longer than a note may be."""
    text = re.sub(r"\[\S*\.(cc|cpp|h):\d+\] *", "", error.partition("\n")[0])
    clause = re.split(r"(?<=\w)[.;!?](?: |$)", text, maxsplit=1)[0].strip()
    return clause if len(clause) <= 160 else f"{clause[:157]}..."


def _silent(silent: Sequence[int], lost: Sequence[Mapping[str, Any]], last_seen: Mapping[int, float]) -> dict[str, Any]:
    """What is known of ranks that wrote nothing, the one heard of least recently first."""
    error = "died without a word: killed from outside (out of memory, kill -9) or crashed below Python"
    others = ", ".join(map(str, silent[1:9])) + (", ..." if len(silent) > 9 else "")
    error += f"; nothing was heard from rank {others} either" if others else ""
    if lost:
        error += f"; rank {lost[0]['rank']} lost its connection: {_first_clause(lost[0]['error'])}"
    time = lost[0]["time"] if lost else last_seen.get(silent[0], 0.0)
    return {"rank": silent[0], "time": time, "error": error, "traceback": ""}
