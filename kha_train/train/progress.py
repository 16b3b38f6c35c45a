"""The progress of a run, and the trainer's own state in a checkpoint, read with checks of types and consistency."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, NotRequired, TypedDict

from kha_train.checkpoint.fit import refuse_unknown, source_of
from kha_train.checkpoint.reader import Checkpoint
from kha_train.config.saved import SavedConfig
from kha_train.config.schema import RunConfig
from kha_train.data.sampling.skipping import Window, merged
from kha_train.foreign.typed import Count, Range, Source
from kha_train.stability.events import SpikeEvent
from kha_train.train.watch import Watch

CONTENT_IDS = ("data_content_id", "validation_content_id")
FURTHER_IDS = "evaluation_content_ids"
"""The field of trainer.json with the content ids of named validation sets and of tasks, where there are any."""
_NO_STATE = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, AssertionError)
"""Exceptions that detectors raise for a state that they did not write."""


@dataclass(frozen=True)
class Progress:
    """The progress of a run: finished optimiser steps (skipped ones included), samples passed and tokens trained on.

    `samples_seen` is the position of the stream, `skip_windows` the sample numbers [first, last) that it skips.
    """

    step: int = 0
    samples_seen: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    skip_windows: tuple[tuple[int, int], ...] = ()

    def after(self, samples_seen: int, tokens: int, applied: bool) -> Progress:
        """The progress after one more step of `tokens` tokens, which left the stream at `samples_seen`."""
        return replace(
            self,
            step=self.step + 1,
            samples_seen=samples_seen,
            tokens=self.tokens + tokens,
            skipped_steps=self.skipped_steps + (not applied),
        )

    @property
    def next_sample(self) -> int:
        """The first sample of the next step: the position of the stream, or the end of the skip window at that
        position.
        """
        sample = self.samples_seen
        for first, last in sorted(self.skip_windows):
            sample = last if first <= sample < last else sample
        return sample

    @property
    def trained_samples(self) -> int:
        """Samples passed without the skipped ones."""
        skipped = sum(max(0, min(last, self.samples_seen) - first) for first, last in merged(self.skip_windows))
        return self.samples_seen - skipped

    def skipping(self, before: Iterable[Window], now: Iterable[Window]) -> Progress:
        """The same progress, where `data.skip_windows` was `before` and is `now`. What is passed stays passed, and
        windows that a rewind left out stay."""
        kept = {one for one in self.skip_windows if one not in {*before} or one[0] < self.samples_seen}
        ahead = {(max(first, self.samples_seen), last) for first, last in {*now} - kept if last > self.samples_seen}
        return replace(self, skip_windows=tuple(sorted(kept | ahead)))

    def to_plain(self) -> dict[str, Any]:
        """As trainer state, which has lists but no tuples."""
        return {**asdict(self), "skip_windows": [list(window) for window in self.skip_windows]}

    @staticmethod
    def from_plain(values: dict[str, Any]) -> Progress:
        """The inverse of `to_plain`."""
        return Progress(**{**values, "skip_windows": tuple((first, last) for first, last in values["skip_windows"])})


class SavedProgress(TypedDict):
    """The field `progress` of trainer.json."""

    step: Count
    samples_seen: Count
    tokens: Count
    skipped_steps: Count
    skip_windows: list[tuple[Count, Count]]


class SavedAverage(TypedDict):
    """The field `loss_average` of trainer.json: the average that the console shows. Earlier releases did not save
    it.
    """

    sum: Annotated[float, Range(-1e300, 1e300)]
    weight: Annotated[float, Range(0, 1e300)]


class SavedOrigin(TypedDict):
    """`branch` of trainer.json: the checkpoint that the run branched off, by the id of its run, its step and the
    SHA-256 of its manifest; and the samples and tokens trained on by then, for rows may have another length since."""

    run_id: str
    step: Count
    manifest: str
    samples: Count
    tokens: Count


class SavedState(TypedDict):
    """`trainer.json`."""

    progress: SavedProgress
    stability: dict[str, Any]
    optimizer_steps: Count
    data_content_id: NotRequired[str]
    validation_content_id: NotRequired[str]
    evaluation_content_ids: NotRequired[dict[str, str]]
    loss_average: NotRequired[SavedAverage]
    branch: NotRequired[SavedOrigin]
    config: SavedConfig


@dataclass(frozen=True)
class TrainerState:
    """What a checkpoint holds beside tensors. `content_ids` are empty in checkpoints that do not name their data;
    `branch` says where the run branched off another, None where it did not."""

    progress: Progress
    stability: dict[str, Any]
    optimizer_steps: int
    content_ids: dict[str, str]
    config: dict[str, Any]
    branch: SavedOrigin | None = None


def read_state(checkpoint: Checkpoint, row_may_change: bool = False) -> TrainerState:
    """The trainer's state in `checkpoint`; `row_may_change` says that rows of another length may have been read.

    Raises CheckpointError for a field that is missing, has the wrong type, or contradicts the others; FormatError for
    one that this release would drop.
    """
    source = source_of(checkpoint)
    plain = checkpoint.trainer_state
    progress = plain.get("progress")
    refuse_unknown(checkpoint, plain, SavedState.__annotations__, "")
    refuse_unknown(
        checkpoint, progress if isinstance(progress, dict) else {}, SavedProgress.__annotations__, "progress."
    )
    found = source.read(SavedState, plain)
    state = TrainerState(
        Progress.from_plain(dict(found["progress"])),
        found["stability"],
        found["optimizer_steps"],
        {name: plain[name] for name in CONTENT_IDS if name in plain} | found.get("evaluation_content_ids", {}),
        dict(found["config"]),
        found.get("branch"),
    )
    for place, problem, value in _contradictions(state, checkpoint.step, row_may_change):
        raise source.fault(place, problem, value)
    return state


def going_on(state: TrainerState, config: RunConfig) -> Progress:
    """The progress of `state` under the skip windows of `config`."""
    data = state.config.get("data")
    before = data.get("skip_windows") or [] if isinstance(data, dict) else []
    return state.progress.skipping([(first, last) for first, last in before], config.data.skip_windows)


def restore_watch(watch: Watch, checkpoint: Checkpoint, rewound: bool = False) -> None:
    """Restore the detectors of `watch` from `checkpoint`; `rewound` as in `Watch.restore`.

    Raises CheckpointError when the state is malformed, FormatError when a part of it would be dropped.
    """
    source, expected = source_of(checkpoint), watch.state()
    saved = checkpoint.trainer_state["stability"]
    _check_numbers(source, saved, "stability")
    event = _inside(saved, "monitor", "events", "event")
    if event is not None:
        source.read(SpikeEvent, event, "stability.monitor.events.event")
    try:
        watch.restore(saved, rewound)
        now = watch.state()
    except _NO_STATE as error:
        words = f"is not a valid state of the detectors: {type(error).__name__}: {error}"
        raise source.fault("stability", words) from error
    _check_alike(source, now, expected, "stability")
    _check_kept(checkpoint, saved, now, "stability.")


def _contradictions(state: TrainerState, step: int, row_may_change: bool) -> list[tuple[str, str, Any]]:
    """(field, what is wrong with it, its value) for all contradictions among the counts and with the manifest."""
    progress = state.progress
    found: list[tuple[str, str, Any]] = []
    if progress.step != step:
        found.append(("progress.step", f"the manifest says step {step}", progress.step))
    if progress.skipped_steps > progress.step:
        found.append(("progress.skipped_steps", f"of {progress.step} steps", progress.skipped_steps))
    if state.optimizer_steps != progress.step - progress.skipped_steps:
        words = f"expected {progress.step} steps minus {progress.skipped_steps} skipped ones"
        found.append(("optimizer_steps", words, state.optimizer_steps))
    if any(first >= last for first, last in progress.skip_windows):
        found.append(("progress.skip_windows", "a window ends before it begins", str(progress.skip_windows)))
        return found
    trained = progress.trained_samples
    if trained < progress.step or (progress.step == 0) != (trained == 0):
        words = f"{trained} samples outside skip windows in {progress.step} steps"
        found.append(("progress.samples_seen", words, progress.samples_seen))
    row = state.config.get("model", {}).get("seq_len") if isinstance(state.config.get("model"), dict) else None
    samples, tokens = (state.branch["samples"], state.branch["tokens"]) if state.branch else (0, 0)
    if type(row) is int and not row_may_change and progress.tokens != tokens + (trained - samples) * row:
        since = f" after {tokens} tokens of the run it branched off" if state.branch else ""
        words = f"{trained - samples} samples of {row} tokens{since} are expected"
        found.append(("progress.tokens", words, progress.tokens))
    return found


def _check_numbers(source: Source, value: Any, place: str) -> None:
    """Raises CheckpointError for anything but numbers, true, false and null in the state of detectors."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_numbers(source, item, f"{place}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            if isinstance(item, str | dict | list) or item is None:
                raise source.fault(f"{place}[{index}]", "wrong type", item, "a number")
    elif isinstance(value, str):
        raise source.fault(place, "wrong type", value, "a number")


def _inside(state: Any, *keys: str) -> Any:
    """The value at `keys` in nested dicts; None where there is none."""
    for key in keys:
        state = state.get(key) if isinstance(state, dict) else None
    return state


def _check_alike(source: Source, found: Any, expected: Any, place: str) -> None:
    """Raises CheckpointError if the restored state has another structure than a state of these detectors."""
    if isinstance(expected, dict):
        if not isinstance(found, dict):
            # An event may be open or not.
            if found is not None:
                raise source.fault(place, "wrong type", found, "an object")
            return
        for key in expected:
            if key not in found:
                raise source.fault(f"{place}.{key}", "missing")
            _check_alike(source, found[key], expected[key], f"{place}.{key}")
    elif type(expected) is int and (type(found) is not int or found < -(place == "stability.samples_first")):
        raise source.fault(place, "is not a count", found)
    elif type(expected) is float and type(found) not in (int, float):
        raise source.fault(place, "is not a number", found)


def _check_kept(checkpoint: Checkpoint, saved: Any, now: Any, place: str) -> None:
    if isinstance(saved, dict) and isinstance(now, dict):
        refuse_unknown(checkpoint, saved, now, place)
        for key in saved:
            _check_kept(checkpoint, saved[key], now[key], f"{place}{key}.")
