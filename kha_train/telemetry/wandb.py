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
from kha_train.record import Redactor

MAX_KEYS = 200
"""Distinct metric keys sent; further ones stay in the record only."""
DEFAULT_HOST = "https://api.wandb.ai"
CONNECT_SECONDS = 3.0
INIT_SECONDS = 30.0
FINISH_SECONDS = 60.0


class WandbMirror:
    """Sends every metrics line to one W&B run that all attempts continue. Steps replayed after a restart are dropped
    by W&B, which keeps the first value of a step; the record has the surviving one.

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
        """Mirrors a metrics line at its own step."""
        self._keys |= set(sorted(line.keys() - self._keys)[: MAX_KEYS - len(self._keys)])
        sent = {key: value for key, value in line.items() if key in self._keys}
        self._attempt(lambda run: run.log(self._redactor.clean(sent), step=line["step"]))

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
    run.define_metric("moe/*", step_metric="step")
    run.define_metric("validation/*", step_metric="tokens")
    return run
