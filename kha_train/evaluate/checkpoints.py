"""`kha eval`: the tasks of a run, and of lm-evaluation-harness, on its checkpoints or on any model with a tokenizer.

One process computes, in fp32, without the engine: a checkpoint of any ZeRO stage and number of ranks becomes one
decoder, with its interaction absorbed where that is possible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kha_train.checkpoint import layout
from kha_train.checkpoint.loss import check_not_lost
from kha_train.checkpoint.manifest import manifest_sha256
from kha_train.checkpoint.reader import open_verified
from kha_train.config.compose import load
from kha_train.config.schema import RunConfig
from kha_train.data.rows.batch import Batch
from kha_train.decode.absorb import absorb
from kha_train.decode.generate import absorbing_helps, materialise, tokenizer_of
from kha_train.distributed import World
from kha_train.errors import CheckpointError, ConfigError
from kha_train.evaluate.contract import Scorer, Task
from kha_train.evaluate.harness import Suite
from kha_train.evaluate.harness_data import Choice
from kha_train.evaluate.opening import VALIDATION, open_tasks
from kha_train.evaluate.requests import score_rows
from kha_train.evaluate.results import SCHEMA, Evaluation, HarnessResult
from kha_train.evaluate.scoring import evaluate
from kha_train.evaluate.text_model import DecoderModel, Text, TextModel
from kha_train.model.decoder import DecoderOutput
from kha_train.record.provenance import with_version
from kha_train.variants.registry import TASKS
from kha_train.variants.task import TaskOptions

Bar = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]
"""A progress bar with its title and total; inside its block, the function that adds to what is done."""
Damaged = Callable[[Path, CheckpointError], None]
"""Takes the directory of a damaged checkpoint, and what is wrong."""
BATCH_ROWS = 16


@dataclass(frozen=True)
class Request:
    """What to score: the tasks `names`, of our own and of the harness (none: all that the run measures itself), `rows`
    at a time, and `choice` about those of the harness. `prefix` names the special id before a text that nothing
    precedes ("": eos).
    """

    names: tuple[str, ...]
    choice: Choice
    prefix: str = ""
    rows: int = BATCH_ROWS


def suite_of(request: Request, config: RunConfig | None) -> Suite | None:
    """The tasks of the harness among those that are asked for, None without any. `config` is of the run whose tasks
    count. Raises as `Suite`."""
    own = _own_names(config)
    names = tuple(name for name in request.names if name not in own)
    return Suite(replace(request.choice, tasks=names)) if names else None


def _own_names(config: RunConfig | None) -> set[str]:
    """Names that are tasks of ours."""
    labels = {task.label or task.name for task in config.evaluation.tasks} if config else set()
    return {VALIDATION, *labels, *(name for name in TASKS if name != "harness")}


def _own_tasks(config: RunConfig, request: Request) -> tuple[Task[TaskOptions], ...]:
    """The tasks of a run, opened: all, or those with these names or labels: `validation` for every validation set, a
    registered task that the run does not have with its defaults.
    """
    config = replace(config, engine=replace(config.engine, micro_batch_size=request.rows))
    if not request.names:
        return open_tasks(config)
    names = [name for name in request.names if name in _own_names(config)]
    if not names:
        return ()
    chosen = [task for task in config.evaluation.tasks if (task.label or task.name) in names]
    known = {task.label or task.name for task in chosen}
    added = [name for name in names if name not in known and name != VALIDATION]
    further = [TASKS[name].options_class()(name=name) for name in added]
    opened = open_tasks(replace(config, evaluation=replace(config.evaluation, tasks=(*chosen, *further))))
    kept = {task.entries for task in (*chosen, *further)}
    return tuple(
        task
        for task in opened
        if task.options.entries in kept or (VALIDATION in names and task.options.entries.startswith(VALIDATION))
    )


def evaluate_model(
    model: TextModel, config: RunConfig | None, suite: Suite | None, request: Request, bar: Bar
) -> Evaluation:
    """The figures of a model in the tasks of `suite`, and in those of the run of `config` (None: of no run).

    Raises ConfigError and DataError as the tasks do.
    """
    if config is None and (suite is None or set(request.names) & _own_names(None)):
        raise ConfigError(
            "tasks of ours score rows of a run's data", field="tasks", value=",".join(request.names) or "none",
            allowed="tasks of the harness", fix="name the run with --run",
        )  # fmt: skip
    if config and model.vocabulary < config.model.vocab_size:
        raise ConfigError(
            "the rows of this run have ids that the model does not know", field="run", value=config.run.dir,
            allowed=f"a run of {model.vocabulary} ids, not {config.model.vocab_size}",
        )  # fmt: skip
    tasks = _own_tasks(config, request) if config else ()
    entries: dict[str, float] = {}
    for task in tasks:
        with bar(task.options.entries, None) as advance:
            entries |= evaluate(_Watched(model, advance), [task])
    return Evaluation(
        SCHEMA,
        with_version("kha_train"),
        None,
        None,
        entries,
        {task.options.entries: task.identity() for task in tasks},
        _of_the_harness(model, suite, request, bar) if suite else {},
    )


def evaluate_run(
    run_dir: Path, request: Request, damaged: Damaged, bar: Bar, *, every: bool = False, device: str = "auto"
) -> Iterator[Evaluation]:
    """The figures of the newest checkpoint of a run that verifies, or of `every` one, newest first. `run_dir` may be
    the directory of one checkpoint.

    A damaged checkpoint is reported to `damaged` and skipped. Raises ConfigError (no run, no checkpoint, no tokenizer),
    CheckpointError when all are damaged, and as `evaluate_model`.
    """
    home = layout.home_of(run_dir)
    config = load(home / "config.yaml")
    # An imported run has its tokenizer with it, and may have been moved.
    config = replace(config, run=replace(config.run, dir=str(home)))
    tokenizer = tokenizer_of(config)
    text = None if tokenizer is None else Text.of(tokenizer, config.model.seq_len, request.prefix)
    suite = suite_of(request, config)
    fault: CheckpointError | None = None
    found = False
    for path in [run_dir] if layout.is_checkpoint(run_dir) else _checkpoints(home):
        with ExitStack() as held:
            try:
                checkpoint = open_verified(path, World.single(), held)
            except CheckpointError as error:
                damaged(path, error)
                fault = error
                continue
            decoder = materialise(config, checkpoint, torch_device(device))
            step, manifest = checkpoint.step, manifest_sha256(path)
        decoder = absorb(decoder) if absorbing_helps(config) else decoder
        model = DecoderModel(decoder.eval(), text)
        made = evaluate_model(model, config, suite, request, bar)
        found = True
        yield replace(made, step=step, manifest=manifest)
        if not every:
            return
    if fault and not found:
        raise fault


def torch_device(name: str) -> torch.device:
    """`auto` is CUDA where it is. Raises ConfigError for another one that is not here."""
    if name not in ("auto", "cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise ConfigError("no such device here", field="device", value=name, allowed="auto, cpu, cuda")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


class _Watched:
    """A scorer that tells of every batch."""

    def __init__(self, scorer: Scorer, advance: Callable[[int], None]) -> None:
        self.world, self._scorer, self._advance = scorer.world, scorer, advance

    def evaluate(self, batch: Batch, by_token: bool = False) -> DecoderOutput:
        """See `Scorer.evaluate`."""
        found = self._scorer.evaluate(batch, by_token)
        self._advance(1)
        return found


def _of_the_harness(model: TextModel, suite: Suite, request: Request, bar: Bar) -> dict[str, HarnessResult]:
    """The results of the tasks of the harness."""
    asked = suite.ask(model.text)
    with bar(",".join(suite.choice.tasks), len(asked.rows) + len(asked.prompts)) as advance:
        scores = score_rows(model, asked.rows, request.rows, advance)
        texts = model.write(asked.prompts, request.rows, advance)
    found = suite.results(model.text, asked, scores, texts)
    harness = with_version("lm_eval")
    return {
        name: HarnessResult(result, request.choice.limit, model.text.prefix, harness) for name, result in found.items()
    }


def _checkpoints(run_dir: Path) -> list[Path]:
    """The directories of the checkpoints of a run, the newest first. Raises ConfigError when there is none."""
    check_not_lost(run_dir)
    found = dict(reversed(layout.candidates(run_dir / layout.FOLDER)))
    if not found:
        raise ConfigError("the run has no checkpoint yet", field="run", value=str(run_dir))
    return [found[step] for step in sorted(found, reverse=True)]
