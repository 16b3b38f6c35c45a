"""The W&B mirror works offline, keeps its id, and never ends a run."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from kha_train.config.compose import compose
from kha_train.metric import Metric
from kha_train.record.metrics import EARLIER
from kha_train.stability.events import SpikeEvent
from kha_train.telemetry import WandbMirror
from kha_train.telemetry import wandb as mirror_module
from kha_train.telemetry.server import has_key, is_reachable
from kha_train.telemetry.wandb import MARKER, MAX_KEYS, choose_mode


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[dict] = []
        self.rows: list[int] = []
        self.axes: dict[str, str | None] = {}
        self.summary: dict = {}
        self.finished: list[int] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, values: dict, step: int) -> None:
        self.logged.append(values)
        self.rows.append(step)

    def finish(self, exit_code: int) -> None:
        self.finished.append(exit_code)


def install(monkeypatch: pytest.MonkeyPatch, init) -> None:
    fake = types.ModuleType("wandb")
    fake.init = init
    fake.Settings = type("Settings", (), {"model_fields": {"silent": None}, "__init__": lambda self, silent: None})
    monkeypatch.setitem(sys.modules, "wandb", fake)


def config(*overrides: str):
    return compose(["run.dir=/nowhere", *overrides])


def test_every_line_is_sent_once_at_its_own_step_with_the_stable_id(monkeypatch, tmp_path: Path) -> None:
    run, seen = FakeRun(), {}
    install(monkeypatch, lambda **options: seen.update(options) or run)
    warnings: list[str] = []
    mirror = WandbMirror(config("telemetry.wandb.mode=offline"), tmp_path, "abc123", warn=warnings.append)
    mirror.step({"step": 7, "tokens": 70, "train/loss": math.nan})
    mirror.summary({"validation/loss": 1.5})
    mirror.close(exit_code=5)
    mirror.step({"step": 8})
    assert (seen["id"], seen["resume"], seen["mode"], seen["dir"]) == ("abc123", "allow", "offline", str(tmp_path))
    assert seen["config"]["run"]["seed"] == 0
    assert [(values["step"], values["tokens"]) for values in run.logged] == [(7, 70)]
    assert run.axes == {
        "step": None,
        "tokens": None,
        "train/*": "step",
        **{f"{group}/*": "step" for group in ("moe", "spike", "attn", "kha", "data", "memory", "checkpoint", "events")},
        "validation/*": "tokens",
        "evaluation/*": "tokens",
    }
    assert (run.summary, run.finished, warnings) == ({"validation/loss": 1.5}, [5], [])


def test_the_number_of_keys_is_bounded(monkeypatch, tmp_path: Path) -> None:
    run = FakeRun()
    install(monkeypatch, lambda **options: run)
    mirror = WandbMirror(config("telemetry.wandb.mode=offline"), tmp_path, "x")
    for step in range(50):
        mirror.step({"step": step, **{f"k/{step}/{i}": i for i in range(20)}})
    assert len({key for values in run.logged for key in values}) == MAX_KEYS
    assert all("step" in values for values in run.logged)


class StrangeError(Exception):
    """An error of no known family."""


def test_a_mirror_that_cannot_start_warns_once_and_does_nothing(monkeypatch, tmp_path: Path) -> None:
    def init(**options):
        raise StrangeError("no such luck\nmore")

    install(monkeypatch, init)
    warnings: list[str] = []
    mirror = WandbMirror(config("telemetry.wandb.mode=offline"), tmp_path, "x", warn=warnings.append)
    mirror.step({"step": 1})
    mirror.close()
    assert mirror.mode == "disabled"
    assert warnings == ["W&B is disabled: StrangeError: no such luck [E12]"]


def test_a_mirror_that_fails_online_goes_on_offline(monkeypatch, tmp_path: Path) -> None:
    run = FakeRun()

    def init(mode, **options):
        if mode == "online":
            raise TimeoutError("init timed out with key secret-key-123")
        return run

    install(monkeypatch, init)
    monkeypatch.setenv("WANDB_API_KEY", "secret-key-123")
    monkeypatch.setattr(mirror_module, "is_reachable", lambda address: True)
    warnings: list[str] = []
    mirror = WandbMirror(config(), tmp_path, "x", warn=warnings.append)
    mirror.step({"step": 1})
    assert mirror.mode == "offline"
    assert len(run.logged) == 1
    assert len(warnings) == 1
    assert "secret-key-123" not in warnings[0]


def test_a_mirror_that_breaks_in_the_middle_warns_once_and_training_goes_on(monkeypatch, tmp_path: Path) -> None:
    run = FakeRun()
    run.log = lambda values, step: (_ for _ in ()).throw(BrokenPipeError("service died"))
    install(monkeypatch, lambda **options: run)
    warnings: list[str] = []
    mirror = WandbMirror(config("telemetry.wandb.mode=offline"), tmp_path, "x", warn=warnings.append)
    for step in range(3):
        mirror.step({"step": step})
    mirror.close()
    assert warnings == ["W&B is disabled from here on: BrokenPipeError: service died"]


def test_an_interrupt_by_the_user_is_not_swallowed(monkeypatch, tmp_path: Path) -> None:
    def init(**options):
        raise KeyboardInterrupt

    install(monkeypatch, init)
    with pytest.raises(KeyboardInterrupt):
        WandbMirror(config("telemetry.wandb.mode=offline"), tmp_path, "x")


def test_without_a_key_auto_is_offline_and_says_why() -> None:
    mode, reason = choose_mode("auto")
    assert mode == "offline"
    assert "API key" in reason
    assert choose_mode("disabled") == ("disabled", "")


def test_auto_obeys_the_wandb_mode_variable(monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert choose_mode("auto") == ("disabled", "")
    assert choose_mode("offline") == ("offline", "")


def test_a_key_in_netrc_counts_and_an_unreachable_server_means_offline(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine localhost login user password 0123456789\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:1")
    assert has_key("http://localhost:1")
    assert not has_key("https://api.wandb.ai")
    assert not is_reachable("http://localhost:1")
    assert choose_mode("online") == (
        "offline",
        "http://localhost:1 cannot be reached; `wandb sync` sends the files later",
    )


PROGRAM = """
import json, sys
from pathlib import Path
from kha_train.config.compose import compose
from kha_train.record import Record
from kha_train.telemetry import WandbMirror

run_dir, first, last, exit_code = Path(sys.argv[1]), *map(int, sys.argv[2:])
record = Record.open(run_dir)
settings = "telemetry.wandb.mode=offline telemetry.wandb.group=grid telemetry.wandb.tags=[mine] run.name=hunter2-secret"
config = compose([f"run.dir={run_dir}", *settings.split()])
mirror = WandbMirror(config, run_dir, "stable123")
record.begin_attempt(first - 1)
for step in range(first, last + 1):
    line = {"step": step, "tokens": 10 * step, "train/loss": 1 / step, "spike/open": int(step == 2)}
    record.step(line)
    mirror.step(line)
    if step == 2:
        mirror.event(record.event("rewind", step, reason="a spike, with the key hunter2-secret"))
event = {"start_step": 2, "end_step": 2, "class": "narrow", "height": 3.0}
from kha_train.telemetry.wandb import SPIKE_COLUMNS
action = record.event("rewind", 2, reason="hunter2-secret")
mirror.spikes([{**dict.fromkeys(SPIKE_COLUMNS, 0), **event}], [action], [(1, 1.0), (2, 4.0)])
mirror.summary({"final/note": "hunter2-secret"})
mirror.close(exit_code)
record.close()
print(mirror.mode)
"""


@pytest.fixture(scope="module")
def attempts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The files of two attempts of one run with the real library; the second resumes after step 2 and fails."""
    run_dir = tmp_path_factory.mktemp("run")
    environment = {**os.environ, "SOME_API_KEY": "hunter2-secret", "WANDB_MODE": "offline"}
    for arguments in ("1 3 0", "3 4 5"):
        command = [sys.executable, "-c", PROGRAM, str(run_dir), *arguments.split()]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert (done.stdout, done.stderr.count("wandb:")) == ("offline\n", 0)
    files = sorted((run_dir / "wandb").glob("offline-run-*-stable123/run-stable123.wandb"))
    assert len(files) == 2
    return files


@pytest.mark.slow
def test_no_attempt_overwrites_a_row_of_another_and_our_own_axes_are_in_every_row(attempts, wandb_rows) -> None:
    first, second = (wandb_rows(path) for path in attempts)
    assert [(row["_step"], row["step"], row["tokens"]) for row in first] == [(1, 1, 10), (2, 2, 20), (3, 3, 30)]
    assert [(row["_step"], row["step"], row["tokens"]) for row in second] == [(4, 3, 30), (5, 4, 40)]
    assert first[1][MARKER] == first[1]["events/rewind"] == 0.5
    tables = {key.rpartition("/")[0] for key in second[-1] if key.endswith("/_type")}
    assert tables == {"spike/events", "spike/actions", "spike/on_loss_table"}


@pytest.mark.slow
def test_a_resumed_run_has_one_id_group_and_tags_and_tells_how_it_ended(attempts, wandb_records) -> None:
    for path, code in zip(attempts, (0, 5), strict=True):
        records = wandb_records(path)
        (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
        assert (run.run_id, run.run_group, list(run.tags)) == ("stable123", "grid", ["gqa", "seed 0", "mine"])
        assert [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"] == [code]
        axes = {r.metric.glob_name or r.metric.name: r.metric.step_metric for r in records if r.HasField("metric")}
        assert (axes["train/*"], axes["validation/*"], axes["events/*"]) == ("step", "tokens", "step")


@pytest.mark.slow
def test_no_secret_is_in_any_file_of_the_mirror(attempts) -> None:
    for path in attempts[0].parents[1].rglob("*"):
        assert not path.is_file() or b"hunter2-secret" not in path.read_bytes(), path


def test_an_address_that_is_none_means_offline(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "https://server:port")
    install(monkeypatch, lambda **options: FakeRun())
    warnings: list[str] = []
    mirror = WandbMirror(config("telemetry.wandb.mode=online"), tmp_path, "x", warn=warnings.append)
    assert mirror.mode == "offline" and "ValueError" in warnings[0]


def test_steps_computed_again_after_a_rewind_are_sent_too(monkeypatch, tmp_path: Path) -> None:
    run = FakeRun()
    install(monkeypatch, lambda **options: run)
    mirror = WandbMirror(config("telemetry.wandb.mode=offline"), tmp_path, "id")
    for step in (1, 2, 3, 2):
        mirror.step({"step": step, "train/loss": 5.0})
    assert [values["step"] for values in run.logged] == [1, 2, 3, 2]
    assert run.rows == [1, 2, 3, 4]


def test_spikes_are_marked_on_the_loss_and_listed_in_a_table(monkeypatch, tmp_path: Path) -> None:
    run = FakeRun()
    install(monkeypatch, lambda **options: run)
    sys.modules["wandb"].Table = lambda columns, rows: (columns, rows)
    sys.modules["wandb"].plot = types.SimpleNamespace(line_series=lambda xs, ys, **more: (xs, ys, more["keys"]))
    mirror = WandbMirror(config("telemetry.wandb.mode=offline"), tmp_path, "id")
    mirror.step({"step": 1, "train/loss": 3.0, "spike/open": 0})
    mirror.step({"step": 2, "train/loss": 9.0, "spike/open": 1})
    assert [values.get(MARKER) for values in run.logged] == [None, 9.0]
    event = SpikeEvent(2, 4, 100, 1e-3, 8, 31, 3.0, 0.1, 1.0, height=math.inf, recovered=True, open=False)
    rewind = {"kind": "rewind", "step": 4, "attempt": 2, "reason": "a spike"}
    mirror.event(rewind)
    mirror.event({})
    losses = [(1, 3.0), (2, 9.0), (3, math.nan), (4, 6.0), (5, 3.0)]
    mirror.spikes([event.to_dict()], [rewind], losses)
    assert run.logged[2] == {"events/rewind": 9.0} and run.rows == [1, 2, 2, 2]
    columns, rows = run.logged[-1]["spike/events"]
    assert dict(zip(columns, rows[0], strict=True)) | {"start_step": 2, "class": "narrow", "width": 3} == dict(
        zip(columns, rows[0], strict=True)
    )
    assert run.logged[-1]["spike/actions"][1] == [[4, 2, "rewind", "a spike"]]
    xs, ys, names = run.logged[-1]["spike/on_loss"]
    assert names == ["train/loss", "narrow at step 2"]
    assert (xs, ys) == ([[1, 2, 4, 5], [2, 4]], [[3.0, 9.0, 6.0, 3.0], [9.0, 6.0]])
    undone = {**event.to_dict(), "rewound": True}
    mirror.spikes([event.to_dict(), undone, undone], [], losses)
    assert len(set(run.logged[-1]["spike/on_loss"][2])) == 4, "lines of one name are drawn as one"


def test_figures_of_single_layers_stay_in_the_record(monkeypatch, tmp_path: Path) -> None:
    run = FakeRun()
    install(monkeypatch, lambda **options: run)
    own = [Metric("toy/size", "1", "", mirrored=False), Metric("toy/age", "1", "")]
    mirror = WandbMirror(config("telemetry.wandb.mode=offline"), tmp_path, "abc123", metrics=own)
    by_layer = {name: [1.0, 2.0] for name in EARLIER if name.endswith("_by_layer")}
    mirror.step({"step": 1, "moe/maxvio": 1.5, "toy/size": 2.0, "toy/age": 3.0, **by_layer})
    assert len(by_layer) == 5 and run.logged == [{"step": 1, "moe/maxvio": 1.5, "toy/age": 3.0}]
