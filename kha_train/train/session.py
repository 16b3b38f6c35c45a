"""What a run holds open while it trains: engine, data, record and its mirrors. Built once, resumed, saved, closed."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from kha_train.checkpoint.reader import Checkpoint, find_newest
from kha_train.checkpoint.retention import prune
from kha_train.checkpoint.writer import write
from kha_train.config.build import to_plain
from kha_train.config.schema import RunConfig
from kha_train.data.stream import bytes_per_id, open_stream, validation_batches
from kha_train.distributed import World
from kha_train.engine.deepspeed import Engine, leave_world
from kha_train.errors import DivergedError, KhaError
from kha_train.model.accounting import count_parameters, flops_per_token
from kha_train.model.moe.balance import load_statistics
from kha_train.record import Marker, Record, Redactor, set_marker
from kha_train.telemetry.console import Console
from kha_train.telemetry.meters import DataWait, PeakMemory
from kha_train.telemetry.throughput import Throughput
from kha_train.telemetry.wandb import WandbMirror
from kha_train.train import resume
from kha_train.train.evaluate import Validation, evaluate
from kha_train.train.resume import Progress
from kha_train.train.step import StepResult


class Session:
    """Everything open between the first and the last step of one attempt, on one rank.

    Entering takes the run directory, finds the newest checkpoint, builds the engine and restores it; leaving closes
    all of it and says in the record how the attempt ended. Raises what `train` documents.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        self.config, self.world = config, world
        self.run_dir = Path(config.run.dir)
        self.progress = Progress()
        self.data_wait = DataWait()
        self.end_state = "failed"
        self._resumed_from: tuple[int, ...] = ()
        self._open = ExitStack()

    def __enter__(self) -> Self:
        config, world = self.config, self.world
        with self._open:
            with world.agreed():
                self.record = Record.open(self.run_dir, world.rank)
            self._open.push(self._close_record)
            checkpoint = find_newest(self.run_dir, world, self._report_checkpoint)
            with world.agreed():
                self.stream = open_stream(config, world.rank, world.size)
                validation_batches(config, world.rank, world.size)
                self._bytes_per_id_V = bytes_per_id(config)
                if checkpoint:
                    resume.check_belongs(config, checkpoint, self.stream.content_id)
            self._build(checkpoint)
            self._open_mirrors()
            self._begin_attempt(resumed=checkpoint is not None)
            self._open = self._open.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def metrics(self, result: StepResult, lr: float, seconds: float) -> dict[str, Any]:
        """The line of the record for the step just finished (definitions: `record.METRICS`)."""
        rows, progress = self.config.data.global_batch_size, self.progress
        balance = load_statistics(result.load_LE, self.engine.decoder.selection_bias_LE())._asdict()
        return {
            "step": progress.step,
            "samples_first": progress.samples_seen - rows,
            "samples_last": progress.samples_seen - 1,
            "tokens": progress.tokens,
            "train/loss": result.loss,
            "train/grad_norm": result.grad_norm,
            "train/grad_clipped": int(result.applied and result.grad_norm > self.config.optim.grad_clip),
            "train/skipped": int(not result.applied),
            "train/lr": lr,
            "train/step_seconds": seconds,
            **self._throughput.rates(rows * self.config.model.seq_len, seconds),
            "data/wait_seconds": self.data_wait.take(),
            "memory/peak_gib": self._memory.gib(),
            **{f"moe/{name}": value.item() for name, value in balance.items()},
        }

    def report(self, line: dict[str, Any]) -> None:
        """Record the line, and show it to its mirrors."""
        self.record.step(line)
        if line["train/skipped"]:
            self.record.event("step_discarded", line["step"], loss=line["train/loss"], norm=line["train/grad_norm"])
        self.console.step(line)
        self.wandb.step(line)

    def validate(self) -> Validation:
        """Score the validation rows with the weights as they are."""
        batches = validation_batches(self.config, self.world.rank, self.world.size)
        return evaluate(self.engine, batches, self._bytes_per_id_V)

    def save(self) -> None:
        """Publish a checkpoint of this moment, then let go of the oldest. Raises CheckpointError on all ranks."""
        started = time.perf_counter()
        with self.world.agreed():
            self.record.sync()
        step = self.progress.step
        state = resume.trainer_state(self.config, self.engine, self.progress, self.stream.content_id)
        buffers = {name: buffer.cpu() for name, buffer in self.engine.buffers().items()}
        write(self.run_dir, step, self.world, resume.pieces(self.engine), buffers, state)
        prune(self.run_dir, self.world, self.config.checkpoint.keep_last, protect=self._resumed_from)
        self.record.event("checkpoint_saved", step, seconds=time.perf_counter() - started)
        self.console.checkpoint_saved(step)

    def check_stability(self) -> None:
        """Raises DivergedError when the last `stability.max_nonfinite_steps` steps were all discarded."""
        limit = self.config.stability.max_nonfinite_steps
        if self.progress.nonfinite_in_a_row >= limit:
            raise DivergedError(
                f"loss or gradient was not finite {limit} steps in a row, last at step {self.progress.step}",
                field="stability.max_nonfinite_steps",
                value=limit,
                fix="lower optim.lr or lengthen optim.schedule.warmup; the last checkpoint is untouched",
            )

    def _build(self, checkpoint: Checkpoint | None) -> None:
        self.engine = Engine(self.config, self.world, resume.initial_from(checkpoint))
        self._open.callback(leave_world)
        self._open.callback(self.engine.close)
        if checkpoint:
            self.progress = resume.restore(self.engine, checkpoint)
            self.stream.samples_seen = self.progress.samples_seen
            self._resumed_from = (checkpoint.step,)

    def _open_mirrors(self) -> None:
        config, world = self.config, self.world
        self._memory = PeakMemory(world.device)
        self._throughput = Throughput(
            config,
            training_flops_per_token=flops_per_token(config).mfu,
            world_size=world.size,
            device=world.device,
            dtype=self.engine.dtype,
        )
        self.console = Console(
            config,
            config.run.steps,
            rank=world.rank,
            start_step=self.progress.step,
            memory_total_gib=self._memory.total_gib(),
        )
        self._open.callback(self.console.close)
        warn = self.console.warn
        self.wandb = WandbMirror(config, self.run_dir, self.record.wandb_id, rank=world.rank, warn=warn)
        self._open.callback(self.wandb.close)

    def _begin_attempt(self, resumed: bool) -> None:
        parameters = count_parameters(self.config)
        facts = {
            "data_content_id": self.stream.content_id,
            "parameters": {"total": parameters.total, "active": parameters.active},
            "device": str(self.world.device.type),
            "dtype": str(self.engine.dtype).removeprefix("torch."),
            "peak": str(self._throughput.peak),
        }
        if self.world.is_main:
            text = yaml.safe_dump(Redactor.from_environment().clean(to_plain(self.config)), sort_keys=False)
            (self.run_dir / "config.yaml").write_text(text, encoding="utf-8")
        self.record.begin_attempt(self.progress.step, world_size=self.world.size, facts=facts)
        where = f"resumed after step {self.progress.step}" if resumed else "new run"
        self.console.message(
            f"{self.config.run.name}: {where} of {self.config.run.steps} in {self.run_dir} | "
            f"{parameters.total:,} parameters, {parameters.active:,} active | {self.world.size} x {facts['device']}, "
            f"{facts['dtype']}, ZeRO {self.config.engine.zero_stage} | MFU of {facts['peak']}"
        )

    def _report_checkpoint(self, text: str) -> None:
        if self.world.is_main:
            print(f"warning: {text}", flush=True)
            self.record.event("checkpoint_refused", 0, text=text)

    def _close_record(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, DivergedError):
            self.end_state = "diverged"
        if isinstance(error, KhaError) and self.world.is_main:
            set_marker(self.run_dir, Marker.FATAL, error.line())
        self.record.close(self.end_state)
