"""A branch: a run that goes on from the whole state of another, under settings some of which may differ.

`resume` puts a run's own state back; here another run's is taken over: weights, moments, step counters, selection
biases, detectors, place in the data. Where nothing differs, the branch continues as its parent would have, bit for bit.
`MAY_BRANCH` lists what may differ. Besides, an interaction may be inserted where the parent has none, as the identity,
or absorbed into the projections where it is linear; nothing else may add or remove a parameter.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kha_train.checkpoint.layout import run_of
from kha_train.checkpoint.manifest import MANIFEST_FILE
from kha_train.checkpoint.reader import Checkpoint
from kha_train.config.compose import from_plain, quoted
from kha_train.config.constants import MAY_BRANCH, may_differ
from kha_train.config.saved import completed
from kha_train.config.schema import RunConfig
from kha_train.decode.absorb import AbsorbedWeights, absorbed_config
from kha_train.engine.contract import Engine
from kha_train.errors import ConfigError, KhaError, ResumeError, Settings, either
from kha_train.foreign.documents import Json
from kha_train.model.decoder import lay_out_decoder
from kha_train.model.init import not_identities
from kha_train.record import read_run
from kha_train.record.schema import Parent
from kha_train.train import resume
from kha_train.train.progress import Progress, SavedOrigin, going_on, read_state, restore_watch
from kha_train.train.rate_change import RateChange, rate_change
from kha_train.train.watch import Watch
from kha_train.variants.attention import FoldableOptions, InteractionOptions
from kha_train.variants.optimizer import MASTER

INTERACTION = "attention.interaction."
SAME_LOSS = (
    "run.steps", "optim.", "stability.zclip", "engine.", "checkpoint.", "data.global_batch_size", "data.batch_schedule",
    "data.seed", "data.shuffle", "data.skip_windows", "moe.bias_update", "moe.bias_update_rate", "moe.auxiliary_loss.",
    "moe.z_loss_weight", "moe.routing_seed",
)  # fmt: skip
"""Of what a branch may change, what leaves the loss of the next step where the parent's would have been."""
MEASURED = ("validation_content_id", "evaluation_content_id")
"""What names data that are scored and not trained on, or begins such a name."""
Change = tuple[str, Json, Json]
"""A setting, its value in the parent, its value in the branch."""


class Branch:
    """The whole state of the run that `checkpoint` belongs to, as the beginning of the run of `config`.

    `changes` are the settings that differ and matter, `rate` says how the learning rate changes with the first step.
    `inserted` names the parameters that begin as the identity with moments of zero, `absorbed` the projections that an
    interaction was multiplied into, whose moments begin at zero too: they belonged to other coordinates.
    `origin` is what checkpoints of the branch say of where it left its parent, `parent` what run.json and W&B say.
    `content_ids` name the data of this run (`data_content_id`, `validation_content_id`).

    Raises ResumeError where something differs that may not, ConfigError where no step is left to train, and
    CheckpointError where a state in the checkpoint is malformed or unknown to this release.
    """

    def __init__(self, config: RunConfig, checkpoint: Checkpoint, content_ids: Mapping[str, str]) -> None:
        self.checkpoint = checkpoint
        self.state = read_state(checkpoint, row_may_change=True)
        _check_steps(config, checkpoint)
        changes = resume.differences(config, self.state, content_ids)
        parent = _configuration(self.state.config)
        kind = _interaction_change(parent, config)
        self.changes = [change for change in changes if kind == "other" or not change[0].startswith(INTERACTION)]
        refused = [change for change in self.changes if not may_differ(change[0], MAY_BRANCH)]
        if refused := resume.not_allowed(config, refused):
            raise _refusal(config, checkpoint, refused)
        _check_kinds(config, checkpoint)
        self._absorbing = AbsorbedWeights(parent, checkpoint) if kind == "absorbed" and parent else None
        self.absorbed = self._absorbing.names if self._absorbing else set[str]()
        self.taken, self.inserted = _parameters(config, checkpoint, kind, self.absorbed)
        resume.check_shared_buffers(config, checkpoint)
        restore_watch(Watch(config), checkpoint)
        self.rate: RateChange | None = rate_change(config, self.state.config, self.state.progress.step)
        self.origin, self.parent = _origin(checkpoint, self.state.progress)

    def __call__(self, name: str, default: Callable[[], Tensor]) -> Tensor:
        """The initial value of a parameter: zeros where `restore` fills it, else the identity it is inserted as."""
        if name in self.absorbed:
            # A composition makes the heads of the model out of another number of them.
            return torch.zeros_like(default())
        shapes = self.checkpoint.names()
        return torch.zeros(shapes[name]) if name in shapes else default()

    @property
    def changes_the_loss(self) -> bool:
        """Whether the loss may jump with the first step: it is of other text, of longer rows or of another function."""
        return any(not may_differ(key, SAME_LOSS) for key, _, _ in self.changes if not key.startswith(MEASURED))

    def facts(self) -> dict[str, Any]:
        """The fields of the event `branched`."""
        return {
            "parent": self.parent["run_id"],
            "source": str(self.checkpoint.path),
            "manifest": self.parent["manifest"],
            "changes": [f"{key} {before} -> {now}" for key, before, now in self.changes],
            "inserted": self.inserted,
            "absorbed": sorted(self.absorbed),
            "skip_windows": [list(window) for window in self.state.progress.skip_windows],
        }

    def restore(self, engine: Engine) -> Progress:
        """Put masters, moments, buffers and step counters into `engine`, which was built with this as its initial
        values. Collective."""
        with engine.world.agreed(f"read {self.checkpoint.path}"), torch.no_grad():
            for fragment in engine.fragments():
                views = dict(fragment.views)
                if self._absorbing and fragment.name in self.absorbed:
                    master = views.pop(MASTER)
                    whole = self._absorbing.weight(fragment.name)
                    master.copy_(whole[fragment.start : fragment.start + master.numel()])
                    for moment in views.values():
                        moment.zero_()
                elif fragment.name in self.taken:
                    resume.read_into(views, fragment, self.checkpoint)
                engine.world.alive()
            self._restore_buffers(engine.buffers())
            engine.optimizer_steps = self.state.optimizer_steps
        engine.refresh_parameters()
        return going_on(self.state, engine.config)

    @property
    def run_dir(self) -> Path:
        """The directory of the parent."""
        return run_of(self.checkpoint.path)

    def _restore_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Those of the checkpoint; what a changed router counts beside begins fresh, but the steps that are done."""
        saved = self.checkpoint.buffers()
        for name, buffer in buffers.items():
            if name in saved:
                buffer.copy_(saved[name])
            elif name.rpartition(".")[2] == "steps_done":
                buffer.fill_(float(self.state.optimizer_steps))


def _origin(checkpoint: Checkpoint, progress: Progress) -> tuple[SavedOrigin, Parent]:
    """Where a branch leaves its parent, as checkpoints and as run.json say it."""
    run = read_run(run_of(checkpoint.path))
    before, run_id = run.get("parent"), str(run.get("run_id", ""))
    manifest = hashlib.sha256((checkpoint.path / MANIFEST_FILE).read_bytes()).hexdigest()
    origin: SavedOrigin = {
        "run_id": run_id,
        "step": checkpoint.step,
        "manifest": manifest,
        "samples": progress.trained_samples,
        "tokens": progress.tokens,
    }
    parent: Parent = {
        "run_id": run_id,
        "step": checkpoint.step,
        "manifest": manifest,
        "checkpoint": str(checkpoint.path),
        "ancestors": [*before["ancestors"], (before["run_id"], before["step"], before["manifest"])] if before else [],
    }
    return origin, parent


def _check_steps(config: RunConfig, checkpoint: Checkpoint) -> None:
    """Raises ConfigError where the steps of the parent are all that are asked for."""
    if config.run.steps <= checkpoint.step:
        raise ConfigError(
            f"the branch begins after step {checkpoint.step} of {checkpoint.path}: no step is left",
            field="run.steps",
            value=config.run.steps,
            allowed=f"above {checkpoint.step}, for the steps of the parent count",
            fix=Settings(f"run.steps={checkpoint.step + config.run.steps}"),
        )


def _check_kinds(config: RunConfig, checkpoint: Checkpoint) -> None:
    """Raises ResumeError for an optimiser that keeps other states than the checkpoint holds."""
    if {*checkpoint.kinds} != {*config.optim.kinds()}:
        raise ResumeError(
            "another optimiser than that of the checkpoint, whose states it could not go on with",
            field="optim.name",
            value=config.optim.name,
            allowed=f"one that keeps {', '.join(checkpoint.kinds[1:]) or 'none'}",
            fix=_weights_alone(checkpoint),
        )


def _refusal(config: RunConfig, checkpoint: Checkpoint, refused: list[Change]) -> ResumeError:
    table = "\n".join(f"  {key:<40} {before!r:>24} -> {now!r}" for key, before, now in refused)
    key, before, now = refused[0]
    return ResumeError(
        f"a branch of step {checkpoint.step} of {run_of(checkpoint.path)} may not differ from it in\n{table}\n ",
        field=key,
        value=now,
        allowed=f"{before!r}, as in the parent; docs/resume.md (Branch a run) lists what may differ",
        fix=either(*_ways(config, checkpoint, refused)),
    )


def _ways(config: RunConfig, checkpoint: Checkpoint, refused: list[Change]) -> Iterator[str]:
    """What can be typed instead: the parent's settings, a permission where the state still fits, the weights alone
    where their shapes do."""
    typed = [_typed(key, before) for key, before, _ in refused]
    if None in typed:
        yield f"the settings of the parent, in {run_of(checkpoint.path) / 'config.yaml'}"
    else:
        yield Settings(" ".join(filter(None, typed)))
    taken, shapes_fit, whole = resume.places(config, checkpoint)
    if whole:
        names = dict.fromkeys((*config.resume.allow_changes, *(key for key, _, _ in refused)))
        yield Settings(f"resume.allow_changes=[{','.join(names)}]")
    elif taken and shapes_fit:
        yield _weights_alone(checkpoint)


def _weights_alone(checkpoint: Checkpoint) -> Settings:
    source = shlex.quote(f"run.init_from={quoted(str(checkpoint.path))}")
    return Settings(f"run.branch_from='' {source}", "{} takes the weights alone")


def _typed(key: str, value: Json) -> str | None:
    """The override that gives `key` the `value`; None where that is not a setting by itself."""
    if "_content_id" in key or key.startswith("attention."):
        return None
    if key == "optim.name":
        # The preset brings the fields that this optimiser has.
        return f"optim={value}"
    if isinstance(value, bool | int | float):
        return f"{key}={str(value).lower()}"
    if isinstance(value, list) and all(isinstance(item, int | float) for item in value):
        return f"{key}=[{','.join(map(str, value))}]"
    return shlex.quote(f"{key}={quoted(value)}") if isinstance(value, str) else None


def _configuration(saved: Mapping[str, Any]) -> RunConfig | None:
    """The parent's configuration; None where this release cannot build it."""
    try:
        return from_plain(completed(saved))
    except KhaError:
        return None


Kind = Literal["same", "inserted", "absorbed", "other"]


def _interaction_change(parent: RunConfig | None, config: RunConfig) -> Kind:
    """What a branch of a run of `parent` does to the interaction, by its options; how it is computed does not count."""
    if parent is None:
        return "other"
    before, now = _plain(parent.attention.interaction), _plain(config.attention.interaction)
    if before == now:
        return "same"
    if before.name == "none":
        return "inserted"
    absorbed = absorbed_config(parent)
    return "absorbed" if absorbed and _plain(absorbed.attention.interaction) == now else "other"


def _plain(options: InteractionOptions) -> InteractionOptions:
    return replace(options, impl="eager") if isinstance(options, FoldableOptions) else options


def _parameters(
    config: RunConfig, checkpoint: Checkpoint, kind: Kind, absorbed: set[str]
) -> tuple[set[str], list[str]]:
    """The weights taken over, and those inserted. Raises ResumeError where others are new or left over, one but those
    in `absorbed` has another shape, or an inserted one does not begin as the identity."""
    taken, new, left_out, trained_by_one = resume.compare_parameters(config, checkpoint, absorbed)
    strangers = (new if kind != "inserted" else []) + (left_out if kind != "absorbed" else []) + trained_by_one
    if strangers:
        raise ResumeError(
            f"a branch of step {checkpoint.step} of {run_of(checkpoint.path)} has the parameters of its parent, "
            f"and {strangers[0]} is in one of them alone",
            field="run.branch_from",
            value=config.run.branch_from,
            allowed="the parent's model, with an interaction inserted as the identity or absorbed",
            fix=_weights_alone(checkpoint),
        )
    if new:
        _check_identity(config, new)
    return set(taken), new


def _check_identity(config: RunConfig, names: list[str]) -> None:
    """Raises ResumeError unless the weights `names` of the model leave heads as they are."""
    others = not_identities(lay_out_decoder(config), config.run.seed, names)
    if others:
        raise ResumeError(
            f"{others[0]} of an inserted interaction does not begin as the identity, so the branch would begin as "
            "another function than its parent",
            field="attention.interaction",
            value=config.attention.interaction.name,
            allowed="an interaction that leaves heads as they are until it has learned",
            fix=_begins_as_identity(config),
        )


def _begins_as_identity(config: RunConfig) -> str:
    """The fix for an interaction that does not begin as the identity."""
    options = config.attention.interaction
    has_none = None in options.identities(config.attention.heads()).values()
    ways = [f"{INTERACTION}init.kind=identity"] if getattr(options, "init", None) else []
    ways += [f"{INTERACTION}head_norm=false"] if getattr(options, "head_norm", False) else []
    ways += [f"{INTERACTION}component_heads=0"] if getattr(options, "component_heads", 0) and has_none else []
    by_layer = getattr(options, "component_heads_by_layer", ())
    ways += [f"{INTERACTION}component_heads_by_layer=[]"] if by_layer and has_none else []
    return Settings(" ".join(ways)) if ways else "another interaction"
