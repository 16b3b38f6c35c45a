"""The W&B mirror of the record, and the only user of wandb. Whatever goes wrong here, training goes on."""

from __future__ import annotations

import math
import netrc
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kha_train.config.build import to_plain
from kha_train.config.schema import RunConfig
from kha_train.record import RECORD_ONLY, Redactor, read_discarded, read_metrics
from kha_train.record.labels import distinct

MAX_KEYS = 200
"""Distinct metric keys sent; further ones stay in the record only."""
MARKER = "train/loss_in_spike"
"""The loss of the steps inside a spike: drawn over `train/loss`, it marks them."""
HAPPENED = "events/"
"""Before the kind of an event: the loss of the step at which it happened, a mark on the loss chart."""
SPIKE_COLUMNS = (
    "start_step", "class", "width", "height", "area", "tokens", "lr", "gnorm_peak_ratio", "nonfinite_steps",
    "recovered", "samples_first", "samples_last",
)  # fmt: skip
MAX_EVENTS = 1000
"""Rows of a table; the record has all of them."""
CHART_POINTS, CHART_SPIKES = 2000, 50
"""Points of the loss in the chart of spikes, and spikes in it, the highest."""
DEFAULT_HOST = "https://api.wandb.ai"
CONNECT_SECONDS = 3.0
INIT_SECONDS = 30.0
FINISH_SECONDS = 60.0


class WandbMirror:
    """Sends every metrics line to one W&B run that all attempts continue.

    The x-axes are our own `step` and `tokens`. W&B's own count cannot go back: steps computed again after a restart or
    a rewind appear beside the ones they replace. The record has the surviving ones. That count goes on from the lines
    that the record holds of earlier attempts, so that no attempt overwrites another's rows when they are synced.

    `mode` is what it came to: online, offline (files under `<run_dir>/wandb`, to be sent by `wandb sync`), disabled.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        wandb_id: str,
        *,
        rank: int = 0,
        warn: Callable[[str], None] = print,
    ) -> None:
        """`wandb_id` is the record's; `warn` receives at most one line if the mirror cannot do what was asked."""
        self._warn = warn
        self._redactor = Redactor.from_environment()
        self._keys: set[str] = set()
        self._row, self._loss = 0, math.nan
        self._run: Any = None
        self.mode, reason = _safely_chosen_mode(config.telemetry.wandb.mode) if rank == 0 else ("disabled", "")
        if self.mode != "disabled":
            self._row = len(read_metrics(run_dir)) + len(read_discarded(run_dir))
        for mode in ("online", "offline"):
            if self._run is None and self.mode == mode:
                failure = self._start(config, run_dir, wandb_id)
                if failure:
                    self.mode = "offline" if mode == "online" else "disabled"
                    reason = failure
        if reason and rank == 0:
            warn(f"W&B is {self.mode}: {self._redactor.text(reason)}")

    def step(self, line: dict[str, Any]) -> None:
        """Mirrors a metrics line at its own step; inside a spike its loss is sent once more, as a marker."""
        if line.get("spike/open"):
            line = {**line, MARKER: line["train/loss"]}
        self._row, self._loss = self._row + 1, line.get("train/loss", math.nan)
        self._send(line)

    def event(self, event: dict[str, Any]) -> None:
        """Mirrors an event of the record: a mark on the loss chart at the last step (a save is told when it stands)."""
        if event:
            self._send({HAPPENED + event["kind"]: self._loss})

    def spikes(
        self, events: list[dict[str, Any]], actions: list[dict[str, Any]], losses: Sequence[tuple[int, float]]
    ) -> None:
        """What the record says of the whole run, over all its attempts: the table of its spikes, that of `actions`
        (events of the record), and a chart of the losses (step, loss) with the spikes drawn in."""

        def send(run: Any) -> None:
            import wandb

            spikes = [[event[name] for name in SPIKE_COLUMNS] for event in events[-MAX_EVENTS:]]
            done = [
                [one["step"], one["attempt"], one["kind"], str(one.get("reason", one.get("problem", "")))]
                for one in actions[-MAX_EVENTS:]
            ]
            names, lines = _chart(events, losses)
            xs, ys = ([[point[axis] for point in line] for line in lines] for axis in (0, 1))
            clean = self._redactor.clean
            shown = {
                "spike/events": wandb.Table(list(SPIKE_COLUMNS), clean(spikes)),
                "spike/actions": wandb.Table(["step", "attempt", "kind", "reason"], clean(done)),
                "spike/on_loss": wandb.plot.line_series(xs, ys, keys=names, title="spikes on the loss", xname="step"),
            }
            run.log(shown, step=self._row)

        self._attempt(send)

    def summary(self, values: dict[str, Any]) -> None:
        """Sets the run's summary values: what it reached, and the statistics of its spikes."""
        self._attempt(lambda run: run.summary.update(self._redactor.clean(values)))

    def close(self, exit_code: int = 0) -> None:
        """Ends the W&B run, waiting at most `FINISH_SECONDS` for uploads; what is left can be synced later. With
        another `exit_code` than 0 W&B shows it as failed."""
        self._attempt(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _start(self, config: RunConfig, run_dir: Path, wandb_id: str) -> str:
        """Opens the run in `self.mode`; the reason when it could not."""
        guard = _Guard()
        with guard:
            self._run = _open_run(config, run_dir, wandb_id, self.mode, self._redactor)
        return guard.reason

    def _send(self, values: dict[str, Any]) -> None:
        """Log `values` in the row of the last step; keys beyond `MAX_KEYS` stay in the record."""
        self._keys |= set(sorted(values.keys() - self._keys - RECORD_ONLY)[: MAX_KEYS - len(self._keys)])
        sent = {key: value for key, value in values.items() if key in self._keys}
        self._attempt(lambda run: run.log(self._redactor.clean(sent), step=self._row))

    def _attempt(self, act: Callable[[Any], Any]) -> None:
        if self._run is None:
            return
        guard = _Guard()
        with guard:
            act(self._run)
        if guard.reason:
            self._run, self.mode = None, "disabled"
            self._warn(f"W&B is disabled from here on: {self._redactor.text(guard.reason)}")


class _Guard:
    """Swallows any error of the block and keeps its text: a mirror has no error worth a run.

    wandb documents no complete list of what it raises, so no narrower rule would keep the promise. KeyboardInterrupt
    and SystemExit pass.
    """

    reason = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if isinstance(error, Exception):
            self.reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
            return True
        return False


def _safely_chosen_mode(asked: str) -> tuple[str, str]:
    """`choose_mode`, or offline where it cannot tell: a strange address, a home or netrc file that cannot be read."""
    guard = _Guard()
    with guard:
        return choose_mode(asked)
    return "offline", guard.reason


def _chart(
    events: list[dict[str, Any]], losses: Sequence[tuple[int, float]]
) -> tuple[list[str], list[list[tuple[int, float]]]]:
    """Names and points of the lines of a loss chart: the loss, thinned out, and each of the highest spikes in full."""
    finite = [(step, loss) for step, loss in losses if math.isfinite(loss)]
    names, details, lines = ["train/loss"], [""], [finite[:: -(-len(finite) // CHART_POINTS) or 1]]
    highest = sorted(events, key=lambda event: event["height"], reverse=True)[:CHART_SPIKES]
    for event in sorted(highest, key=lambda event: event["start_step"]):
        inside = [point for point in finite if event["start_step"] <= point[0] <= event["end_step"]]
        names.append(f"{event['class']} at step {event['start_step']}")
        details.append("rewound" if event.get("rewound") else "kept")
        lines.append(inside[:: -(-len(inside) // CHART_POINTS) or 1])
    # Two events may begin at one step, one of them undone by a rewind; lines of one name would be drawn as one.
    return distinct(names, details), lines


def choose_mode(asked: str) -> tuple[str, str]:
    """(mode, why it is not what was asked) from the configured mode, WANDB_MODE, the key and the network."""
    if asked == "auto":
        asked = os.environ.get("WANDB_MODE", "auto")
    if asked in ("offline", "disabled"):
        return asked, ""
    address = os.environ.get("WANDB_BASE_URL", DEFAULT_HOST)
    if not has_key(address):
        return "offline", "there is no API key (`wandb login` makes one); `wandb sync` sends the files later"
    if not is_reachable(address):
        return "offline", f"{address} cannot be reached; `wandb sync` sends the files later"
    return "online", ""


def has_key(address: str) -> bool:
    """Whether WANDB_API_KEY or the netrc file holds a key for the server at `address`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return netrc.netrc(path).authenticators(urllib.parse.urlsplit(address).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def is_reachable(address: str) -> bool:
    """Whether a connection to `address`, or to the proxy that leads there, opens within three seconds."""
    server = urllib.parse.urlsplit(address)
    proxy = urllib.request.getproxies().get(server.scheme)
    if proxy and not urllib.request.proxy_bypass(server.hostname or ""):
        server = urllib.parse.urlsplit(proxy)
    port = server.port or (443 if server.scheme == "https" else 80)
    try:
        socket.create_connection((server.hostname, port), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _open_run(config: RunConfig, run_dir: Path, wandb_id: str, mode: str, redactor: Redactor) -> Any:
    import wandb

    wanted = {
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
    # Settings come and go between versions of wandb; an unknown one would be an error.
    known = {name: value for name, value in wanted.items() if name in wandb.Settings.model_fields}
    section = config.telemetry.wandb
    run = wandb.init(
        id=wandb_id,
        resume="allow",
        mode=mode,
        dir=str(run_dir),
        project=section.project,
        entity=section.entity or None,
        group=redactor.text(section.group) or None,
        job_type="train",
        name=redactor.text(config.run.name),
        tags=redactor.clean([config.attention.name, f"seed {config.run.seed}", *section.tags]),
        config=redactor.clean(to_plain(config)),
        settings=wandb.Settings(**known),
    )
    run.define_metric("step")
    run.define_metric("tokens")
    run.define_metric("train/*", step_metric="step")
    for group in ("moe", "spike", "attn", "kha", "data", "memory", "checkpoint", "events"):
        run.define_metric(f"{group}/*", step_metric="step")
    run.define_metric("validation/*", step_metric="tokens")
    return run
