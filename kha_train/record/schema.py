"""The fields of the files of a run directory that the code reads. Fields added by a later release are kept."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired, TypedDict

from kha_train.config.saved import SavedConfig
from kha_train.foreign.typed import LARGEST, Absent, Count, Length, Match, Range, Source
from kha_train.record.metrics import COUNTED, EARLIER

RUN_FORMAT = 1
"""The version of run.json that this code writes; later versions are refused."""
COUNTS = frozenset(name for name, metric in EARLIER.items() if metric.unit in COUNTED)
"""Keys of a metrics line whose values are counts."""
WHOLE = ("step", "attempt", "tokens", "samples_first", "samples_last")
"""The keys that are used as integers."""

Ranks = Annotated[int, Range(1, 2**31)]
Window = Annotated[list[Count], Length(2)]


class Parameters(TypedDict, total=False):
    """The number of trained parameters, and of parameters active per token."""

    total: float
    active: float


class Provenance(TypedDict, total=False):
    """Facts of the first attempt that comparison and resume read; the file holds more, for people."""

    command: str
    data_content_id: str | None
    validation_content_id: str | None
    validation_rows: Count | None
    attention_backend: str
    kernels: str
    parameters: Parameters | float | None


class Whole(TypedDict):
    """A configuration as it was saved."""

    whole: SavedConfig


class Like(TypedDict):
    """A configuration as the difference from that of attempt `like`, by dotted keys."""

    like: Count
    changed: dict[str, Any]
    without: list[str]


class AttemptEntry(TypedDict):
    """One attempt of the run. `ended` and `end_step` are absent while it runs, `config` in older releases. An attempt
    without its state is lost.
    """

    attempt: Count
    start_step: Annotated[Count, Absent(0)]
    world_size: NotRequired[Ranks]
    started: NotRequired[float]
    state: Annotated[str, Absent("lost")]
    changed: Annotated[Provenance, Absent({})]
    ended: NotRequired[float]
    end_step: NotRequired[Count]
    config: NotRequired[Whole | Like]


class Declared(TypedDict):
    """What a run said of one of its metrics."""

    unit: str
    meaning: str
    timing: Annotated[bool, Absent(False)]
    mirrored: Annotated[bool, Absent(True)]


class Parent(TypedDict):
    """The run that a branch goes on from: its id, and step, SHA-256 of the manifest and place of the checkpoint.
    `ancestors` are the runs before it, the first one first, each with the step at which the next one left it and the
    SHA-256 of that checkpoint's manifest, if it was recorded."""

    run_id: str
    step: Count
    manifest: str
    checkpoint: str
    ancestors: list[tuple[str, Count, str] | tuple[str, Count]]


class RunFile(TypedDict):
    """The fields of `run.json` that readers need."""

    format: Annotated[int, Absent(1)]
    parent: NotRequired[Parent]
    created: NotRequired[float]
    provenance: Annotated[Provenance, Absent({})]
    attempts: list[AttemptEntry]
    metrics: NotRequired[dict[str, Declared]]
    startup_seconds: NotRequired[dict[str, Any]]
    spikes: NotRequired[dict[str, Any]]
    goodput: NotRequired[dict[str, Any]]


class OwnRunFile(RunFile):
    """The fields of `run.json` that a start needs to continue the run."""

    run_id: str
    wandb_id: str


class Owner(TypedDict, total=False):
    """`owner.json`; every field may be absent."""

    token: str
    process: int
    host: str
    boot: str
    pids: str
    job: str
    restart: Annotated[str, Match(r"[0-9]{0,9}")]
    beat: int


class Failure(TypedDict):
    """`errors/rank-RRRRR.json`. `about` is the rank to blame, if it is another one."""

    rank: Count
    time: float
    error: str
    traceback: Annotated[str, Absent("")]
    about: NotRequired[Count]


class Rewind(TypedDict):
    """`.metrics.rewind.json`."""

    id: str
    step: Count
    lines: Count
    metrics_size: Count
    discarded_size: Count
    note: dict[str, Any]


class Happening(TypedDict):
    """A line of `events.jsonl`; fields of particular kinds follow below."""

    id: Annotated[str, Absent("")]
    kind: str
    step: Annotated[Count, Absent(0)]
    attempt: Annotated[Count, Absent(0)]
    time: Annotated[float, Absent(0.0)]
    samples_first: NotRequired[Annotated[int, Range(-1, LARGEST)]]


class Save(TypedDict):
    """Fields of `checkpoint_saved`."""

    stall_seconds: Annotated[float, Absent(0.0)]


class Back(TypedDict):
    """Fields of `rewind`."""

    window: NotRequired[Window]


class Branched(TypedDict):
    """Of `branched`."""

    skip_windows: NotRequired[list[Window]]


class Routed(TypedDict):
    """The statistics of one layer's router."""

    maxvio: float
    busiest: float
    dead: float
    bias_min: float
    bias_max: float


class Met(TypedDict):
    """A parameter of an interaction."""

    norm: float
    from_identity: NotRequired[float]


class Evidence(TypedDict, total=False):
    """What the probe measured in the model when a spike opened."""

    grad_norms: dict[str, float]
    max_logits: list[float]
    router: list[Routed]
    interactions: dict[str, Met]


class Opened(TypedDict):
    """Fields of `spike_opened`."""

    evidence: Annotated[Evidence, Absent({})]
    loss: NotRequired[float]
    baseline: NotRequired[float]
    z: NotRequired[float]


class Closed(TypedDict):
    """Fields of `spike_closed`."""

    start_step: NotRequired[Count]
    end_step: NotRequired[Count]


FURTHER: dict[str, Any] = {
    "checkpoint_saved": Save,
    "rewind": Back,
    "branched": Branched,
    "spike_opened": Opened,
    "spike_closed": Closed,
}
"""Kind of an event -> the fields the code reads besides the common ones."""


def check_metrics(lines: list[dict[str, Any]], path: str, first: int = 1, before: int = 0) -> None:
    """Raises DataError when a line has no step, steps do not increase, or a metric is not a number.

    Checks every value of every line once; metrics that this release does not know may hold anything. The first of
    `lines` is line `first` of the file, and the line above it has step `before`.
    """
    for number, line in enumerate(lines, start=first):
        step = line.get("step")
        if type(step) is not int or not before < step <= LARGEST:
            allowed = f"an integer above {before}, the step of the line before"
            shown = "missing" if step is None else "is not a step" if type(step) is not int else "does not increase"
            raise Source(f"{path}:{number}").fault("step", shown, step, allowed)
        before = step
        check_numbers(line, path, number)


def check_numbers(line: dict[str, Any], path: str, number: int) -> None:
    """Raises DataError when a metric that this release knows is not a number in line `number` of the file `path`."""
    for key, value in line.items():
        kind = type(value)
        # The difference is not 0 where the value is not a finite number.
        if (kind is float and value - value == 0.0) or (kind is int and -LARGEST <= value <= LARGEST):
            continue
        if kind is float and key not in COUNTS:
            continue
        if key in EARLIER and not _is_list_of_numbers(key, value):
            allowed = "a list of numbers" if key.endswith("_by_layer") else 'a number, or "nan", "inf", "-inf"'
            shown = "null" if value is None else value
            raise Source(f"{path}:{number}").fault(
                key, "is not a number", shown, "a finite one" if kind is float else allowed
            )
    for key in WHOLE:
        if type(line.get(key, 0)) is not int:
            raise Source(f"{path}:{number}").fault(key, "is not an integer", line[key])


def check_events(events: list[dict[str, Any]], path: str) -> list[dict[str, Any]]:
    """The events, completed with what older releases left out. Raises DataError for an event that lacks a common
    field.
    """
    checked = []
    for number, event in enumerate(events, start=1):
        # A record has few kinds of events, but may have very many of one kind, so common fields are checked together.
        kind, samples = event.get("kind"), event.get("samples_first", 0)
        further = FURTHER.get(kind) if type(kind) is str else None
        types = tuple(map(type, (kind, samples, *map(event.get, _EVENT_HEAD))))
        if further is None and types == _EVENT_TYPES and _in_range(event["step"], event["attempt"], samples):
            checked.append(event)
            continue
        source = Source(f"{path}:{number}")
        found: dict[str, Any] = {**source.read(Happening, event)}
        checked.append(source.read(further, found) if further else found)
    return checked


def _in_range(step: int, attempt: int, samples: int) -> bool:
    return 0 <= step <= LARGEST and 0 <= attempt <= LARGEST and -1 <= samples <= LARGEST


_NUMBERS = frozenset((int, float))
_EVENT_HEAD = ("id", "step", "attempt", "time")
_EVENT_TYPES = (str, int, str, int, int, float)


class Undone(TypedDict):
    """A line of `metrics.discarded.jsonl`, besides its metrics."""

    step: Count
    attempt: Annotated[Count, Absent(0)]
    discarded_reason: Annotated[str, Absent("")]
    discarded_by_attempt: Annotated[Count, Absent(0)]


def check_discarded(lines: list[dict[str, Any]], path: str) -> list[dict[str, Any]]:
    """The lines, completed with what older releases left out. Raises DataError for one without a step, or with a metric
    that is not a number.
    """
    for number, line in enumerate(lines, start=1):
        check_numbers(line, path, number)
    return [{**Source(f"{path}:{number}").read(Undone, line)} for number, line in enumerate(lines, start=1)]


def _is_list_of_numbers(key: str, value: Any) -> bool:
    return key[-9:] == "_by_layer" and isinstance(value, list) and _NUMBERS.issuperset(map(type, value))
