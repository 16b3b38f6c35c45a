"""Finds the rank that failed first, from what the ranks of an attempt left behind.

When one rank dies, its connections break and the other ranks fail too: a broken connection is a consequence, never the
cause. So the cause is, in this order: a rank that reported its own error; a rank that another rank reported; a rank
that left no file, if others lost their connection to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_OWN_KIND = re.compile(r"[a-z][a-z ]* error: ")
"""How the line of a KhaError begins. Such an error is a cause, even if it is about a connection to a data store."""
_OF_ANOTHER = re.compile(r"(?:[a-z][a-z ]* error: )?rank (\d+): ")
"""How an error that all ranks agreed on begins on the other ranks."""
_BROKEN = re.compile(
    r"connection (was |is )?(reset|closed|refused|aborted|lost)|broken pipe|(closed|reset|terminated) by (remote )?peer"
    r"|socket (is )?(closed|timeout)|Timed out waiting \d+ ?ms|timed out after \d+ ?ms|pair closure|connectFullMesh"
    r"|nccl(Remote|System)Error|remote process exit|NCCL communicator was aborted|collective operation timeout"
    r"|(recv|send)\w* (bytes )?failed|DistNetworkError",
    re.IGNORECASE,
)
"""Messages of gloo, NCCL and torch's store when the process at the other end is gone."""


def is_consequence(error: str) -> bool:
    """Whether the error of a rank only says that it lost its connection to another rank."""
    return _OWN_KIND.match(error) is None and _BROKEN.search(error) is not None


def blame(
    failures: Sequence[Mapping[str, Any]], ranks: int, last_seen: Mapping[int, float], *, ended: bool = False
) -> dict[str, Any] | None:
    """The first failure: rank, time, error, traceback. None when no failure is known.

    `failures` are what ranks wrote (`rank`, `time`, `error`, `traceback`, and `about`: the rank that the error
    concerns), `ranks` is the number of ranks (0: unknown), `last_seen` is the last sign of life of each, in seconds of
    one clock. The absence of any file means something only when all ranks have `ended`.
    """
    by_time = sorted(failures, key=lambda failure: failure["time"])
    told = [failure for failure in by_time if _about(failure) != failure["rank"]]
    own = [failure for failure in by_time if failure not in told and not is_consequence(failure["error"])]
    if own:
        return dict(own[0])
    if told:
        first = told[0]
        return {**first, "rank": _about(first), "error": f"rank {first['rank']} reports: {first['error']}"}
    if not (by_time or ended):
        return None
    wrote = {failure["rank"] for failure in by_time}
    silent = sorted(set(range(ranks)) - wrote, key=lambda rank: (last_seen.get(rank, float("-inf")), rank))
    if silent:
        return _silent(silent, by_time, last_seen)
    if not by_time:
        return None
    first = dict(by_time[0])
    return first | {"error": f"no rank reports a cause; its connection to another one broke: {first['error']}"}


def _about(failure: Mapping[str, Any]) -> int:
    """The rank whose failure it reports."""
    told = _OF_ANOTHER.match(failure["error"])
    return int(told[1]) if told else failure.get("about", failure["rank"])


def _first_clause(error: str) -> str:
    """The first clause of a library's message, without advice and source location, shortened to the length of a
    note.
    """
    text = re.sub(r"\[\S*\.(cc|cpp|h):\d+\] *", "", error.partition("\n")[0])
    clause = re.split(r"(?<=\w)[.;!?](?: |$)", text, maxsplit=1)[0].strip()
    return clause if len(clause) <= 160 else f"{clause[:157]}..."


def _silent(silent: Sequence[int], lost: Sequence[Mapping[str, Any]], last_seen: Mapping[int, float]) -> dict[str, Any]:
    """The failure of the ranks that wrote nothing, the one heard of least recently first."""
    error = "died without a message: killed from outside (out of memory, kill -9) or crashed below Python"
    others = ", ".join(map(str, silent[1:9])) + (", ..." if len(silent) > 9 else "")
    error += f"; nothing was heard from rank {others} either" if others else ""
    if lost:
        error += f"; rank {lost[0]['rank']} lost its connection: {_first_clause(lost[0]['error'])}"
    time = lost[0]["time"] if lost else last_seen.get(silent[0], 0.0)
    return {"rank": silent[0], "time": time, "error": error, "traceback": ""}
