"""The changing state of a run while it trains: the engine, the stream of data, the detectors, the progress.

A `Session` is complete once it is constructed. A checkpoint holds all of it (`state`) and restores all of it
(`restore`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kha_train.checkpoint.reader import Checkpoint
from kha_train.config.schema import RunConfig
from kha_train.data.stream import TokenStream
from kha_train.distributed import World
from kha_train.engine.audit import audit
from kha_train.engine.contract import Engine
from kha_train.evaluate.contract import Task
from kha_train.evaluate.opening import due
from kha_train.evaluate.scoring import evaluate
from kha_train.stability.events import Observation
from kha_train.telemetry.meters import MovingAverage
from kha_train.train import resume
from kha_train.train.branch import Branch
from kha_train.train.progress import Progress, SavedOrigin, restore_watch
from kha_train.train.step import Judge
from kha_train.train.watch import Ruling, Watch
from kha_train.variants.task import TaskOptions


@dataclass
class Attempt:
    """The progress of one attempt at a run, by which its end is judged. Created before anything is opened."""

    is_accepted: bool = False
    """Whether the settings fit the data and the run. Before that, a start changes nothing of the run."""
    has_updated: bool = False
    """Whether a step was applied, so that everything a step needs fits in memory."""
    end_state: str = "failed"
    """How the attempt ends, for the record: done, requeued, failed or diverged."""


@dataclass
class Session:
    """The moving parts of one attempt, on one rank. `tasks` are what measures the model: validation, then the others.
    `content_ids` name the data in checkpoints and in the record."""

    config: RunConfig
    world: World
    attempt: Attempt
    engine: Engine
    stream: TokenStream
    tasks: tuple[Task[TaskOptions], ...]
    content_ids: dict[str, str]
    watch: Watch
    progress: Progress = field(default_factory=Progress)
    loss_average: MovingAverage = field(default_factory=MovingAverage)
    """The average that the console shows; saved so that a resumed run shows the same."""
    resumed_from: tuple[int, ...] = ()
    """The step of the run's own checkpoint that this session was last restored from, if any."""
    origin: SavedOrigin | None = None
    """Where the run branched off another one."""

    @property
    def run_dir(self) -> Path:
        """The directory of the run."""
        return Path(self.config.run.dir)

    def tokens_of(self, step: int) -> int:
        """Tokens of the global batch of `step`."""
        return self.config.data.batch_sizes.of(step) * self.config.model.seq_len

    def judge_at(self, lr: float) -> Judge:
        """The judge of the next step, whose batch has been read and whose rate is `lr`.

        It also runs the audit when one is due: when the judge is called, the update has not been applied yet.
        """
        before = self.progress

        def judge(loss: float, grad_norm: float) -> Ruling:
            seen = Observation(
                step=before.step + 1,
                loss=loss,
                grad_norm=grad_norm,
                tokens=before.tokens + self.tokens_of(before.step + 1),
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

    def advance(self, applied: bool) -> None:
        """Count the step just finished, whose update was `applied` or discarded."""
        self.attempt.has_updated |= applied
        tokens = self.tokens_of(self.progress.step + 1)
        self.progress = self.progress.after(self.stream.samples_seen, tokens, applied)

    def tasks_due(self) -> list[Task[TaskOptions]]:
        """What measures the model after the step just finished."""
        return due(self.tasks, self.progress.step, self.config.run.steps)

    def evaluate(self, tasks: Sequence[Task[TaskOptions]]) -> dict[str, float]:
        """What `tasks` make of the current weights: entries of the step's line. Collective."""
        return evaluate(self.engine, tasks)

    def state(self) -> dict[str, Any]:
        """The content of a checkpoint of the current state, besides tensors."""
        state = resume.trainer_state(self.config, self.engine, self.progress, self.content_ids, self.watch.state())
        branch = {"branch": dict(self.origin)} if self.origin else {}
        return {**state, "loss_average": self.loss_average.state(), **branch}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore the engine, the stream and the progress from `checkpoint`. Collective.

        The detectors are restored separately (`progress.restore_watch`), because a rewind keeps its own count.
        """
        self._stand_at(resume.restore(self.engine, checkpoint), checkpoint)
        self.resumed_from = (checkpoint.step,)
        self.origin = checkpoint.trainer_state.get("branch")

    def branch_off(self, branch: Branch) -> None:
        """Put everything where another run stood at a checkpoint, as the beginning of this one. Collective."""
        self._stand_at(branch.restore(self.engine), branch.checkpoint)
        self.origin = branch.origin
        with self.world.agreed():
            restore_watch(self.watch, branch.checkpoint)
        if branch.changes_the_loss:
            self.watch.expect_change()

    def _stand_at(self, progress: Progress, checkpoint: Checkpoint) -> None:
        self.progress = progress
        self.stream.skip_windows = progress.skip_windows
        self.stream.samples_seen, self.stream.steps_done = progress.samples_seen, progress.step
        self.loss_average.restore(checkpoint.trainer_state.get("loss_average"))
