"""Makes run directories of any length in seconds: the lines of a real run of a tiny decoder, repeated with synthetic
loss curves.

Loss and gradient norm are drawn from a seed, with a spike every few thousand steps. The detectors used in training
judge them, so `spike/*`, `events.jsonl`, the state in the checkpoint and the files kept beside the record are those of
such a run. The other metrics are the real run's, with lists for four layers, about 1.6 KB per line. The run stopped in
good order after its last step, and its checkpoint is intact: `kha train` with `MadeRun.overrides` continues it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.synthetic import write_dataset
from kha_train.checkpoint.layout import FOLDER, candidates, step_name
from kha_train.checkpoint.manifest import MANIFEST_FILE, TRAINER_FILE, FileEntry, parse_manifest
from kha_train.checkpoint.trainer_state import decode_state, encode_state
from kha_train.config.build import to_plain
from kha_train.config.compose import compose, dump
from kha_train.errors import KhaError
from kha_train.record import Marker, read_metrics, read_run, set_marker
from kha_train.record.attempts import CONFIG_FILE
from kha_train.record.columns_twin import read_columns
from kha_train.record.files import write_json
from kha_train.record.jsonl import to_line
from kha_train.record.reader import DISCARDED_FILE, EVENTS_FILE, METRICS_FILE, RUN_FILE
from kha_train.record.totals import Totals, save_totals
from kha_train.stability.events import Observation
from kha_train.train.watch import Watch

TEMPLATE_STEPS, LAYERS = 40, 4
SPIKE_EVERY, SPIKE_STEPS = 7000, 8
RESTART_EVERY, UNDONE, SAVE_EVERY = 25_000, 50, 1000
"""Steps between two kills of a made run, steps lost at each, and steps between two saves."""
MORE = 2
"""Number of steps left to train."""
SETTINGS = (
    "model.vocab_size=256", "model.seq_len=64", "model.layers=2", "model.hidden_size=64", "moe.expert_width=64",
    "model.loss_chunk_tokens=100", "data.global_batch_size=2", "engine.micro_batch_size=2", "validation.rows=8",
    "telemetry.wandb.mode=disabled", "telemetry.peak_tflops=0.1", "telemetry.console=quiet",
)  # fmt: skip
"""Settings of the real run."""


@dataclass(frozen=True)
class MadeRun:
    """A made run directory, and the `overrides` with which `kha train` continues it for `MORE` steps."""

    run_dir: Path
    overrides: tuple[str, ...]


class Template:
    """The real run whose lines made records repeat, trained in `folder` by the constructor in a few seconds.

    Raises KhaError when the training fails, and as `compose`.
    """

    def __init__(self, folder: Path, overrides: Sequence[str] = ()) -> None:
        data = folder / "data"
        write_dataset(data, vocab_size=256, documents=300)
        self.run_dir = folder / "template"
        paths = (f"data.train={data}/train", f"data.validation={data}/validation")
        self.overrides = (*SETTINGS, *paths, f"checkpoint.every_steps={SAVE_EVERY}", *overrides)
        own = [f"run.dir={self.run_dir}", f"run.steps={TEMPLATE_STEPS}"]
        command = [sys.executable, "-m", "kha_train", *self.overrides, *own]
        ended = subprocess.run(command, check=False, capture_output=True, text=True)
        if ended.returncode:
            raise KhaError(f"kha train ended with {ended.returncode}: {ended.stderr.strip()[-500:]}")
        self.lines = read_metrics(self.run_dir)

    def make(self, run_dir: Path, steps: int, seed: int = 0) -> MadeRun:
        """A run in the new directory `run_dir` that stopped after `steps` steps. The same `seed` gives the same
        curve.
        """
        own = (f"run.dir={run_dir}", f"run.name={run_dir.name}", f"run.steps={steps + MORE}", f"run.seed={seed}")
        made = MadeRun(run_dir, (*self.overrides, *own))
        config = compose(made.overrides)
        run_dir.mkdir(parents=True)
        curve = _Curve(self.lines, steps, seed, config.data.global_batch_size * config.model.seq_len)
        watch = Watch(config)
        with (run_dir / METRICS_FILE).open("wb") as metrics, (run_dir / EVENTS_FILE).open("wb") as events:
            for line, happened in curve.lines(watch):
                metrics.write(line)
                events.writelines(happened)
        if curve.undone:
            (run_dir / DISCARDED_FILE).write_bytes(b"".join(curve.undone))
        plain = to_plain(config)
        (run_dir / CONFIG_FILE).write_text(dump(config), encoding="utf-8")
        run = read_run(self.run_dir)
        entry = {"world_size": 1, "changed": {}, "config": {"like": 1, "changed": {}, "without": []}}
        attempts = [{**entry, **attempt} for attempt in curve.attempts]
        attempts[0]["config"] = {"whole": plain}
        write_json(run_dir / RUN_FILE, {**run, "run_id": uuid.uuid4().hex, "attempts": attempts})
        save_totals(run_dir, curve.totals)
        read_columns(run_dir)
        self._save_checkpoint(made, steps, watch, plain)
        set_marker(run_dir, Marker.REQUEUE, f"step {steps}, by a signal")
        return made

    def _save_checkpoint(self, made: MadeRun, step: int, watch: Watch, plain: dict[str, Any]) -> None:
        """The real run's last checkpoint, saved as one of `step`."""
        _, source = candidates(self.run_dir / FOLDER)[0]
        target = made.run_dir / FOLDER / step_name(step)
        shutil.copytree(source, target)
        data, row = plain["data"], plain["model"]["seq_len"]
        samples = step * data["global_batch_size"]
        counts = {"step": step, "samples_seen": samples, "tokens": samples * row}
        state = decode_state((target / TRAINER_FILE).read_bytes())
        state["progress"] |= {**counts, "skipped_steps": 0, "skip_windows": []}
        raw = encode_state({**state, "stability": watch.state(), "optimizer_steps": step, "config": plain})
        (target / TRAINER_FILE).write_bytes(raw)
        manifest = parse_manifest((target / MANIFEST_FILE).read_bytes())
        files = manifest.contents.files | {TRAINER_FILE: FileEntry(len(raw), hashlib.sha256(raw).hexdigest())}
        manifest = replace(manifest, step=step, contents=replace(manifest.contents, files=files))
        (target / MANIFEST_FILE).write_bytes(manifest.encode())


class _Curve:
    """The lines of a made run, in order; once `lines` is exhausted, also its `attempts` and `undone` lines."""

    def __init__(self, template: Sequence[Mapping[str, Any]], steps: int, seed: int, tokens: int) -> None:
        self._template, self._steps, self._tokens = template, steps, tokens
        drawn = np.random.default_rng(seed)
        number = np.arange(1, steps + 1)
        # The curve ends where the real run continues.
        loss = template[-1]["train/loss"] + 3.0 * (number**-0.3 - steps**-0.3) + 0.02 * drawn.standard_normal(steps)
        inside = (number % SPIKE_EVERY) - SPIKE_EVERY + SPIKE_STEPS
        spiky = np.where(inside >= 0, 2.0 * 0.7 ** np.maximum(inside, 0), 0.0)
        self._loss = (loss + spiky).tolist()
        self._norm = (1.0 + 0.1 * np.abs(drawn.standard_normal(steps)) + spiky).tolist()
        self._begun = read_time = template[0]["time"]
        self._seconds = float(np.mean([line["train/step_seconds"] for line in template]))
        self.attempts: list[dict[str, Any]] = [{"attempt": 1, "start_step": 0, "started": read_time}]
        self.undone: list[bytes] = []
        self.totals = Totals()

    def lines(self, watch: Watch) -> Iterator[tuple[bytes, list[bytes]]]:
        """(line of metrics.jsonl, lines of events.jsonl) of every step."""
        heads = {"step", "attempt", "time", "samples_first", "samples_last", "tokens", "train/loss", "train/grad_norm"}
        rests = [_rest(line, heads) for line in self._template]
        batch = self._template[0]["samples_last"] + 1
        opening = [self._event("attempt_started", 0, world_size=1)]
        for step, (loss, norm) in enumerate(zip(self._loss, self._norm, strict=True), start=1):
            first, tokens = (step - 1) * batch, step * self._tokens
            watch.judge(Observation(step, loss, norm, tokens, 1e-3, first, first + batch - 1))
            head: dict[str, Any] = {
                "step": step,
                "attempt": len(self.attempts),
                "time": self._time(step),
                "samples_first": first,
                "samples_last": first + batch - 1,
                "tokens": tokens,
                "train/loss": loss,
                "train/grad_norm": norm,
                **watch.metrics(),
            }
            line = json.dumps(head)[:-1].encode() + rests[(step - 1) % len(rests)]
            self.totals.add({**self._template[(step - 1) % len(rests)], **head})
            events = opening + [self._event(kind, step, **fields) for kind, fields in watch.happenings(None)]
            opening = []
            if step == self._steps:
                events += [self._save(step), *self._ended("requeued", step)]
            elif step % RESTART_EVERY == 0:
                events += self._restart(step, line)
            elif step % SAVE_EVERY == 0:
                events.append(self._save(step))
            yield line, events

    def _time(self, step: int) -> float:
        when: float = self._begun + step * self._seconds
        return when

    def _event(self, kind: str, step: int, **fields: Any) -> bytes:
        head = {"id": uuid.uuid4().hex, "kind": kind, "step": step, "attempt": len(self.attempts)}
        return to_line({**head, "time": self._time(step), **fields})

    def _save(self, step: int) -> bytes:
        kind, stall = "checkpoint_saved", 0.005
        self.totals.happened({"kind": kind, "stall_seconds": stall})
        return self._event(kind, step, stall_seconds=stall, seconds=0.02)

    def _ended(self, state: str, step: int) -> list[bytes]:
        self.attempts[-1] |= {"state": state, "end_step": step, "ended": self._time(step)}
        return [self._event("attempt_ended", step, state=state)]

    def _restart(self, step: int, line: bytes) -> list[bytes]:
        """Save, train `UNDONE` more steps, get killed, and restart from the save."""
        events = [self._save(step), *self._ended("lost", step + UNDONE)]
        reason = {
            "discarded_reason": "resumed from an earlier checkpoint",
            "discarded_by_attempt": len(self.attempts) + 1,
        }
        whole = json.loads(line)
        for extra in range(1, UNDONE + 1):
            self.totals.add_undone({**whole, "step": step + extra, **reason})
        self.undone += [to_line({**whole, "step": step + extra, **reason}) for extra in range(1, UNDONE + 1)]
        number = len(self.attempts) + 1
        self.attempts.append({"attempt": number, "start_step": step, "started": self._time(step)})
        events.append(self._event("attempt_started", step, world_size=1))
        return [*events, self._event("lines_discarded", step, lines=UNDONE, **reason)]


def _rest(line: Mapping[str, Any], heads: set[str]) -> bytes:
    """The end of a line of metrics.jsonl, from the comma on: the content of `line` besides `heads` and the detectors'
    metrics.
    """
    rest = {
        key: (value * LAYERS)[:LAYERS] if isinstance(value, list) else value
        for key, value in line.items()
        if key not in heads and not key.startswith("spike/") and key != "train/nonfinite_steps"
    }
    return b", " + to_line(rest)[1:]
