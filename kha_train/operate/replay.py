"""Recomputes random stretches of runs, and compares record and checkpoint with what was saved, bit for bit."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kha_train.analysis.certify.certified import Bar, Replay
from kha_train.analysis.runs import RunData
from kha_train.checkpoint.compare import compare
from kha_train.checkpoint.hold import held
from kha_train.checkpoint.reader import Checkpoint, directory_of, verify
from kha_train.config.build import flatten
from kha_train.errors import KhaError
from kha_train.operate.stretch import Launch, Stretch, compute, in_processes, stretches
from kha_train.record import declared_in, read_metrics, read_run, timing_keys
from kha_train.record.jsonl import encode
from kha_train.record.provenance import collect_provenance
from kha_train.record.reader import METRICS_FILE

OF_ANOTHER_RUN = ("config.", "branch.")
"""Parts of a trainer's state that say which run it belongs to; another directory has others."""
SAME_SOFTWARE = ("versions.", "python", "git.commit", "detector", "host.machine", "host.cpus")
"""Facts, or the beginnings of their names, that may explain why numbers differ."""
MOST_NAMED = 8
"""Differences that are named."""


def replay_runs(
    runs: Sequence[RunData],
    count: int,
    seed: int,
    tell: Callable[[str], None],
    bar: Bar,
    launch: Launch = in_processes,
) -> tuple[Replay, ...]:
    """Replay `count` stretches, drawn without repetition from all that can be computed here, by `random.Random(seed)`.
    A run with other stretches, or with none, is reported with the reason. `tell` receives a line about each.

    Raises as `read_metrics`.
    """
    found = {run.path: stretches(run) for run in runs}
    possible = [one for each in found.values() for one in each if not one.obstacle]
    chosen = random.Random(seed).sample(possible, min(count, len(possible)))
    replays = []
    for number, stretch in enumerate(chosen, start=1):
        tell(f"replaying {stretch.words} ({number} of {len(chosen)})")
        with bar(stretch.words, stretch.last - stretch.first) as advance:
            replays.append(_replay(stretch, launch, advance))
    for run in runs:
        if reason := _left_out(found[run.path]):
            replays.append(Replay(run.label, 0, 0, "not replayed", reason=reason))
    return tuple(replays)


def _left_out(of_run: Sequence[Stretch]) -> str:
    """Why stretches of a run were not drawn from; "" where all were."""
    blocked = [one.obstacle for one in of_run if one.obstacle]
    reasons = "; ".join(dict.fromkeys(blocked))
    if len(blocked) == len(of_run):
        return reasons or "it has no checkpoint"
    return f"{len(blocked)} of {len(of_run)} stretches: {reasons}" if blocked else ""


def _replay(stretch: Stretch, launch: Launch, advance: Callable[[int], None]) -> Replay:
    assert stretch.target is not None
    with tempfile.TemporaryDirectory(prefix="kha-replay-") as place, ExitStack() as holds:
        try:
            for directory in filter(None, (stretch.source, stretch.target)):
                holds.enter_context(held(directory))
            before = Checkpoint(stretch.target, verify(stretch.target))
            again = compute(stretch, Path(place), launch, advance)
            directory = directory_of(again)
            now = Checkpoint(directory, verify(directory))
        except (KhaError, OSError) as error:
            return Replay(stretch.run.label, stretch.first, stretch.last, "not replayed", reason=str(error))
        lines, entries, told = compare_lines(stretch, again)
        tensors, differing = _compare_checkpoints(before, now)
    told += differing
    return Replay(
        stretch.run.label,
        stretch.first,
        stretch.last,
        "differs" if told else "equal",
        lines=lines,
        entries=entries,
        tensors=tensors,
        differences=most_named(told),
        reason=_other_software(stretch) if told else "",
    )


def most_named(told: Sequence[str]) -> tuple[str, ...]:
    """The first `MOST_NAMED` differences, and how many more there are."""
    more = len(told) - MOST_NAMED
    return (*told[:MOST_NAMED], *([f"{more} more"] if more > 0 else []))


def compare_lines(stretch: Stretch, again: Path) -> tuple[int, int, list[str]]:
    """(lines, entries compared, every difference in words). Entries declared as timings are left out, and entries that
    the release of the run did not record."""
    before = stretch.run.columns.lines(stretch.run.path / METRICS_FILE, stretch.first + 1, stretch.last)
    now = {line["step"]: line for line in read_metrics(again)}
    own = read_run(again)
    # What this release declares holds: the run's own word could hide an entry.
    timings = timing_keys(own) | timing_keys(stretch.run.run) - declared_in(own).keys()
    entries, told = 0, []
    for line in before:
        other = now.get(line["step"], {})
        kept = [key for key in line if key not in timings]
        entries += len(kept)
        differing = [key for key in kept if key not in other or _exact(line[key]) != _exact(other[key])]
        told += [f"step {line['step']}: {key} is {other.get(key)}, recorded {line[key]}" for key in differing]
    return len(before), entries, told


def _exact(value: Any) -> str:
    """One text for each value: floats by the shortest digits that read back, nan as a word."""
    return json.dumps(encode(value), sort_keys=True)


def _compare_checkpoints(before: Checkpoint, now: Checkpoint) -> tuple[int, list[str]]:
    """(tensors compared, every difference in words): files of tensors by SHA-256, then the trainer's state."""
    contents = before.manifest.contents
    tensors = sum(len(entry.pieces) for entry in contents.parameters.values()) + len(contents.buffers)
    hashes = [
        {name: entry.sha256 for name, entry in one.manifest.contents.files.items() if name.endswith(".safetensors")}
        for one in (before, now)
    ]
    found = compare(before, now)
    told = [f"checkpoint: {name} differs by up to {most:g}" for name, (most, _) in found.tensors.items()]
    told += [f"checkpoint: {name} is in one alone" for name in (*found.only_first, *found.only_second)]
    if hashes[0] != hashes[1] and not told:
        told.append("checkpoint: the bytes of the tensor files differ")
    state = {key: both for key, both in found.settings.items() if not key.startswith(OF_ANOTHER_RUN)}
    # nan differs from itself.
    state = {key: both for key, both in state.items() if _exact(both[0]) != _exact(both[1])}
    told += [f"checkpoint: {key} is {theirs}, saved {ours}" for key, (ours, theirs) in state.items()]
    return tensors, told


def _other_software(stretch: Stretch) -> str:
    """How this machine differs from the one that made the lines, in words."""
    assert stretch.attempt is not None
    before, now = flatten(stretch.attempt.facts), flatten(collect_provenance())
    keys = [key for key in (*before, *now) if key.startswith(SAME_SOFTWARE)]
    told = [
        f"{key} {now.get(key)}, then {before.get(key)}"
        for key in dict.fromkeys(keys)
        if before.get(key) != now.get(key)
    ]
    return f"other software or machine: {'; '.join(told)}" if told else ""
