"""The W&B mirror of the record, and the only user of wandb. Whatever goes wrong here, training goes on."""

from __future__ import annotations

import netrc
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kha_train.config.build import to_plain
from kha_train.config.schema import RunConfig
from kha_train.record import RECORD_ONLY, Redactor

MAX_KEYS = 200
"""Distinct metric keys sent; further ones stay in the record only."""
MARKER = "train/loss_in_spike"
"""The loss of the steps inside a spike: drawn over `train/loss`, it marks them."""
SPIKE_COLUMNS = (
    "start_step", "class", "width", "height", "area", "tokens", "lr", "gnorm_peak_ratio", "nonfinite_steps",
    "recovered", "samples_first", "samples_last",
)  # fmt: skip
MAX_EVENTS = 1000
"""Rows of a table; the record has all of them."""
DEFAULT_HOST = "https://api.wandb.ai"
CONNECT_SECONDS = 3.0
INIT_SECONDS = 30.0
FINISH_SECONDS = 60.0


class WandbMirror:
    """Sends every metrics line to one W&B run that all attempts continue.

    The x-axes are our own `step` and `tokens`, not W&B's count of calls, which cannot go back: steps computed again
    after a restart or a rewind appear beside the ones they replace. The record has the surviving ones.

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
        self._events: list[list[Any]] = []
        self._run: Any = None
        self.mode, reason = choose_mode(config.telemetry.wandb.mode) if rank == 0 else ("disabled", "")
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
        self._keys |= set(sorted(line.keys() - self._keys - RECORD_ONLY)[: MAX_KEYS - len(self._keys)])
        sent = {key: value for key, value in line.items() if key in self._keys}
        self._attempt(lambda run: run.log(self._redactor.clean(sent)))

    def event(self, event: dict[str, Any]) -> None:
        """Mirrors what was done about a spike: its kind and step become a row of the table `events` at the end."""
        if event and len(self._events) < MAX_EVENTS:
            self._events.append([event["step"], event["kind"], str(event.get("reason", ""))])

    def spikes(self, events: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        """The spikes of the whole run as a table, and their statistics in the summary."""

        def send(run: Any) -> None:
            import wandb

            rows = [[event[name] for name in SPIKE_COLUMNS] for event in events[-MAX_EVENTS:]]
            clean = self._redactor.clean
            tables = {
                "spike/events": wandb.Table(list(SPIKE_COLUMNS), clean(rows)),
                "spike/actions": wandb.Table(["step", "kind", "reason"], clean(self._events)),
            }
            run.log(tables)
            named = {name if "/" in name else f"spike/{name}": value for name, value in summary.items()}
            run.summary.update(clean(named))

        self._attempt(send)

    def summary(self, values: dict[str, Any]) -> None:
        """Sets the run's summary values, such as the final validation result."""
        self._attempt(lambda run: run.summary.update(self._redactor.clean(values)))

    def close(self, exit_code: int = 0) -> None:
        """Ends the W&B run, waiting at most `FINISH_SECONDS` for uploads; what is left can be synced later."""
        self._attempt(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _start(self, config: RunConfig, run_dir: Path, wandb_id: str) -> str:
        """Opens the run in `self.mode`; the reason when it could not."""
        guard = _Guard()
        with guard:
            self._run = _open_run(config, run_dir, wandb_id, self.mode, self._redactor)
        return guard.reason

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
        group=section.group or None,
        job_type="train",
        name=config.run.name,
        tags=[config.attention.name, f"seed {config.run.seed}", *section.tags],
        config=redactor.clean(to_plain(config)),
        settings=wandb.Settings(**known),
    )
    run.define_metric("step")
    run.define_metric("tokens")
    run.define_metric("train/*", step_metric="step")
    for group in ("moe", "spike", "attn", "kha", "data", "memory", "checkpoint"):
        run.define_metric(f"{group}/*", step_metric="step")
    run.define_metric("validation/*", step_metric="tokens")
    return run
