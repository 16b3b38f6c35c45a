"""`kha compress`: writes a run whose model is that of a checkpoint with fewer key/value heads in some layers.

The new directory holds a configuration and a checkpoint of weights alone; nothing of the source is changed. Tensors are
read, factored and written one after another. The new run is evaluated and generates as it is, and `run.init_from` goes
on with its weights.
"""

# J virtual heads   G key/value heads   K head width   D model width

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from kha_train.checkpoint.layout import run_of
from kha_train.checkpoint.manifest import manifest_sha256
from kha_train.checkpoint.pieces import Piece
from kha_train.checkpoint.reader import Checkpoint, open_verified
from kha_train.checkpoint.weights import write_weights
from kha_train.config.build import to_plain
from kha_train.config.compose import dump, from_plain, load
from kha_train.config.saved import completed
from kha_train.config.schema import RunConfig
from kha_train.decode.absorb import AbsorbedWeights
from kha_train.decode.virtual_heads import Compressed, Factors, compressed_config, compressed_weights, factored
from kha_train.distributed import World
from kha_train.engine.building import persistent_buffers
from kha_train.errors import ConfigError
from kha_train.estimate.counts import cache_bytes_per_token, count_parameters
from kha_train.model.decoder import lay_out_decoder
from kha_train.model.init import initial_values
from kha_train.record import read_run
from kha_train.record.attempts import CONFIG_FILE
from kha_train.record.files import published, write_json, write_text
from kha_train.record.imported import copy_imported
from kha_train.variants.optimizer import MASTER

ORIGIN_FILE = "compressed.json"
"""The file of a compressed run that says what it was made of."""
UNTOUCHED_AT_THE_START = 3
"""How many first layers `deep` leaves alone (MEA, app. F)."""
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Loss:
    """Of a compressed projection of a layer: the share of its weight that is lost, by Frobenius norms."""

    layer: int
    projection: str
    heads: int
    lost: float


@dataclass(frozen=True)
class Compression:
    """What was compressed into what: the source, the run in which it lies, its step, the SHA-256 of its manifest; the
    heads of each layer (0: all); what each factored weight loses; numbers per token in the caches of all layers, before
    and after. `settings` make the model of the new run when they are added to those of the old one.
    """

    source: str
    run_id: str
    step: int
    manifest: str
    heads_by_layer: tuple[int, ...]
    losses: tuple[Loss, ...]
    cache_numbers: tuple[int, int]
    settings: tuple[str, ...]

    def to_plain(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def layers_named(text: str, layers: int) -> tuple[int, ...]:
    """The layers, counted from 0, that `middle`, `deep`, `all` or a list such as `0,4-7` means.

    `middle` are the layers / 2 around the centre (12 to 35 of 48; MEA's "half" are 11 to 34), `deep` all but the first
    three. Raises ConfigError for other words, and for layers that are not there.
    """
    half = layers // 2
    first = (layers - half) // 2
    groups = {
        "middle": range(first, first + half),
        "deep": range(UNTOUCHED_AT_THE_START, layers),
        "all": range(layers),
    }
    found = groups.get(text)
    if found is None:
        parts = [re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip()) for part in text.split(",")]
        bounds = [(int(part[1]), int(part[2] or part[1])) for part in parts if part]
        if None in parts or not all(low <= high < layers for low, high in bounds):
            raise ConfigError(
                "names no layers of this model",
                field="--layers",
                value=text,
                allowed=f"middle, deep, all, or a list of 0 to {layers - 1} such as 0,2-3",
            )
        return tuple(sorted({layer for low, high in bounds for layer in range(low, high + 1)}))
    if not found:
        raise ConfigError(f"{layers} layers have no such part", field="--layers", value=text, fix="a list of layers")
    return tuple(found)


def heads_by_layer(config: RunConfig, layers: Sequence[int], kv_heads: int) -> tuple[int, ...]:
    """The heads of each layer when those in `layers` get so many. Raises ConfigError for an impossible number."""
    most = config.attention.heads().kv_heads
    if not 1 <= kv_heads <= most:
        raise ConfigError("the model has other heads", field="--kv-heads", value=kv_heads, allowed=f"1 to {most}")
    return tuple(kv_heads if layer in layers else 0 for layer in range(config.model.layers))


def open_source(path: Path) -> tuple[RunConfig, Checkpoint]:
    """The newest checkpoint of the run at `path`, or the one that `path` is, verified, and its configuration.

    Raises ConfigError for a configuration that this release cannot build, CheckpointError for a damaged checkpoint.
    """
    checkpoint = open_verified(path, World.single())
    run = run_of(checkpoint.path)
    if (run / CONFIG_FILE).is_file():
        return load(run / CONFIG_FILE), checkpoint
    return from_plain(completed(checkpoint.trainer_state.get("config", {}))), checkpoint


def compress_run(source: Path, layers: str, kv_heads: int, out: Path, bar: Bar) -> Compression:
    """Compress the `layers` of the model at `source` (a run or a checkpoint) to `kv_heads`, into the new run `out`.

    Raises ConfigError where the model cannot be compressed so, or where `out` exists; CheckpointError for a damaged
    checkpoint; DivergedError for weights that are not finite; OSError. What was written of a failed compression is
    removed.
    """
    config, checkpoint = open_source(source)
    by_layer = heads_by_layer(config, layers_named(layers, config.model.layers), kv_heads)
    compressed = compressed_config(config, by_layer)
    compressed = replace(compressed, run=replace(compressed.run, dir=str(out), init_from="", branch_from=""))
    losses: list[Loss] = []
    with published(out, "--out") as beside:
        with bar(f"compressing {checkpoint.path}", count_parameters(compressed).total) as advance:
            weights = _Weights(config, compressed, checkpoint, losses)
            write_weights(beside, to_plain(compressed), weights.pieces(advance), weights.buffers())
        write_text(beside / CONFIG_FILE, dump(compressed))
        made = Compression(
            source=str(checkpoint.path),
            run_id=str(read_run(run_of(checkpoint.path)).get("run_id", "")),
            step=checkpoint.step,
            manifest=manifest_sha256(checkpoint.path) or "",
            heads_by_layer=by_layer,
            losses=tuple(losses),
            cache_numbers=(cache_bytes_per_token(config, 1), cache_bytes_per_token(compressed, 1)),
            settings=settings_of(compressed),
        )
        write_json(beside / ORIGIN_FILE, made.to_plain())
        copy_imported(run_of(checkpoint.path), beside)
    return made


def settings_of(compressed: RunConfig) -> tuple[str, ...]:
    """The overrides that make the attention of a compressed run out of that of its source."""
    options = to_plain(compressed)["attention"]["interaction"]
    names = ("compose", "component_heads_by_layer", "head_norm")
    values = {name: str(options[name]).lower().replace(" ", "").replace("'", "") for name in names}
    own = (f"attention.interaction.{name}={value}" for name, value in values.items())
    decay = f"optim.interaction_decay={compressed.optim.interaction_decay}"
    return ("interaction@attention.interaction=explicit", *own, decay)


def command_of(made: Compression, out: Path) -> str:
    """The settings by which a new run goes on with the weights of `out`, beside those of the old run."""
    return shlex.join([*made.settings, f"run.init_from={out}"])


class _Weights:
    """The tensors of the compressed model, made one after another of those of `checkpoint`, a model of `config`."""

    def __init__(self, config: RunConfig, compressed: RunConfig, checkpoint: Checkpoint, losses: list[Loss]) -> None:
        self._checkpoint, self._losses = checkpoint, losses
        self._absorbed = AbsorbedWeights(config, checkpoint)
        self._decoder, self._seed = lay_out_decoder(compressed), compressed.run.seed
        factors = compressed_weights(self._decoder)
        self._made = {name: one for one in factors for name in (one.weight, one.composition)}
        self._factors: dict[str, Factors] = {}

    def pieces(self, advance: Callable[[int], None]) -> Iterator[Piece]:
        """Every parameter as one piece."""
        for owner, local, name, _ in initial_values(self._decoder, self._seed):
            shape = tuple(getattr(owner, local).shape)
            value = self._factor(name, self._made[name]) if name in self._made else self._weight(name)
            yield Piece(name, MASTER, shape, 0, value.flatten())
            advance(value.numel())

    def buffers(self) -> dict[str, Tensor]:
        """The buffers that the compressed model has."""
        kept = persistent_buffers(self._decoder)
        return {name: value for name, value in self._checkpoint.buffers().items() if name in kept}

    def _weight(self, name: str) -> Tensor:
        if name in self._absorbed.names:
            return self._absorbed.weight(name)
        return self._checkpoint.read(name, MASTER)

    def _factor(self, name: str, one: Compressed) -> Tensor:
        if one.weight not in self._factors:
            # Those of one layer at a time: they come one after another.
            if self._losses and self._losses[-1].layer != one.layer:
                self._factors.clear()
            inputs = self._checkpoint.names()[one.weight][-1]
            found = factored(self._weight(one.weight).view(-1, inputs), one.width, one.heads)
            self._losses.append(Loss(one.layer, one.projection, one.heads, found.lost))
            self._factors[one.weight] = found
        factors = self._factors[one.weight]
        return factors.virtual if name == one.weight else factors.composition
