"""Capsules: the smallest state, rows and steps that still show the beginning of an event, in one directory.

A capsule shows an event when its last step stands out from the event's baseline, and no step before it does. It begins
with the state one step before the event, so that the step into it is there too. Rows of the batch, layers, and the
optimiser's moments are left out as long as the event still shows, by delta debugging (Zeller and Hildebrandt 2002).

A capsule is computed by the plain engine in one process on a CPU, without the policies of `stability`. So its losses
are its own: close to those of the run where nothing was left out, and to be reproduced bit for bit from the capsule.

    capsule.json       settings, expected losses, what was left out
    samples.json       the rows of each step: ids, borders of documents, masked labels
    checkpoints/       the state, as a checkpoint: weights, buffers, and moments if the event needs them
    README.md          what this is, and the command
"""

# B, N rows   W places of a row and the id after it   S borders of segments   M masked labels

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor

from kha_train.analysis.runs import RunData
from kha_train.checkpoint.background import BackgroundWriter
from kha_train.checkpoint.layout import FOLDER, candidates
from kha_train.checkpoint.manifest import Kinds
from kha_train.checkpoint.pieces import Piece
from kha_train.checkpoint.reader import Checkpoint, verify
from kha_train.config.build import to_plain
from kha_train.config.schema import RunConfig
from kha_train.config.validate import validate
from kha_train.data.rows.batch import Batch
from kha_train.data.rows.packing import Layout
from kha_train.data.stream import open_stream
from kha_train.distributed import World
from kha_train.engine.contract import Engine
from kha_train.engine.default import engine_for
from kha_train.errors import ConfigError
from kha_train.model.device import resolve_on
from kha_train.operate.arms import Case
from kha_train.operate.stretch import Launch, compute
from kha_train.record.files import write_json, write_text
from kha_train.stability.events import OPEN_Z, SpikeEvent
from kha_train.train.progress import going_on, read_state
from kha_train.train.step import train_step
from kha_train.variants.attention import FoldableOptions
from kha_train.variants.backends import TRAITS
from kha_train.variants.optimizer import MASTER

CAPSULE_FILE, SAMPLES_FILE = "capsule.json", "samples.json"
T = TypeVar("T")


class Row(TypedDict):
    """A row of a batch: its sample number, its ids with the one that follows, the ends of its segments, the places with
    a masked label, and the number of its tokens (None: all)."""

    sample: int
    ids: list[int]
    borders: list[int]
    masked: list[int]
    filled: int | None


class CapsuleFile(TypedDict):
    """`CAPSULE_FILE`."""

    run_id: str
    step: int
    config: dict[str, Any]
    baseline: float
    scale: float
    rates: list[float]
    losses: list[float]
    optimizer_steps: int
    left_out: list[str]


class SamplesFile(TypedDict):
    """`SAMPLES_FILE`: the rows of each step."""

    steps: list[list[Row]]


@dataclass(frozen=True)
class Excerpt:
    """A part of a run: the state of `checkpoint` without layers other than `layers`, with or without `moments`, and the
    rows at the places `rows` of the batch of each step."""

    checkpoint: Checkpoint
    config: RunConfig
    steps: tuple[tuple[Row, ...], ...]
    rates: tuple[float, ...]
    optimizer_steps: int
    layers: tuple[int, ...]
    rows: tuple[int, ...]
    moments: bool = True

    @property
    def small_config(self) -> RunConfig:
        """The settings without the layers and rows that are left out."""
        dense = sum(layer < self.config.moe.dense_layers for layer in self.layers)
        model, moe = self.config.model, replace(self.config.moe, dense_layers=dense)
        none = replace(moe, experts=0, top_k=0, expert_width=0, shared_experts=0)
        experts = moe if dense < len(self.layers) else none
        data = replace(self.config.data, global_batch_size=len(self.rows), batch_schedule=())
        return replace(self.config, model=replace(model, layers=len(self.layers)), moe=experts, data=data)

    @property
    def small_steps(self) -> list[list[Row]]:
        """The rows of each step that are kept. A step that has none of them, because of its size, stays whole."""
        kept = ([step[place] for place in self.rows if place < len(step)] for step in self.steps)
        return [few or list(step) for few, step in zip(kept, self.steps, strict=True)]

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is kept of each parameter."""
        return self.checkpoint.kinds if self.moments else (MASTER,)

    def old_name(self, name: str) -> str:
        """The name in the checkpoint of the parameter or buffer `name` of the smaller model."""
        head, _, rest = name.partition("blocks.")
        number, _, tail = rest.partition(".")
        return f"{head}blocks.{self.layers[int(number)]}.{tail}" if rest else name

    def losses(self) -> list[float]:
        """The loss of every step, from this state."""
        validate(self.small_config, to_train=False)
        saved = self.checkpoint.buffers()
        return train_steps(
            self.small_config,
            self.kinds,
            lambda name, kind, start, count: self.checkpoint.read(self.old_name(name), kind, start, count),
            lambda name: saved[self.old_name(name)],
            self.optimizer_steps if self.moments else 0,
            self.small_steps,
            self.rates,
        )


def train_steps(
    config: RunConfig,
    kinds: Sequence[str],
    read: Callable[[str, str, int, int], Tensor],
    buffer: Callable[[str], Tensor],
    optimizer_steps: int,
    steps: Sequence[Sequence[Row]],
    rates: Sequence[float],
) -> list[float]:
    """The loss of every step of the model of `config`, from the state that `read` (parameter, kind, start, length) and
    `buffer` (name) give. Of `kinds` that are missing the state begins as zero."""
    engine = _engine(config)
    with torch.no_grad():
        for fragment in engine.fragments():
            for kind, view in fragment.views.items():
                if kind in kinds:
                    view.copy_(read(fragment.name, kind, fragment.start, view.numel()))
        for name, values in engine.buffers().items():
            values.copy_(buffer(name))
    engine.optimizer_steps = optimizer_steps
    engine.refresh_parameters()
    losses = []
    for rows, rate in zip(steps, rates, strict=True):
        batch = batch_of(rows)
        batch.step_tokens = batch.token_count
        losses.append(train_step(engine, batch, batch.label_count, rate).loss)
    engine.close()
    return losses


def _engine(config: RunConfig) -> Engine:
    return engine_for(config, 1)(config, World.single(), resolved=resolve_on(config, torch.device("cpu")))


def rows_of(batch: Batch) -> tuple[Row, ...]:
    """The rows of `batch`, one by one."""
    layouts = batch.layout.parts(1, batch.rows_BW.shape[1] - 1)
    return tuple(
        Row(
            sample=int(sample),
            ids=ids.tolist(),
            borders=layout.borders_S.tolist(),
            masked=layout.masked_M.tolist(),
            filled=None if layout.filled_N is None else int(layout.filled_N[0]),
        )
        for sample, ids, layout in zip(batch.samples_B, batch.rows_BW, layouts, strict=True)
    )


def batch_of(rows: Sequence[Row]) -> Batch:
    """The batch of `rows`: the inverse of `rows_of`."""
    length = len(rows[0]["ids"]) - 1
    borders = [0, *(place + length * at for at, row in enumerate(rows) for place in row["borders"][1:])]
    masked = [place + length * at for at, row in enumerate(rows) for place in row["masked"]]
    filled = [row["filled"] for row in rows]
    layout = Layout(
        np.array(borders, dtype=np.int64),
        np.array(masked, dtype=np.int64),
        None if None in filled else np.array(filled, dtype=np.int64),
    )
    samples = np.array([row["sample"] for row in rows], dtype=np.int64)
    return Batch(samples, np.array([row["ids"] for row in rows], dtype=np.uint32), layout)


def shows(losses: Sequence[float], baseline: float, scale: float) -> bool:
    """Whether the last of `losses` stands out, and no other does."""
    standing_out = [not math.isfinite(loss) or (loss - baseline) / scale >= OPEN_Z for loss in losses]
    return standing_out[-1] and not any(standing_out[:-1])


def smallest(items: tuple[T, ...], still: Callable[[tuple[T, ...]], bool]) -> tuple[T, ...]:
    """A part of `items` for which `still` holds, as it does for all of them, and from which no single one can be left
    out: ddmin of delta debugging."""
    parts = 2
    while len(items) >= 2:
        cuts = [len(items) * at // parts for at in range(parts + 1)]
        chunks = [items[first:last] for first, last in pairwise(cuts)]
        others = [tuple(item for chunk in chunks[:at] + chunks[at + 1 :] for item in chunk) for at in range(parts)]
        found = next((tried for tried in (*chunks, *(others if parts > 2 else ())) if still(tried)), None)
        if found is not None:
            items, parts = found, 2 if found in chunks else max(parts - 1, 2)
        elif parts >= len(items):
            break
        else:
            parts = min(2 * parts, len(items))
    return items


def write_capsule(run: RunData, case: Case, out: Path, tell: Callable[[str], None], launch: Launch) -> CapsuleFile:
    """Make a capsule of the event of `case` in the new directory `out`; returns its description.

    Raises ConfigError when `out` is not empty, when nothing was saved before the event, and when it does not show in
    one process; KhaError when the state before it cannot be computed.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError("not an empty directory", field="--capsule", value=str(out), fix="name a new directory")
    event, whole = case.event, _excerpt(run, case, tell, launch)
    still = partial(_still, event)
    if not still(whole):
        raise ConfigError(
            "the event does not show in one process, from the state before it",
            field="--capsule",
            value=f"losses {whole.losses()} against {event.baseline + OPEN_Z * event.scale:.4g}",
        )
    tell(f"rows of {len(whole.rows)}, layers of {len(whole.layers)}: leaving out what the event shows without")
    small = replace(whole, rows=smallest(whole.rows, lambda rows: still(replace(whole, rows=rows))))
    small = replace(small, layers=smallest(small.layers, lambda layers: still(replace(small, layers=layers))))
    without = replace(small, moments=False)
    small = without if still(without) else small
    return _write(run, event, whole, small, out)


def _still(event: SpikeEvent, excerpt: Excerpt) -> bool:
    try:
        return shows(excerpt.losses(), event.baseline, event.scale)
    except ConfigError:
        # Settings that need what is left out.
        return False


def _excerpt(run: RunData, case: Case, tell: Callable[[str], None], launch: Launch) -> Excerpt:
    """The whole state one step before the event (or the last one before it), and the steps into the event."""
    begin = max(case.stretch.first, case.event.start_step - 2)
    source = case.stretch.source
    if begin > case.stretch.first:
        place = case.place / "before"
        place.mkdir(parents=True, exist_ok=True)
        tell(f"the state after step {begin}")
        if not any(step == begin for step, _ in candidates(place / "run" / FOLDER)):
            compute(replace(case.stretch, last=begin), place, launch, lambda steps: None)
        source = dict(reversed(candidates(place / "run" / FOLDER))).get(begin)
        if source is None:
            raise ConfigError("another state is there", field="--out", value=str(place), fix="choose another directory")
    if source is None:
        raise ConfigError("the event begins with the run: no state was before it", field="run", value=str(run.path))
    checkpoint = Checkpoint(source, verify(source))
    state, config = read_state(checkpoint, row_may_change=True), _on_a_cpu(case)
    progress = going_on(state, case.config)
    stream = open_stream(
        case.config,
        samples_seen=progress.samples_seen,
        steps_done=progress.step,
        skip_windows=progress.skip_windows,
    )
    count = case.event.start_step - begin
    steps = tuple(rows_of(next(stream)) for _ in range(count))
    inside = (run.steps > begin) & (run.steps <= case.event.start_step)
    return Excerpt(
        checkpoint,
        config,
        steps,
        tuple(run.columns["train/lr"][inside].tolist()),
        state.optimizer_steps,
        tuple(range(config.model.layers)),
        tuple(range(max(map(len, steps)))),
    )


def _on_a_cpu(case: Case) -> RunConfig:
    """The settings of the event for the plain engine in one process."""
    config, attention = case.config, case.config.attention
    alone = replace(config.engine, expert_parallel=1, context_parallel=1)
    engine = replace(alone, name="plain", device="cpu", kernels="torch", compile="none")
    if case.precision:
        engine = replace(engine, precision=case.precision)
    traits = TRAITS.get(attention.backend)
    if traits is not None and traits.cuda:
        attention = replace(attention, backend="auto")
    if isinstance(attention.interaction, FoldableOptions) and attention.interaction.impl == "triton":
        attention = replace(attention, interaction=replace(attention.interaction, impl="auto"))
    moe = replace(config.moe, backend="loop") if config.moe.backend == "megablocks" else config.moe
    return replace(config, engine=engine, attention=attention, moe=moe)


def _write(run: RunData, event: SpikeEvent, whole: Excerpt, small: Excerpt, out: Path) -> CapsuleFile:
    config, saved = small.small_config, small.checkpoint.buffers()
    engine = _engine(config)
    shapes, buffers = dict(engine.shapes), {name: saved[small.old_name(name)] for name in engine.buffers()}
    engine.close()
    pieces = (
        Piece(name, kind, shape, 0, small.checkpoint.read(small.old_name(name), kind))
        for name, shape in shapes.items()
        for kind in small.checkpoint.kinds_of(small.old_name(name))
        if kind in small.kinds
    )
    kinds = small.checkpoint.manifest.contents.kinds if small.moments else Kinds((MASTER,))
    writer = BackgroundWriter(out, World.single(), kinds=kinds)
    writer.begin(small.checkpoint.step, pieces, buffers, {})
    writer.wait()
    places = replace(config.run, dir="run", name="capsule", branch_from="", init_from="")
    data = replace(
        config.data, train=SAMPLES_FILE, validation=SAMPLES_FILE, sources=(), phases=(), skip_windows=(), name="capsule"
    )
    found = CapsuleFile(
        run_id=str(run.run.get("run_id", "")),
        step=event.start_step,
        config=to_plain(replace(config, run=places, data=data)),
        baseline=event.baseline,
        scale=event.scale,
        rates=list(small.rates),
        losses=small.losses(),
        optimizer_steps=small.optimizer_steps if small.moments else 0,
        left_out=[
            f"{len(whole.rows) - len(small.rows)} of {len(whole.rows)} rows",
            f"{len(whole.layers) - len(small.layers)} of {len(whole.layers)} layers",
            *([] if small.moments else ["the optimiser's moments"]),
        ],
    )
    write_json(out / SAMPLES_FILE, {"steps": small.small_steps})
    write_json(out / CAPSULE_FILE, {**found})
    write_text(out / "README.md", _readme(found))
    return found


def _readme(found: CapsuleFile) -> str:
    losses = ", ".join(f"{loss:.4f}" for loss in found["losses"])
    threshold = found["baseline"] + OPEN_Z * found["scale"]
    return f"""# A loss event in a capsule

The beginning of the event at step {found["step"]} of run {found["run_id"]}, without {", ".join(found["left_out"])}.
Losses {losses}; an event opens at {threshold:.4f}.

With kha_train installed, in this directory:

```
kha replay .
```

trains these steps on a CPU, compares every loss with the expected one, and ends with 0 if the event shows.
`{CAPSULE_FILE}` has settings and losses, `{SAMPLES_FILE}` the ids of the rows, `{FOLDER}/` the state.
"""
