"""A stock model of transformers -> a run directory with one checkpoint, of step 0, that holds its weights.

    1. `directory` reads config.json and the headers of the weights
    2. `reading` turns config.json into settings of ours, which compose to a configuration
    3. names and shapes of all tensors are compared with those that the configuration asks for
    4. the weights are read one by one, and written as pieces of our parameters
    5. the finished directory is renamed to its place

Whatever is refused, nothing is left at that place. A parameter of an interaction, which no stock model has, begins as
the identity: the model computes what it computed before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from kha_train.checkpoint.pieces import Piece
from kha_train.checkpoint.weights import write_weights
from kha_train.checkpoint.writer import PART_BYTES
from kha_train.config.build import to_plain
from kha_train.config.compose import dump, quoted
from kha_train.config.schema import RunConfig
from kha_train.engine.building import persistent_buffers
from kha_train.errors import CheckpointError, ConfigError
from kha_train.export.directory import CONFIG_NAME, ModelDirectory, open_directory, read_inside
from kha_train.export.heads_reading import TENSORS, read_heads
from kha_train.export.links import AS_IT_IS, Link, Part
from kha_train.export.reading import Described, configure, describe
from kha_train.foreign.documents import Json
from kha_train.foreign.typed import short
from kha_train.model.decoder import Decoder, lay_out_decoder
from kha_train.model.init import DeclaredModule, frozen_values, initial_values, not_identities
from kha_train.record.attempts import CONFIG_FILE
from kha_train.record.files import published, write_json, write_text
from kha_train.record.imported import IMPORTED, NAMING, TOKENIZER
from kha_train.variants.optimizer import MASTER

MAX_TOKENIZER_BYTES = 256 * 2**20
PIECE_ELEMENTS = 2**20
"""A tensor that is the same in both is read in parts of at most so many elements, or one row."""
INSERTED = (".interaction.", ".attention.gate.")
"""What the names of parameters of an interaction have in the middle."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_CONSTANT = re.compile(r"model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq")
"""Rotary frequencies, which older files hold beside the weights: they follow from config.json."""
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Imported:
    """What an import wrote: the run directory and its checkpoint. `host` is the model's class in transformers,
    `left_out` says what was not taken over, `settings` are the overrides that describe the model.
    """

    host: str
    run: Path
    checkpoint: Path
    config: RunConfig
    parameters: int
    tokenizer: Path | None
    left_out: tuple[str, ...]
    settings: tuple[str, ...]


@dataclass(frozen=True)
class Import:
    """A model directory that was found to fit, ready to be written. `links` say how tensors of `config`'s decoder are
    made; `shapes` are those of all its parameters and buffers; `settings` are those of the model as they are typed.
    """

    model: ModelDirectory
    host: str
    settings: tuple[str, ...]
    config: RunConfig
    decoder: Decoder
    links: tuple[Link, ...]
    shapes: Mapping[str, tuple[int, ...]]
    left_out: tuple[str, ...]

    @property
    def elements(self) -> int:
        """The numbers that are read, the amount of work."""
        return sum(math.prod(self.model.tensors[name].shape) for name in self._wanted())

    def write(self, out: Path, advance: Advance = lambda elements: None, part_bytes: int = PART_BYTES) -> Imported:
        """Write the run directory `out`. `advance` gets the number of numbers that were read.

        Raises ConfigError where `out` exists or cannot be written, CheckpointError for weights that cannot be read or
        are not finite, OSError.
        """
        with published(out, "--out") as beside:
            tokenizer = self._copy_tokenizer(beside)
            weights, plain = self._pieces(advance), to_plain(self.config)
            place = write_weights(beside, plain, weights, self._buffers(advance), part_bytes)
            write_text(beside / CONFIG_FILE, dump(self.config))
            write_json(beside / IMPORTED, self._origin())
        return Imported(
            self.host,
            out,
            out / place.relative_to(beside),
            self.config,
            sum(parameter.numel() for parameter in self.decoder.parameters()),
            out / TOKENIZER if tokenizer else None,
            self.left_out,
            self.settings,
        )

    def _origin(self) -> dict[str, Json]:
        """Where the weights come from."""
        where = {"source": str(self.model.path.resolve()), "class": self.host, "config": self.model.config}
        return {**where, "settings": list(self.settings), "left_out": list(self.left_out)}

    def _copy_tokenizer(self, beside: Path) -> bool:
        """Copy the tokenizer, and the files beside it that name its special tokens. Whether there is one."""
        found = {name: read_inside(self.model.path, name, MAX_TOKENIZER_BYTES) for name in (TOKENIZER, *NAMING)}
        if found[TOKENIZER] is None:
            return False
        for name, raw in found.items():
            if raw is not None:
                (beside / name).write_bytes(raw)
        return True

    def _wanted(self) -> Iterator[str]:
        return (name for link in self.links for name in link.host if name in self.model.tensors)

    def _pieces(self, advance: Advance) -> Iterator[Piece]:
        """The masters of every parameter: those of the model, then those of an interaction."""
        parameters = dict(self.decoder.named_parameters())
        for link in self.links:
            if link.layout is AS_IT_IS and link.ours[0].name in parameters:
                yield from self._in_parts(link.ours[0].name, link.host[0], advance)
            elif any(part.name in parameters for part in link.ours):
                for part, values in self._made(link, advance):
                    start = (part.at or 0) * values.numel()
                    yield Piece(part.name, MASTER, self.shapes[part.name], start, values.flatten())
        linked = {part.name for link in self.links for part in link.ours}
        for _, _, name, draw in initial_values(self.decoder, self.config.run.seed):
            if name not in linked:
                yield Piece(name, MASTER, self.shapes[name], 0, draw().flatten())

    def _in_parts(self, ours: str, host: str, advance: Advance) -> Iterator[Piece]:
        """A tensor that is the same in both, some rows at a time."""
        shape = self.shapes[ours]
        width = math.prod(shape[1:])
        rows = max(1, PIECE_ELEMENTS // max(1, width))
        for first in range(0, shape[0], rows):
            values = self.model.read(host, first, min(rows, shape[0] - first))
            advance(values.numel())
            yield Piece(ours, MASTER, shape, first * width, values.flatten())

    def _made(self, link: Link, advance: Advance) -> Iterator[tuple[Part, Tensor]]:
        """Our tensors of `link`, each whole."""
        there = tuple(self.model.read(name) for name in link.host if name in self.model.tensors)
        made = link.layout.to_ours(there)
        advance(sum(values.numel() for values in there))
        yield from zip(link.ours, made, strict=True)

    def _buffers(self, advance: Advance) -> dict[str, Tensor]:
        """Every buffer that a checkpoint holds: those of the model, and what a new run begins with."""
        decoder, seed = self.decoder, self.config.run.seed
        kept = persistent_buffers(decoder)
        found = {name: draw() for _, _, name, draw in frozen_values(decoder, seed)}
        for prefix, module in decoder.named_modules():
            if isinstance(module, DeclaredModule):
                found |= {f"{prefix}.{name}": fresh() for name, fresh in module.fresh_buffers.items()}
        for link in self.links:
            if any(part.name in kept for part in link.ours):
                found |= {part.name: values for part, values in self._made(link, advance)}
        return {name: found[name].contiguous() for name in kept}


def prepare(directory: Path, out: Path, overrides: Sequence[str] = ()) -> Import:
    """Find out what the model in `directory` is, and check that its weights are what its configuration asks for;
    `overrides` may add an interaction that begins as the identity, and settings of training. `out` is the run directory
    to be written. Writes nothing.

    Raises ConfigError for a model that our decoder does not compute, and for overrides that do not fit it;
    CheckpointError for weights that are damaged, missing, left over or of another shape.
    """
    model, heads = open_directory(directory), read_heads(directory)
    described = describe(model, heads.settings)
    # The user may say where data are, but the run is where it is written.
    config = configure(described, [*_places(out, "data"), *overrides, *_places(out, "run")])
    decoder = lay_out_decoder(config)
    tensors = dict(decoder.named_parameters()) | persistent_buffers(decoder)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    model = replace(model, tensors={**model.tensors, **heads.tensors})
    links = (
        *described.family.links(config, model.config),
        *(link for link in heads.links() if link.ours[0].name in shapes),
    )
    left_out = _check_tensors(model, links, shapes, config, _further_layers(described))
    new = shapes.keys() - {part.name for link in links for part in link.ours}
    if heads.tensors and (lacking := sorted(name for name in new if any(part in name for part in INSERTED))):
        raise CheckpointError("lacks the heads of", field=str(directory / TENSORS), value=lacking[0])
    _check_identity(config, decoder, new)
    settings = described.overrides(overrides)
    return Import(model, described.family.model_type, settings, config, decoder, links, shapes, left_out)


def _check_tensors(
    model: ModelDirectory,
    links: Sequence[Link],
    shapes: Mapping[str, tuple[int, ...]],
    config: RunConfig,
    further_layers: int,
) -> tuple[str, ...]:
    """What is left out, in words; the `further_layers` behind the last are. Raises CheckpointError unless the weights
    are otherwise those that `links` name.
    """
    left = dict(model.tensors)
    for link in links:
        for name, shape in link.host_shapes(shapes).items():
            stored = left.pop(name, None)
            if stored is None and 0 not in shape:
                raise CheckpointError("lacks a tensor", field=str(model.path), value=name, allowed=f"one of {[*shape]}")
            if stored is not None and stored.shape != shape:
                raise CheckpointError(
                    f"tensor {name!r} has another shape than {CONFIG_NAME} says",
                    field=str(stored.file),
                    value=[*stored.shape],
                    allowed=str([*shape]),
                )
    if config.model.tie_embeddings and HEAD in left:
        _check_tied(model, left.pop(HEAD).file)
    constant = [name for name in left if _CONSTANT.fullmatch(name)]
    further = [name for name in left if 0 <= _layer(name) - config.model.layers < further_layers]
    if strange := sorted(left.keys() - {*constant, *further}):
        problem = f"holds a tensor that a {model.config['model_type']} of this configuration does not have"
        raise CheckpointError(problem, field=str(left[strange[0]].file), value=short(strange[0]))
    left_out = [f"{len(further)} tensors of layers that predict further tokens"] if further else []
    left_out += [f"{len(constant)} tables of rotary frequencies, which are computed"] if constant else []
    return (*left_out, *(f"{name}, pickled weights, which stayed closed" for name in model.passed_over))


def _check_tied(model: ModelDirectory, file: Path) -> None:
    """Raises CheckpointError for an output layer that is said to be the embedding and is not."""
    shape = model.tensors[EMBEDDING].shape
    rows = max(1, PIECE_ELEMENTS // max(1, shape[1]))
    same = model.tensors[HEAD].shape == shape
    for first in range(0, shape[0] if same else 0, rows):
        count = min(rows, shape[0] - first)
        same = same and model.read(HEAD, first, count).equal(model.read(EMBEDDING, first, count))
    if not same:
        problem = f"tensor {HEAD!r} is not the embedding, though {CONFIG_NAME} ties them"
        raise CheckpointError(
            problem, field=str(file), fix="if it is a layer of its own, set tie_word_embeddings to false"
        )


def _check_identity(config: RunConfig, decoder: Decoder, names: Collection[str]) -> None:
    """Raises ConfigError unless the weights `names`, which the model does not have, leave heads as they are."""
    if others := not_identities(decoder, config.run.seed, names):
        raise ConfigError(
            f"{others[0]} does not begin as the identity, so the model would compute something else",
            field="attention.interaction",
            value=config.attention.interaction.name,
            allowed="an interaction that leaves heads as they are until it has learned",
            fix="import without it, and train with it: run.init_from takes any",
        )


def _places(out: Path, section: str) -> list[str]:
    """Settings that say where the `run` or its `data` are, for the configuration in it."""
    places = {"run.dir": out, "run.name": out.name, "data.train": out / "shards/train"}
    places |= {"data.validation": out / "shards/validation"}
    return [f"{key}={quoted(str(value))}" for key, value in places.items() if key.startswith(section)]


def _further_layers(described: Described) -> int:
    """How many layers behind the last predict the tokens after the next: one in classes that have such layers."""
    return int(any(fixed.key == "num_nextn_predict_layers" for fixed in described.family.fixed))


def _layer(name: str) -> int:
    """The layer that a tensor belongs to; -1 for none."""
    match = re.match(r"model\.layers\.([0-9]{1,6})\.", name)
    return int(match[1]) if match else -1
