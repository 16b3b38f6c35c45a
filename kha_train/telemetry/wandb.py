"""The W&B mirror of the record, and the only user of wandb. Training continues whatever fails here."""

from __future__ import annotations

import json
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from kha_train.config.build import to_plain
from kha_train.config.schema import RunConfig
from kha_train.errors import tag
from kha_train.metric import Metric
from kha_train.record import Redactor
from kha_train.record.metrics import record_only
from kha_train.record.schema import Parent
from kha_train.telemetry import backlog
from kha_train.telemetry.guard import Guard
from kha_train.telemetry.server import has_key, is_reachable
from kha_train.telemetry.sinks import Beginning, Sink
from kha_train.telemetry.spike_chart import SPIKE_COLUMNS, spike_chart

MAX_KEYS = 200
"""Maximum number of distinct metric keys sent; further ones stay in the record."""
MARKER = "train/loss_in_spike"
"""The loss of the steps inside a spike, drawn over `train/loss` to mark them."""
HAPPENED = "events/"
"""Prefix before the kind of an event: the loss at the step of the event, a mark on the loss chart."""
MAX_EVENTS = 1000
"""Maximum rows of a table; the record has all of them."""
DEFAULT_HOST = "https://api.wandb.ai"
INIT_SECONDS = 30.0
FINISH_SECONDS = 60.0
TEARDOWN_SECONDS = 5.0
CATCH_UP_ROWS = 20
"""Rows of earlier attempts sent with each step, before the step's own."""
DEFAULT_PROJECT = "kha_train"
OWN_PLACES = {"WANDB_ARTIFACT_DIR": ".artifacts", "WANDB_CACHE_DIR": ".cache", "WANDB_DATA_DIR": ".data"}
OTHER_RUN = ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM")
Asked = Literal["auto", "online", "offline", "disabled"]
Mode = Literal["online", "offline", "disabled"]
OFFLINE, DISABLED = ("offline", "dryrun"), ("disabled", "off", "false", "no", "none", "0")
ONLINE = ("", "auto", "online", "run", "shared", "on", "true", "yes", "1")
"""Values of WANDB_MODE that mean online, in any case."""

Sent = tuple[int, dict[str, Any]]
"""A row's number and its values."""


class WandbMirror(Sink):
    """Sends every metrics line to one W&B run that all attempts continue.

    The x-axes are our own `step` and `tokens`. W&B's own count cannot go back, so steps computed again after a restart
    or a rewind appear beside the ones they replace; the record has the surviving ones. The count continues from the
    lines of earlier attempts in the record, so that no attempt overwrites another's rows when they are synced. Rows
    that W&B lacks because an attempt was killed are sent first, some with every step.

    `mode` is the mode in use: online, offline (files under `<run_dir>/wandb`, to be sent by `wandb sync`), disabled.
    The run waits for W&B at its start (at most `CONNECT_SECONDS`, `INIT_SECONDS` and `TEARDOWN_SECONDS`) and at its end
    (`FINISH_SECONDS`), never in between.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        wandb_id: str,
        *,
        warn: Callable[[str], None] = print,
        metrics: Iterable[Metric] = (),
        parent: Parent | None = None,
    ) -> None:
        """`wandb_id` is the record's; `warn` receives at most one line if the mirror cannot work as configured. Of
        `metrics`, which the run declares, those that are not mirrored are left out. `parent`, the run that this one
        branched off, is shown with the configuration.
        """
        self._warn, self._record_only, self._parent = warn, record_only(metrics), parent
        self._redactor = Redactor.from_environment()
        self._keys: set[str] = set()
        self._row, self._loss = 0, math.nan
        self._run: Any = None
        _keep_under(run_dir)
        self.mode, reason = safely_chosen_mode(config.telemetry.wandb.mode)
        self._run_dir = run_dir
        self._queue: deque[Sent] = deque()
        self._backlog: Iterator[Sent] = iter(())
        if self.mode != "disabled":
            self._row = backlog.rows_recorded(run_dir)
        for mode in ("online", "offline"):
            if self._run is None and self.mode == mode:
                failure = self._start(config, run_dir, wandb_id)
                if failure:
                    self.mode = "offline" if mode == "online" else "disabled"
                    reason = f"{reason}; then {failure}" if reason and mode == "offline" else failure
        self._catch_up(wandb_id)
        if reason:
            warn(f"W&B is {self.mode}: {self._redactor.text(reason)}{tag('E12')}")

    def step(self, line: dict[str, Any]) -> None:
        """Sends a metrics line at its own step; inside a spike its loss is sent once more, as a marker."""
        self._row, self._loss = self._row + 1, line.get("train/loss", math.nan)
        self._send(_marked(line))

    def event(self, event: dict[str, Any]) -> None:
        """Sends an event of the record: a mark on the loss chart at the last step (a save when it is published)."""
        if event:
            self._send({HAPPENED + event["kind"]: self._loss})

    def spikes(
        self, events: list[dict[str, Any]], actions: list[dict[str, Any]], losses: Sequence[tuple[int, float]]
    ) -> None:
        """The record's summary of the whole run, over all its attempts: the table of its spikes, that of `actions`
        (events of the record), and a chart of the losses (step, loss) with the spikes drawn in.
        """

        def send(run: Any) -> None:
            import wandb

            spikes = [[event[name] for name in SPIKE_COLUMNS] for event in events[-MAX_EVENTS:]]
            done = [
                [one["step"], one["attempt"], one["kind"], str(one.get("reason", one.get("problem", "")))]
                for one in actions[-MAX_EVENTS:]
            ]
            names, lines = spike_chart(events, losses)
            xs, ys = ([[point[axis] for point in line] for line in lines] for axis in (0, 1))
            clean = self._redactor.clean
            shown = {
                "spike/events": wandb.Table(list(SPIKE_COLUMNS), clean(spikes)),
                "spike/actions": wandb.Table(["step", "attempt", "kind", "reason"], clean(done)),
                "spike/on_loss": wandb.plot.line_series(xs, ys, keys=names, title="spikes on the loss", xname="step"),
            }
            run.log(shown, step=self._row)

        self._drain(backlog.MAX_ROWS + len(self._queue))
        self._attempt(send)

    def summary(self, values: dict[str, Any]) -> None:
        """Sets the run's summary values: its results, and the statistics of its spikes."""
        self._attempt(lambda run: run.summary.update(self._redactor.clean(values)))

    def close(self, exit_code: int = 0) -> None:
        """Ends the W&B run, waiting at most `FINISH_SECONDS` for uploads; the rest can be synced later. With an
        `exit_code` other than 0 W&B shows it as failed.
        """
        self._drain(backlog.MAX_ROWS + len(self._queue))
        self._attempt(lambda run: run.finish(exit_code=exit_code))
        if self._run is not None:
            with Guard():
                backlog.note_rows(self._run_dir, self._row)
        self._run = None

    def _start(self, config: RunConfig, run_dir: Path, wandb_id: str) -> str:
        """Opens the run in `self.mode`; returns the reason if it could not."""
        guard = Guard()
        with guard:
            shown = to_plain(config) | ({"parent": self._parent} if self._parent else {})
            self._run = _open_run(config, shown, run_dir, wandb_id, self.mode, self._redactor)
        if guard.reason:
            _tear_down()
        return guard.reason

    def _catch_up(self, wandb_id: str) -> None:
        """Find the rows of earlier attempts that W&B lacks: online by the server's count, offline by the content of the
        files. If neither is known, nothing is sent again.
        """
        if self._run is None:
            return
        guard = Guard()
        with guard:
            held, server_row = backlog.rows_noted(self._run_dir), getattr(self._run, "starting_step", None)
            if self.mode == "offline":
                held = max(held, backlog.rows_in_files(self._run_dir, wandb_id, _row_of))
            elif server_row is not None:
                held = max(0, server_row - 1)
            self._backlog = map(_as_sent, backlog.missing_rows(self._run_dir, held, self._row))
        if guard.reason:
            self._warn(f"W&B: rows of earlier attempts are not sent again: {self._redactor.text(guard.reason)}")

    def _send(self, values: dict[str, Any]) -> None:
        """Log `values` in the row of the last step, after the waiting rows."""
        self._queue.append((self._row, values))
        self._drain(1 + CATCH_UP_ROWS)

    def _drain(self, most: int) -> None:
        """Send up to `most` waiting rows: those of earlier attempts, then this one's."""
        for _ in range(most):
            sent = next(self._backlog, None) or (self._queue.popleft() if self._queue else None)
            if sent is None:
                return
            self._log(*sent)

    def _log(self, row: int, values: dict[str, Any]) -> None:
        """Keys beyond `MAX_KEYS` stay in the record."""
        self._keys |= set(sorted(values.keys() - self._keys - self._record_only)[: MAX_KEYS - len(self._keys)])
        sent = {key: value for key, value in values.items() if key in self._keys}
        self._attempt(lambda run: run.log(self._redactor.clean(sent), step=row))

    def _attempt(self, act: Callable[[Any], Any]) -> None:
        if self._run is None:
            return
        guard = Guard()
        with guard:
            act(self._run)
        if guard.reason:
            self._run, self.mode = None, "disabled"
            self._warn(f"W&B is disabled from here on: {self._redactor.text(guard.reason)}")


def open_sink(beginning: Beginning) -> WandbMirror:
    """The sink `wandb`."""
    run = beginning
    return WandbMirror(run.config, run.run_dir, run.wandb_id, warn=run.warn, metrics=run.metrics, parent=run.parent)


def _as_sent(row: backlog.Row) -> Sent:
    number, line, events = row
    marks = {f"{HAPPENED}{event.get('kind')}": line.get("train/loss", math.nan) for event in events}
    return number, {**_marked(line), **marks}


def _marked(line: dict[str, Any]) -> dict[str, Any]:
    """`line`, with its loss once more inside a spike."""
    return {**line, MARKER: line["train/loss"]} if line.get("spike/open") else line


def _tear_down() -> None:
    """End wandb's service after a failed start: it still holds the run's id, and a second start would be refused for
    that. It has `TEARDOWN_SECONDS`.
    """

    def act() -> None:
        with Guard():
            import wandb

            wandb.teardown()

    thread = threading.Thread(target=act, name="wandb teardown", daemon=True)
    thread.start()
    thread.join(TEARDOWN_SECONDS)


def _row_of(record: bytes) -> int | None:
    """The row of a record of a `.wandb` file; None when it is not part of the history. Raises what protobuf raises."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made when it is imported

    content = Record.FromString(record)
    if content.WhichOneof("record_type") != "history":
        return None
    named = {item.key or "/".join(item.nested_key): item.value_json for item in content.history.item}
    return int(json.loads(named["_step"])) if "_step" in named else None


def safely_chosen_mode(asked: Asked) -> tuple[Mode, str]:
    """`choose_mode`, or offline if that fails: a strange address, a home or netrc file that cannot be read."""
    guard = Guard()
    with guard:
        return choose_mode(asked)
    return "offline", guard.reason


def choose_mode(asked: Asked) -> tuple[Mode, str]:
    """(mode, why it is not the requested one) from the configured mode, the user's wandb settings, the key and the
    network. A configured mode other than auto overrides the user's settings, as in `wandb.init(mode=...)`.
    """
    reason = ""
    wanted, unknown = _mode_of_environment()
    if asked == "auto":
        asked, reason = wanted or _mode_of_settings(), unknown
    if asked == "offline" or asked == "disabled":
        return asked, reason
    address = os.environ.get("WANDB_BASE_URL") or getattr(_user_settings(), "base_url", None) or DEFAULT_HOST
    if not has_key(address):
        return "offline", "there is no API key (`wandb login` makes one); `wandb sync` sends the files later"
    if not is_reachable(address):
        return "offline", f"{address} cannot be reached; `wandb sync` sends the files later"
    return "online", ""


def _mode_of_environment() -> tuple[Literal["offline", "disabled", ""], str]:
    """The mode requested by WANDB_MODE and WANDB_DISABLED: offline, disabled or "" (none), and what is wrong with them.
    An unknown word means offline. WANDB_MODE is normalised to wandb's own spelling.
    """
    word = os.environ.get("WANDB_MODE", "").strip().lower()
    denied = os.environ.get("WANDB_DISABLED", "").strip().lower() not in ("", "0", "false", "no", "off")
    disabled = denied or word in DISABLED
    unknown = word not in (*OFFLINE, *DISABLED, *ONLINE)
    mode: Literal["offline", "disabled", ""] = (
        "disabled" if disabled else "offline" if unknown or word in OFFLINE else ""
    )
    if "WANDB_MODE" in os.environ:
        os.environ["WANDB_MODE"] = mode or "online"
    return mode, f"WANDB_MODE={word} is not a mode" if unknown else ""


def _mode_of_settings() -> Asked:
    """The mode set by `wandb offline` and `wandb disabled` for this user and directory; "auto" where there is none."""
    settings = _user_settings()
    mode = "auto" if settings is None else str(settings.mode).lower()
    return "offline" if mode in OFFLINE else "disabled" if mode in DISABLED else "auto"


def _user_settings() -> Any:
    """wandb's own settings, from its files and variables; None where this wandb version does not offer them. Raises
    what wandb raises when it cannot read them.
    """
    # wandb's own error reports would delay the end of the process by 20 seconds if the server does not answer.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    setup = getattr(wandb, "setup", None)
    return setup(settings=wandb.Settings(silent=True)).settings if setup else None


def _keep_under(run_dir: Path) -> None:
    """Have wandb stage its tables and keep its caches in the run directory, unless the user chose other places: a home
    directory may not be writable. The record decides which run it is: variables for another run, such as those of a
    shell that once resumed something else, are ignored.
    """
    for name in OTHER_RUN:
        os.environ.pop(name, None)
    for name, folder in OWN_PLACES.items():
        given = os.environ.get(name, "")
        if not given or given.endswith(f"/wandb/{folder}"):
            os.environ[name] = str(run_dir.resolve() / "wandb" / folder)


def _open_run(
    config: RunConfig, shown: dict[str, Any], run_dir: Path, wandb_id: str, mode: Mode, redactor: Redactor
) -> Any:
    import wandb

    wanted: dict[str, Any] = {
        "silent": True,
        "console": "off",
        "save_code": False,
        "disable_git": True,
        "disable_code": True,
        "x_disable_meta": True,
        "x_disable_machine_info": True,
        "x_disable_stats": True,
        "init_timeout": INIT_SECONDS,
        "finish_timeout": FINISH_SECONDS,
    }
    # Settings differ between versions of wandb; an unknown one would be an error.
    known = {name: value for name, value in wanted.items() if name in wandb.Settings.model_fields}
    section = config.telemetry.wandb
    # WANDB_PROJECT, or that of `wandb init`, unless the configuration differs from its default.
    theirs = getattr(_user_settings(), "project", None)
    run = wandb.init(
        id=wandb_id,
        resume="allow",
        mode=mode,
        dir=str(run_dir),
        project=section.project if section.project != DEFAULT_PROJECT or not theirs else theirs,
        entity=section.entity or None,
        group=redactor.text(section.group) or None,
        job_type="train",
        name=redactor.text(config.run.name),
        tags=redactor.clean([config.attention.name, f"seed {config.run.seed}", *section.tags]),
        config=redactor.clean(shown),
        settings=wandb.Settings(**known),
    )
    run.define_metric("step")
    run.define_metric("tokens")
    run.define_metric("train/*", step_metric="step")
    for group in ("moe", "spike", "attn", "kha", "data", "memory", "checkpoint", "events"):
        run.define_metric(f"{group}/*", step_metric="step")
    for group in ("validation", "evaluation"):
        run.define_metric(f"{group}/*", step_metric="tokens")
    return run
