"""The arms of a replay: what is changed, one thing at a time, to see whether an event still happens.

An arm takes the configuration of the replay and returns it with one change, or says why it does not apply to this run.
`ARMS` lists all of them, in the order in which they run and are named.
"""

# P the elements of one parameter

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

from kha_train.checkpoint.layout import FOLDER, candidates
from kha_train.checkpoint.reader import Checkpoint, check_sizes
from kha_train.checkpoint.rewrite import rewritten
from kha_train.config.compose import compose
from kha_train.config.schema import RunConfig
from kha_train.config.validate import validate
from kha_train.decode.absorb import absorbed_config
from kha_train.errors import KhaError
from kha_train.model.decoder import lay_out_decoder
from kha_train.model.init import initial_values
from kha_train.operate.stretch import Stretch
from kha_train.stability.events import SpikeEvent
from kha_train.variants.optimizer import MASTER

OUTLYING = 8.0
"""How many times as large as usual (root mean square) a matrix is before `usual_scale` shrinks it."""


@dataclass(frozen=True)
class Case:
    """The event to explain, the stretch that is replayed, and its configuration. `precision` is the resolved one of
    these steps ("": unknown). Copies of the checkpoint go to `place`."""

    event: SpikeEvent
    stretch: Stretch
    config: RunConfig
    precision: Literal["", "fp32", "bf16"]
    place: Path

    def batch(self, step: int) -> tuple[int, int]:
        """The first and the last sample of the batch of `step`, which is one of the stretch."""
        run = self.stretch.run
        [at] = (run.steps == step).nonzero()[0].tolist()
        first, last = (int(run.columns.whole(name, -1)[at]) for name in ("samples_first", "samples_last"))
        return first, last


class Change(NamedTuple):
    """One change: `words` say it after "gone", `accuses` names the cause where it removes the event, `configs` has the
    configuration of each replay."""

    words: str
    accuses: str
    configs: tuple[RunConfig, ...]


Make = Callable[[Case, int], Change | str]
"""(case, number of replays where chance is involved) -> the change, or why there is none."""


class ArmKind(NamedTuple):
    """An entry of `ARMS`: what its changes have in common with others (`family`), and how it is made."""

    family: str
    make: Make


def changes(case: Case, names: Mapping[str, ArmKind], replays: int) -> Iterator[tuple[str, str, Change | str]]:
    """(name, family, change or the reason why there is none) of every arm in `names`. What one arm lacks, such as an
    attention backend in fp32 or room for a copy of the checkpoint, does not keep others from being made."""
    for name, kind in names.items():
        made: Change | str
        try:
            made = kind.make(case, replays)
            for config in made.configs if isinstance(made, Change) else ():
                validate(config, to_train=False)
        except KhaError as error:
            made = f"the run does not admit it: {error}"
        yield name, kind.family, made


def _set(config: RunConfig, section: str, **values: Any) -> RunConfig:
    return replace(config, **{section: replace(getattr(config, section), **values)})


def _skipping(config: RunConfig, first: int, last: int) -> RunConfig:
    """Without the samples `first` to `last`."""
    return _set(config, "data", skip_windows=(*config.data.skip_windows, (first, last + 1)))


def _without_batch(case: Case, replays: int) -> Change | str:
    return _without_batch_of(case, case.event.start_step)


def _without_previous(case: Case, replays: int) -> Change | str:
    """A loss is that of the weights before its step, so the batch of the step before may have harmed them."""
    if case.event.start_step - 1 <= case.stretch.first:
        return "the replay begins after the step before the event"
    return _without_batch_of(case, case.event.start_step - 1)


def _without_batch_of(case: Case, step: int) -> Change:
    first, last = case.batch(step)
    accused = f"the batch of step {step} (samples {first} to {last})"
    return Change(f"without the batch of step {step}", accused, (_skipping(case.config, first, last),))


def _without_window(case: Case, replays: int) -> Change | str:
    event = case.event
    if event.end_step == event.start_step:
        return "the event has one step, whose batch is left out already"
    first, last = event.samples_first, event.samples_last
    words = f"without the data of steps {event.start_step} to {event.end_step}"
    accused = f"the data of steps {event.start_step} to {event.end_step} (samples {first} to {last})"
    return Change(words, accused, (_skipping(case.config, first, last),))


def _other_order(case: Case, replays: int) -> Change | str:
    seeds = [case.config.data_seed + 1 + number for number in range(replays)]
    configs = tuple(_set(case.config, "data", seed=seed) for seed in seeds)
    since = case.stretch.first + 1
    return Change("with the data in another order", f"the order of the data since step {since}", configs)


def _half_rate(case: Case, replays: int) -> Change | str:
    return _rate(case, 2, "half")


def _tenth_rate(case: Case, replays: int) -> Change | str:
    return _rate(case, 10, "a tenth of")


def _rate(case: Case, divisor: int, words: str) -> Change:
    config = _set(case.config, "optim", lr=case.config.optim.lr / divisor)
    return Change(f"with {words} the rate", f"the learning rate ({case.event.lr:.3g} at its first step)", (config,))


def _tighter_clip(case: Case, replays: int) -> Change | str:
    usual, clip = case.event.gnorm_before, case.config.optim.grad_clip
    limit = min(clip / 2, usual) if math.isfinite(usual) and usual > 0 else clip / 2
    words = f"with gradients clipped to {limit:.3g} instead of {clip:.3g}"
    return Change(words, "the size of its gradients", (_set(case.config, "optim", grad_clip=limit),))


def _fp32_router(case: Case, replays: int) -> Change | str:
    if not case.config.moe.experts or case.config.moe.router_precision == "fp32":
        return "the router is fp32 already" if case.config.moe.experts else "the model has no experts"
    return Change(
        "with the router in fp32",
        "the router's precision (bf16)",
        (_set(case.config, "moe", router_precision="fp32"),),
    )


def _fp32_everywhere(case: Case, replays: int) -> Change | str:
    engine, router = case.config.engine, case.config.moe.router_precision if case.config.moe.experts else "fp32"
    if {case.precision, engine.grad_accum_dtype, engine.moment_dtype, router} == {"fp32"}:
        return "everything is fp32 already"
    config = _set(case.config, "engine", precision="fp32", grad_accum_dtype="fp32", moment_dtype="fp32")
    return Change("with everything in fp32", "low precision", (_set(config, "moe", router_precision="fp32"),))


def _frozen_biases(case: Case, replays: int) -> Change | str:
    if not case.config.moe.experts or not case.config.moe.bias_update_rate:
        return "no selection bias is updated"
    config = _set(case.config, "moe", bias_update_rate=0.0)
    return Change("with the selection biases frozen", "the updates of the router's selection biases", (config,))


def _warmup_seed(case: Case, replays: int) -> Change | str:
    if not case.config.moe.experts or case.config.moe.routing_warmup_steps <= case.stretch.first:
        return "no routing warm-up at these steps"
    seeds = [case.config.routing_seed + 1 + number for number in range(replays)]
    configs = tuple(_set(case.config, "moe", routing_seed=seed) for seed in seeds)
    return Change("with another seed of the routing warm-up", "the random scores of the routing warm-up", configs)


def _kha_inserted(case: Case, replays: int) -> Change | str:
    options, shape = case.config.attention.interaction, case.config.attention.heads()
    if options.parameters(shape) + options.frozen_numbers(shape):
        return f"the run has an interaction already ({options.name})"
    if case.stretch.source is None:
        return "the run begins here: there is no saved state to insert it into"
    inserted = compose(["interaction@attention.interaction=knocking_linear"]).attention.interaction
    config = _set(case.config, "attention", interaction=inserted)
    validate(config)
    return Change("with KHA-Linear inserted as the identity", "attention without an interaction of heads", (config,))


def _kha_removed(case: Case, replays: int) -> Change | str:
    name, absorbed = case.config.attention.interaction.name, absorbed_config(case.config)
    if name == "none" or case.stretch.source is None:
        return "the run has no interaction to remove" if name == "none" else "the run begins here: nothing is learned"
    if absorbed is None or absorbed.attention.interaction == case.config.attention.interaction:
        return f"{name} is not linear, so it cannot be multiplied into the projections"
    return Change("with the interaction of heads absorbed", "the interaction of heads", (absorbed,))


def _usual_scale(case: Case, replays: int) -> Change | str:
    if case.stretch.source is None:
        return "the run begins here with its own initial values"
    checkpoint = Checkpoint(case.stretch.source, check_sizes(case.stretch.source))
    factors = outlying(checkpoint, case.config)
    if not factors:
        return f"no matrix is {OUTLYING:g} times as large as its like in other layers and as its initial value"

    # An earlier call made the same one.
    copy = dict(candidates(case.place / FOLDER)).get(checkpoint.step) or rewritten(
        checkpoint,
        case.place,
        lambda name, kind, values_P: values_P / factors[name] if kind == MASTER and name in factors else values_P,
    )
    told = ", ".join(f"{name} ({factor:.3g} x)" for name, factor in sorted(factors.items())[:4])
    config = _set(case.config, "run", branch_from=str(copy.resolve()))
    return Change("with outlying matrices at their usual scale", f"huge values in {told}", (config,))


def outlying(checkpoint: Checkpoint, config: RunConfig) -> dict[str, float]:
    """The matrices of layers in `checkpoint` that are `OUTLYING` times as large (root mean square) as their like in the
    other layers, the median, and as their own initial values: name -> that factor. What no layer has, such as an
    embedding, is like nothing else."""
    sizes: dict[str, float] = {}
    initial: dict[str, float] = {}
    shapes = checkpoint.names()
    for _, _, name, draw in initial_values(lay_out_decoder(config), config.run.seed):
        if len(shapes.get(name, ())) >= 2 and _without_layer(name) != name:
            sizes[name] = float(checkpoint.read(name, MASTER).double().square().mean().sqrt())
            initial[name] = float(draw().double().square().mean().sqrt())
    found = {}
    for name, size in sizes.items():
        kind = _without_layer(name)
        alike = [sizes[other] for other in sizes if other != name and _without_layer(other) == kind]
        usual = max(initial[name], median(alike) if alike else 0.0)
        if usual > 0 and size >= OUTLYING * usual:
            found[name] = size / usual
    return found


def _without_layer(name: str) -> str:
    return re.sub(r"\.[0-9]+\.", ".*.", name)


def _rounding(case: Case, replays: int) -> Change | str:
    """Cross-entropies are summed in smaller chunks: the same function, other last bits. Chance is involved."""
    tokens = min(case.config.model.loss_chunk_tokens, case.config.model.seq_len * case.config.engine.micro_batch_size)
    if tokens < 2:
        return "a loss of one token has one order of sums"
    chunks = dict.fromkeys(max(1, tokens // (3 + number)) for number in range(replays))
    configs = tuple(_set(case.config, "model", loss_chunk_tokens=chunk) for chunk in chunks)
    return Change("with another rounding", "chance", configs)


ARMS: dict[str, ArmKind] = {
    "without_batch": ArmKind("data", _without_batch),
    "without_previous": ArmKind("data", _without_previous),
    "without_window": ArmKind("data", _without_window),
    "other_order": ArmKind("data", _other_order),
    "half_rate": ArmKind("rate", _half_rate),
    "tenth_rate": ArmKind("rate", _tenth_rate),
    "tighter_clip": ArmKind("clipping", _tighter_clip),
    "fp32_router": ArmKind("router precision", _fp32_router),
    "fp32_everywhere": ArmKind("precision", _fp32_everywhere),
    "frozen_biases": ArmKind("router biases", _frozen_biases),
    "warmup_seed": ArmKind("routing warm-up", _warmup_seed),
    "kha_inserted": ArmKind("interaction", _kha_inserted),
    "kha_removed": ArmKind("interaction", _kha_removed),
    "usual_scale": ArmKind("scale", _usual_scale),
    "rounding": ArmKind("rounding", _rounding),
}
"""Name -> arm, in the order in which they run. Within a family the smallest change comes first: it names the cause."""
