"""What a run holds open while it trains: engine, data, record and its mirrors. Built once, resumed, saved, closed."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import yaml

from kha_train.checkpoint.reader import Checkpoint, open_verified
from kha_train.config.build import to_plain
from kha_train.config.constants import PRECISION_OF
from kha_train.config.schema import RunConfig
from kha_train.data.stream import ValidationSet, open_stream
from kha_train.distributed import World, as_error
from kha_train.engine.audit import audit
from kha_train.engine.building import resolve_dtype
from kha_train.engine.contract import Engine, InitialValue
from kha_train.errors import CheckpointError, KhaError
from kha_train.estimate.counts import count_parameters, flops_per_token
from kha_train.model.attention.choice import announce, choose
from kha_train.model.attention.measured import measure, settled
from kha_train.model.moe.experts import announce_experts
from kha_train.record import Record, Redactor
from kha_train.record.attempts import CONFIG_FILE
from kha_train.record.files import write_text, written_as
from kha_train.stability.events import Observation
from kha_train.telemetry.console import Console
from kha_train.telemetry.meters import DataWait, MovingAverage, PeakMemory
from kha_train.telemetry.profiler import Profiler
from kha_train.telemetry.startup import Startup
from kha_train.telemetry.throughput import Throughput
from kha_train.telemetry.wandb import WandbMirror
from kha_train.train import resume
from kha_train.train.ending import close_record, sum_up
from kha_train.train.evaluate import Validation, evaluate
from kha_train.train.failure import accept
from kha_train.train.opening import NOT_FINISHED, find_own_checkpoint, finished_at, headline, needs_no_checkpoint
from kha_train.train.probe import probe_metrics
from kha_train.train.progress import Progress, restore_watch
from kha_train.train.rate_change import tell_rate_change
from kha_train.train.rewind import go_back, steps_to_keep
from kha_train.train.saving import Saver
from kha_train.train.step import Judge, StepResult, routing_metrics
from kha_train.train.watch import ANNOUNCED, Ruling, Watch, describe

T = TypeVar("T")


class Session:
    """Everything open between the first and the last step of one attempt, on one rank.

    Entering takes the run directory, finds the newest checkpoint, builds the engine and restores it; leaving closes
    all of it and says in the record how the attempt ended. A run that finished before `is_over`, and entering ends
    early. Raises what `train` documents.
    """

    def __init__(self, config: RunConfig, world: World, startup: Startup, engine_class: type[Engine]) -> None:
        self.config, self.world, self._engine_class = config, world, engine_class
        self._startup: Startup | None = startup
        self.run_dir = Path(config.run.dir)
        self.progress = Progress()
        self.watch = Watch(config)
        self.data_wait, self.loss_average = DataWait(), MovingAverage()
        self.end_state = "failed"
        self.has_updated = False
        """Whether this attempt has applied a step: all that a step needs found room."""
        self.trouble: BaseException | None = None
        """Why rank 0 could not write the record; all ranks hear of it at the next agreement."""
        self.finished_at = NOT_FINISHED
        """The step at which the run finished before; only where `run.steps` asks for no more."""
        self.is_accepted = False
        """Whether the settings fit the data and the run; before that a start changes nothing of the run."""
        self.is_over = False
        """Whether nothing is left to train: then no attempt begins."""
        self.resumed_from: tuple[int, ...] = ()
        self._inherited: resume.Inherited | None = None
        self._rate_change: dict[str, float] = {}
        self._open = ExitStack()

    def __enter__(self) -> Self:
        config, world, startup = self.config, self.world, self._startup
        assert startup is not None
        with self._open:
            self._take_directory()
            checkpoint = None
            if not self.is_over:
                checkpoint = find_own_checkpoint(self.run_dir, world, self._report_checkpoint)
                startup.mark("run directory, newest checkpoint")
                self._open_data(checkpoint)
                self.is_over = checkpoint is not None and checkpoint.step >= config.run.steps <= self.finished_at
            if self.is_over:
                self._open = self._open.pop_all()
                return self
            with world.agreed():
                self._earlier_backend = resume.attention_backend(self.run_dir) if checkpoint else ""
                answer = measure(config, world.device, self._dtype, self._earlier_backend)
            self._settled, measured = settled(config, world.broadcast_text(answer))
            with world.agreed():
                self._backend = choose(self._settled, world.device, self._dtype).name
                self._choices = [*announce(self._settled, world.device, self._dtype), *filter(None, [measured])]
                self._choices += announce_experts(config, world.device, self._dtype)
            startup.mark("data")
            self._build(checkpoint)
            startup.mark("engine")
            with world.agreed("begin the record"):
                self._open_mirrors()
                self._begin_attempt(resumed=checkpoint is not None)
            startup.mark("record, console and W&B")
            self._open = self._open.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.config.data.global_batch_size * self.config.model.seq_len

    def judge_at(self, lr: float) -> Judge:
        """The judge of the step under way, whose batch has been read and whose rate is `lr`. It sees to the audit too:
        when it is asked, what was computed is not applied yet."""
        before = self.progress

        def judge(loss: float, grad_norm: float) -> Ruling:
            seen = Observation(
                step=before.step + 1,
                loss=loss,
                grad_norm=grad_norm,
                tokens=before.tokens + self.tokens_per_step,
                lr=lr,
                samples_first=before.next_sample,
                samples_last=self.stream.samples_seen - 1,
            )
            ruling = self.watch.judge(seen)
            every = self.config.engine.audit_every
            if every and seen.step % every == 0:
                audit(self.engine, json.dumps([before.to_plain(), self.watch.state()]))
            return ruling

        return judge

    def metrics(self, result: StepResult, lr: float, seconds: float) -> dict[str, Any]:
        """The line of the record for the step just finished (definitions: `record.METRICS`)."""
        seen, progress = self.watch.seen, self.progress
        return {
            "step": progress.step,
            "samples_first": seen.samples_first,
            "samples_last": seen.samples_last,
            "tokens": progress.tokens,
            "train/loss": result.loss,
            "train/grad_norm": seen.grad_norm,
            "train/grad_clipped": int(result.applied and self.watch.clipped),
            "train/skipped": int(not result.applied),
            "train/skipped_steps": progress.skipped_steps,
            "train/lr": lr,
            "train/step_seconds": seconds,
            **self._throughput.rates(self.tokens_per_step, seconds),
            "data/wait_seconds": (waited := self.stream.take_wait_seconds()),
            "data/agreement_seconds": max(0.0, self.data_wait.take() - waited),
            "checkpoint/stall_seconds": self.saver.take_stall(),
            "checkpoint/failures": self.saver.failures,
            "memory/peak_gib": self._memory.gib(),
            **({} if result.padding is None else {"data/padding": result.padding}),
            **routing_metrics(self.config.moe, result),
            **self.watch.metrics(),
            **(probe_metrics(result.evidence) if result.evidence else {}),
        }

    def note_startup(self) -> None:
        """After the first step: into `run.json`, where the time went since the process was started."""
        if self._startup is not None:
            self._startup.mark("first step")
            seconds, self._startup = self._startup.seconds, None
            self._write(lambda: self.record.update_run(startup_seconds=seconds), None)

    def report(self, line: dict[str, Any], evidence: dict[str, Any] | None) -> None:
        """Record the line and what happened in its step, and show it to the mirrors."""
        self._write(lambda: self.record.step(line), None)
        if self.trouble:
            return
        self.console.step(line)
        self.wandb.step(line)
        for kind, fields in self.watch.happenings(evidence):
            self.happened(kind, line["step"], **fields)

    def happened(self, kind: str, step: int, **fields: Any) -> None:
        """Put an event of `step` into the record and into W&B; some are announced."""
        event = self._event(kind, step, **fields)
        # Clipping is frequent: in W&B it is a curve, and takes no row from the rare actions.
        if kind != "zclip":
            self.wandb.event(event)
        if kind in ANNOUNCED:
            self.console.warn(describe(kind, step, fields))

    def validate(self) -> Validation:
        """Score the validation rows with the weights as they are."""
        batches = self._validation_set.batches(self.world.rank, self.world.size)
        return evaluate(self.engine, batches, self._bytes_per_id_V)

    def save(self) -> None:
        """Begin a checkpoint of this moment; `saver` tells when it stands, and what becomes of one that fails."""
        step, resumed_from = self.progress.step, self.resumed_from
        state = resume.trainer_state(self.config, self.engine, self.progress, self._content_ids, self.watch.state())
        state["loss_average"] = self.loss_average.state()

        def protect() -> tuple[int, ...]:
            return (*resumed_from, *steps_to_keep(self.config, self.run_dir, step))

        self.saver.begin(step, self.engine, state, protect)

    def obey(self) -> bool:
        """Do what was decided about the run in the step just finished; whether it went back to an earlier one.

        Raises DivergedError on all ranks when the run is to end.
        """
        if self.watch.decision.then == "rewind" and go_back(self):
            return True
        if self.watch.decision.then == "abort":
            self.happened("abort", self.progress.step, reason=self.watch.decision.reason)
        self.watch.check()
        return False

    def _take_directory(self) -> None:
        """Own the run directory. Of a run that is over, or whose checkpoints are lost, nothing else is touched."""
        world = self.world
        with world.agreed(f"write {self.run_dir}"):
            with written_as("run.dir", self.run_dir, "name a place that can be written: run.dir=PATH"):
                self.record = Record.open(self.run_dir, world.rank)
            self._open.callback(self.record.close)
            if world.is_main:
                self.finished_at = finished_at(self.config, self.run_dir)
                self.is_over = needs_no_checkpoint(self.config, self.run_dir, self.finished_at)
        self.finished_at, is_over = world.max_ints(self.finished_at, int(self.is_over))
        self.is_over = bool(is_over)
        if self.is_over:
            return
        self._open.push(partial(close_record, self))

    def _open_data(self, checkpoint: Checkpoint | None) -> None:
        """Open what is trained and validated on, the same on every rank and what `checkpoint` was trained on."""
        config, world = self.config, self.world
        with world.agreed():
            self.stream = open_stream(config, world.rank, world.size)
            self._validation_set = ValidationSet(config)
            self._content_ids = {
                "data_content_id": self.stream.content_id,
                "validation_content_id": self._validation_set.shards.content_id,
            }
            self._bytes_per_id_V = self._validation_set.bytes_per_id_V
            self._dtype = resolve_dtype(config, world.device)
        first = world.broadcast_text(json.dumps(self._content_ids))
        with world.agreed():
            resume.check_same_data(json.loads(first), self._content_ids)
            if checkpoint:
                precisions = resume.precision(self.run_dir), PRECISION_OF[str(self._dtype).removeprefix("torch.")]
                free = ("run.steps",) if self.finished_at >= config.run.steps else ()
                change = resume.check_belongs(config, checkpoint, self._content_ids, precisions, *free)
                self._rate_change = tell_rate_change(change, world.is_main)

    def _build(self, checkpoint: Checkpoint | None) -> None:
        initial = self._initial(checkpoint)
        accept(self.run_dir, self.world)
        self.is_accepted = True
        # Also after an engine that could not be built: it may hold groups by then.
        self._open.push(lambda kind, error, trace: self._engine_class.leave_world(error))
        self.engine = self._engine_class(self._settled, self.world, initial)
        self._open.callback(self.engine.close)
        if checkpoint:
            self.restore(checkpoint)
            with self.world.agreed():
                restore_watch(self.watch, checkpoint)
        elif self._inherited:
            self._inherited.fill(self.engine)

    def _initial(self, checkpoint: Checkpoint | None) -> InitialValue:
        """A run's own checkpoint wins over the one it once began from."""
        path = self.config.run.init_from
        if checkpoint is None and path:
            source = open_verified(Path(path), self.world)
            with self.world.agreed():
                self._inherited = resume.Inherited(self.config, source)
            return self._inherited
        return resume.resumed(checkpoint)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put the living engine and the stream where they stood at `checkpoint`."""
        self.progress = resume.restore(self.engine, checkpoint)
        self.stream.skip_windows = self.progress.skip_windows
        self.stream.samples_seen = self.progress.samples_seen
        self.resumed_from = (checkpoint.step,)
        self.loss_average.restore(checkpoint.trainer_state.get("loss_average"))

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
            loss_average=self.loss_average,
        )
        self._open.callback(self.console.close)
        warn = self.console.warn
        self.profiler = Profiler(config, self.run_dir, world, warn)
        self._open.callback(self.profiler.close)
        self.wandb = WandbMirror(config, self.run_dir, self.record.wandb_id, rank=world.rank, warn=warn)
        self._open.push(self._close_wandb)
        self._open.push(partial(sum_up, self))
        self.saver = Saver(
            config,
            world,
            self.run_dir,
            sync=self.record.sync,
            event=self._checkpoint_event,
            stands=bool(self.resumed_from),
        )
        self._open.push(self.saver.leave)

    def _close_wandb(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """A run that failed is shown as failed."""
        self.wandb.close(error.exit_code if isinstance(error, KhaError) else int(error is not None))

    def _begin_attempt(self, resumed: bool) -> None:
        parameters = count_parameters(self.config)
        facts = {
            **self._content_ids,
            "validation_rows": self._validation_set.scored_rows,
            "parameters": {"total": parameters.total, "active": parameters.active},
            "device": str(self.world.device.type),
            "dtype": str(self.engine.dtype).removeprefix("torch."),
            "peak": str(self._throughput.peak),
            "attention_backend": self._backend,
            "chosen": self._choices,
        }
        plain = Redactor.from_environment().clean(to_plain(self.config))
        self.record.begin_attempt(self.progress.step, world_size=self.world.size, facts=facts, config=plain)
        if self.world.is_main:
            write_text(self.run_dir / CONFIG_FILE, yaml.safe_dump(plain, sort_keys=False))
        if self._inherited:
            inherited = self._inherited
            lists = {"taken": len(inherited.taken), "new": inherited.new, "left_out": inherited.left_out}
            self.record.event("weights_inherited", 0, source=str(inherited.checkpoint.path), **lists)
        if self._earlier_backend not in ("", self._backend):
            fields = {"before": self._earlier_backend, "now": self._backend}
            self.record.event("attention_backend_changed", self.progress.step, **fields)
        if self._rate_change:
            self.record.event("learning_rate_changed", self.progress.step, **self._rate_change)
        resumed_after = self.progress.step if resumed else None
        for line in [*self._choices, headline(self.config, self.world.size, resumed_after, facts)]:
            self.console.message(line)

    def _event(self, kind: str, step: int, **fields: Any) -> dict[str, Any]:
        return self._write(lambda: self.record.event(kind, step, **fields), {})

    def _write(self, write: Callable[[], T], otherwise: T) -> T:
        """What `write` returns. Where the record cannot be written, `otherwise`, and `trouble` for all ranks."""
        try:
            return write()
        except OSError as error:
            self.trouble = self.trouble or as_error(error, "write the record")
            return otherwise

    def _report_checkpoint(self, text: str) -> None:
        """A damaged checkpoint is passed over; with `resume.strict` it is a CheckpointError on all ranks."""
        if self.world.is_main:
            print(f"warning: {text}", flush=True)
            self._event("checkpoint_refused", 0, text=text)
        if self.config.resume.strict:
            raise CheckpointError(text, field="resume.strict", value=True, fix="look at it, then start again")

    def _checkpoint_event(self, kind: str, step: int, **fields: Any) -> None:
        self.wandb.event(self._event(kind, step, **fields))
        if kind == "checkpoint_saved":
            self.console.checkpoint_saved(step)
        else:
            self.console.warn(f"the checkpoint of step {step} failed, training goes on: {fields['problem']}")
