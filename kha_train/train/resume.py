"""What a checkpoint stores of a run, and whether a checkpoint fits the configuration it is resumed with."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kha_train.checkpoint.fit import FROZEN, check_buffers
from kha_train.checkpoint.loss import free_name
from kha_train.checkpoint.pieces import Piece
from kha_train.checkpoint.reader import Checkpoint
from kha_train.config.build import to_plain, with_seeds, without_places
from kha_train.config.compose import quoted
from kha_train.config.constants import FREE_TO_CHANGE, PRECISION_OF, may_differ
from kha_train.config.saved import completed
from kha_train.config.schema import RunConfig
from kha_train.engine.building import persistent_buffers
from kha_train.engine.contract import Engine, Fragment, InitialValue, seeded
from kha_train.errors import CheckpointError, DataError, ResumeError, Settings, either
from kha_train.foreign.documents import Json
from kha_train.model.decoder import lay_out_decoder
from kha_train.model.init import frozen_values
from kha_train.model.moe.router import RUN_STATE
from kha_train.record import Redactor, read_run
from kha_train.record.redact import REDACTED
from kha_train.train.progress import (
    CONTENT_IDS,
    FURTHER_IDS,
    Progress,
    TrainerState,
    going_on,
    read_state,
    restore_watch,
)
from kha_train.train.rate_change import RateChange, check_rate, rate_change, ways
from kha_train.train.watch import Watch
from kha_train.variants.optimizer import MASTER

_KEYS = {"data": "data.train, data.sources", "validation": "data.validation"}
_FURTHER_KEYS = {"validation": "validation.sets", "evaluation": "evaluation.tasks"}
"""What a content id begins with -> the settings that name its data; of ids with a name behind a dot."""


def attention_backend(run_dir: Path) -> str:
    """The attention backend of the last attempt of the run, from its record; "" where unknown."""
    return _last_recorded(run_dir, "attention_backend")


def kernels(run_dir: Path) -> str:
    """What computed each part that has kernels in the last attempt of the run, from its record (`kernel_choice`); ""
    where unknown, as in runs from before kernels were measured.
    """
    return _last_recorded(run_dir, "kernels")


def precision(run_dir: Path) -> str:
    """The resolved `engine.precision` of the last attempt of the run, from its record; "" where unknown."""
    return PRECISION_OF.get(_last_recorded(run_dir, "dtype"), "")


def _last_recorded(run_dir: Path, fact: str) -> str:
    run = read_run(run_dir)
    told = [run.get("provenance") or {}, *(attempt["changed"] for attempt in run.get("attempts", [])[-1:])]
    return next((facts[fact] for facts in reversed(told) if fact in facts), "")


def trainer_state(
    config: RunConfig, engine: Engine, progress: Progress, content_ids: dict[str, str], stability: dict[str, Any]
) -> dict[str, Any]:
    """What a checkpoint holds beside tensors; `stability` is the state of the `Watch`, `content_ids` what names the
    data (`data_content_id`, `validation_content_id`, and those of named sets and tasks)."""
    further = {name: content_id for name, content_id in content_ids.items() if name not in CONTENT_IDS}
    return {
        "progress": progress.to_plain(),
        "stability": stability,
        "optimizer_steps": engine.optimizer_steps,
        **{name: content_ids[name] for name in CONTENT_IDS if name in content_ids},
        **({FURTHER_IDS: further} if further else {}),
        "config": Redactor.from_environment().clean(to_plain(config)),
    }


def pieces(engine: Engine, to_host: Callable[[Tensor], Tensor] = Tensor.cpu) -> Iterator[Piece]:
    """This rank's share of masters and moments as a checkpoint stores it; `to_host` copies a 1-D view to the CPU."""
    for fragment in engine.fragments():
        for kind, view in fragment.views.items():
            # Moments in bf16 are stored as fp32, which represents them exactly.
            yield Piece(fragment.name, kind, fragment.shape, fragment.start, to_host(view.float()))


def check_belongs(
    config: RunConfig,
    checkpoint: Checkpoint,
    content_ids: dict[str, str],
    precisions: tuple[str, str] = ("", ""),
    *free: str,
) -> RateChange | None:
    """How the learning rate changes when the run continues; None if it does not. Raises ResumeError, with a table of
    the differences, when `checkpoint` was made by another model, data or schedule, and for a jump of the rate.

    `precisions` are the resolved `engine.precision` of the last attempt and of this one, each "" if unknown. A setting
    (or a whole section, or one of `content_ids`) in `resume.allow_changes` or `free` may differ. Parameters of other
    names or shapes, and an optimiser with other states, are always refused: the optimiser's state has no place for
    them.
    """
    state = read_state(checkpoint, _row_may_change(config))
    differing = not_allowed(config, differences(config, state, content_ids, precisions), *free)
    change = rate_change(config, state.config, state.progress.step)
    if differing:
        names = [key for key, _, _ in differing]
        table = "\n".join(f"  {key:<40} {before!r:>24} -> {now!r}" for key, before, now in differing)
        table += f"\n  {change}" if change else ""
        raise ResumeError(
            f"the checkpoint of step {checkpoint.step} belongs to another run:\n{table}\n ",
            field="run.dir",
            value=config.run.dir,
            fix=either("restore the old settings", *_typed_ways(config, checkpoint, ways(config, change, names))),
            code="E08",
        )
    if {*checkpoint.kinds} != {*config.optim.kinds()}:
        raise ResumeError(
            f"the checkpoint of step {checkpoint.step} holds the states of another optimiser",
            field="optim.name",
            value=config.optim.name,
            allowed=f"one that keeps {', '.join(checkpoint.kinds[1:]) or 'none'}",
            fix=either("restore the old settings", *_typed_ways(config, checkpoint)),
            code="E08",
        )
    _, new, left_out, trained_by_one = compare_parameters(config, checkpoint)
    others = new + left_out + trained_by_one
    if others:
        raise ResumeError(
            f"the checkpoint of step {checkpoint.step} holds other parameters, such as {others[0]}",
            field="run.dir",
            value=config.run.dir,
            fix=either("restore the old settings", *_typed_ways(config, checkpoint)),
            code="E08",
        )
    check_rate(config, change)
    return change


def _typed_ways(config: RunConfig, checkpoint: Checkpoint, allowing: Sequence[Settings] = ()) -> Iterator[Settings]:
    """What can be typed instead of resuming `checkpoint`: a new run that begins with these weights, if their shapes
    agree; and `allowing`, the settings that allow the changes, if the checkpoint then has everything that is restored.
    """
    taken, shapes_fit, whole = places(config, checkpoint)
    begin = [f"run.dir={quoted(str(free_name(Path(config.run.dir), 'new')))}"]
    begin += [f"run.init_from={quoted(str(checkpoint.path))}"] if taken and shapes_fit else []
    yield Settings(shlex.join(begin))
    if whole:
        yield from allowing


def places(config: RunConfig, checkpoint: Checkpoint) -> tuple[bool, bool, bool]:
    """Whether the model has tensors of `checkpoint`; whether those that both have agree in shape; whether the model,
    its optimiser and the detectors have the state that is in it, no more and no less."""
    decoder = lay_out_decoder(config)
    tensors = dict(decoder.named_parameters()) | persistent_buffers(decoder)
    model = {name: tuple(value.shape) for name, value in tensors.items()}
    saved = checkpoint.names() | {name: entry.shape for name, entry in checkpoint.manifest.contents.buffers.items()}
    both, detectors_fit = model.keys() & saved.keys(), True
    shapes_fit = all(model[name] == saved[name] for name in both)
    try:
        restore_watch(Watch(config), checkpoint)
    except CheckpointError:
        detectors_fit = False
    same_states = {*checkpoint.kinds} == {*config.optim.kinds()}
    return bool(both), shapes_fit, shapes_fit and same_states and detectors_fit and model.keys() == saved.keys()


def not_allowed(config: RunConfig, changes: list[tuple[str, Json, Json]], *free: str) -> list[tuple[str, Json, Json]]:
    """Those of `changes` (setting, before, now) that neither `resume.allow_changes` nor `free` allows."""
    names = (*config.resume.allow_changes, *free)
    return [change for change in changes if not any(f"{change[0]}.".startswith(f"{name}.") for name in names)]


def check_same_data(first: dict[str, str], content_ids: dict[str, str]) -> None:
    """Raises DataError when this rank's datasets differ from those of the first rank."""
    for name, content_id in content_ids.items():
        if content_id != first[name]:
            raise DataError(
                f"this rank reads other data than rank 0: expected {name} {first[name][:12]}, found {content_id[:12]}",
                field=_KEYS[name.partition("_")[0]] if "." not in name else _FURTHER_KEYS[name.partition("_")[0]],
                fix="give every node the same copy of the dataset",
            )


def differences(
    config: RunConfig, state: TrainerState, content_ids: Mapping[str, str], precisions: tuple[str, str] = ("", "")
) -> list[tuple[str, Json, Json]]:
    """(setting, its value in the `state` of a checkpoint, its value now) for everything that a run may not change
    unless allowed. Arguments as in `check_belongs`.

    A setting that the checkpoint's release lacked has its declared earlier value.
    """
    # A checkpoint that does not identify its data is not refused for that.
    before = {name: state.content_ids.get(name, content_id)[:12] for name, content_id in content_ids.items()}
    now: dict[str, Any] = {name: content_id[:12] for name, content_id in content_ids.items()}
    if all(precisions):
        # `auto` means another precision on another device, and the same as the name of its precision on this one.
        before["engine.precision"], now["engine.precision"] = precisions
    return changed_settings(config, state.config, before, now)


def changed_settings(
    config: RunConfig, saved_config: Mapping[str, Any], before: Mapping[str, Any] = {}, after: Mapping[str, Any] = {}
) -> list[tuple[str, Json, Json]]:
    """(setting, its value in `saved_config`, its value now) for everything that a run may not change unless allowed.
    `before` and `after` replace or add values.
    """
    clean = Redactor.from_environment().clean
    saved = with_seeds(without_places(completed(saved_config))) | dict(before)
    now = with_seeds(without_places(to_plain(config))) | dict(after)
    return [
        (key, saved.get(key), clean(now.get(key)))
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
        and not may_differ(key, FREE_TO_CHANGE, saved, now)
        and REDACTED not in str(saved.get(key))
    ]


def resumed(checkpoint: Checkpoint | None) -> InitialValue:
    """Initial values of the decoder: zeros when `checkpoint` will be restored into it, else the seeded defaults.

    So a rank reads only its own share of a checkpoint; the other weights are gathered from the other ranks' masters.
    """
    if checkpoint is None:
        return seeded
    shapes = checkpoint.names()
    return lambda name, default: torch.zeros(shapes[name])


class Inherited:
    """Initial values for a new run: the weights of another run's checkpoint where it has them, else the defaults.

    As on a resume, a shared parameter starts as zeros, and `fill` writes its fp32 master, so that the masters equal
    those of the checkpoint in every precision. `taken`, `new` and `left_out` name the weights found in both, only in
    this model, only in the checkpoint; a matrix may be trained in one of the runs alone. Raises ResumeError when a
    parameter of both has different shapes, and as `check_shared_buffers`.
    """

    def __init__(self, config: RunConfig, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.taken, self.new, self.left_out, _ = compare_parameters(config, checkpoint)
        check_shared_buffers(config, checkpoint)

    def __call__(self, name: str, default: Callable[[], Tensor]) -> Tensor:
        shapes = saved_weights(self.checkpoint)
        return torch.zeros(shapes[name]) if name in shapes else default()

    def fill(self, engine: Engine) -> None:
        """Copy masters and selection biases of the checkpoint into `engine`, bit for bit; weights are the rounded
        masters. Collective.

        Selection biases choose experts, like weights. The other run's step counter is not taken; otherwise this run
        would skip its routing warm-up.
        """
        trained, taken = self.checkpoint.names(), set(self.taken)
        with engine.world.agreed(f"read {self.checkpoint.path}"), torch.no_grad():
            saved = self.checkpoint.buffers()
            for fragment in engine.fragments():
                master = fragment.views[MASTER]
                if fragment.name in trained:
                    read_into({MASTER: master}, fragment, self.checkpoint)
                elif fragment.name in taken:
                    frozen = saved[fragment.name].flatten()
                    master.copy_(frozen[fragment.start : fragment.start + master.numel()])
                engine.world.alive()
            for name, buffer in engine.buffers().items():
                if name in trained:
                    buffer.copy_(self.checkpoint.read(name, MASTER).view(buffer.shape))
                elif name in saved and name.rpartition(".")[2] not in RUN_STATE:
                    buffer.copy_(saved[name])
        engine.refresh_parameters()


class ComparedWeights(NamedTuple):
    """The names of weights, trained or not: in the model and the checkpoint, in one of them alone, and of those in both
    the ones that only one of them trains.
    """

    taken: list[str]
    new: list[str]
    left_out: list[str]
    trained_by_one: list[str]


def compare_parameters(config: RunConfig, checkpoint: Checkpoint, reshaped: Collection[str] = ()) -> ComparedWeights:
    """Which weights the model and `checkpoint` have. Raises ResumeError for one name with two shapes, unless it is in
    `reshaped`.
    """
    decoder = lay_out_decoder(config)
    trained = {name: tuple(value.shape) for name, value in decoder.named_parameters()}
    frozen = {name: owner.get_buffer(local) for owner, local, name, _ in frozen_values(decoder, config.run.seed)}
    model = trained | {name: tuple(value.shape) for name, value in frozen.items()}
    saved = saved_weights(checkpoint)
    taken = [name for name in model if name in saved]
    for name in taken:
        if model[name] != saved[name] and name not in reshaped:
            origin = next((key for key in ("branch_from", "init_from") if getattr(config.run, key)), "")
            without = f" without run.{origin}" if origin else ""
            raise ResumeError(
                "two shapes of one parameter",
                field=name,
                value=list(model[name]),
                allowed=f"{list(saved[name])}",
                fix=f"a checkpoint of a model of these shapes, or a new run in another run.dir{without}",
            )
    return ComparedWeights(
        taken,
        [name for name in model if name not in saved],
        [name for name in saved if name not in model],
        [name for name in taken if (name in trained) != (name in checkpoint.names())],
    )


def saved_weights(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The shape of every weight in `checkpoint` by name: its parameters, and matrices that were not trained."""
    buffers = checkpoint.manifest.contents.buffers
    return checkpoint.names() | {
        name: entry.shape for name, entry in buffers.items() if name.rpartition(".")[2] == FROZEN
    }


def check_shared_buffers(config: RunConfig, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError unless the buffers that the model and `checkpoint` both have agree in shape, FormatError
    for an unknown kind of buffer."""
    buffers, saved = persistent_buffers(lay_out_decoder(config)), checkpoint.manifest.contents.buffers
    check_buffers(checkpoint, {name: tuple(buffer.shape) for name, buffer in buffers.items() if name in saved})


def read_into(views: dict[str, Tensor], fragment: Fragment, checkpoint: Checkpoint) -> None:
    """Fill views of `fragment`, by kind, with the checkpoint's values of that part of the parameter."""
    for kind, view in views.items():
        view.copy_(checkpoint.read(fragment.name, kind, fragment.start, view.numel()))


def restore(engine: Engine, checkpoint: Checkpoint) -> Progress:
    """Copy masters, moments, buffers and step counters of `checkpoint` into `engine`, bit for bit. Collective."""
    with engine.world.agreed(f"read {checkpoint.path}"), torch.no_grad():
        for fragment in engine.fragments():
            read_into(fragment.views, fragment, checkpoint)
            engine.world.alive()
        state, buffers = read_state(checkpoint, _row_may_change(engine.config)), engine.buffers()
        check_buffers(checkpoint, {name: tuple(buffer.shape) for name, buffer in buffers.items()})
        saved = checkpoint.buffers()
        for name, buffer in buffers.items():
            buffer.copy_(saved[name])
        engine.optimizer_steps = state.optimizer_steps
    engine.refresh_parameters()
    return going_on(state, engine.config)


def _row_may_change(config: RunConfig) -> bool:
    """Whether rows of another length may have been read before: the tokens then do not follow from the samples."""
    return any(name in ("model", "model.seq_len") for name in config.resume.allow_changes)
