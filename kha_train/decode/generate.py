"""Sampling from a trained run: its newest checkpoint, its tokenizer, and forwards of one token at a time with a
cache.
"""

# B rows   T tokens   V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from kha_train.checkpoint.fit import check_buffers, check_parameters
from kha_train.checkpoint.layout import home_of, is_checkpoint
from kha_train.checkpoint.loss import check_not_lost
from kha_train.checkpoint.reader import Checkpoint, find_newest, open_verified
from kha_train.config.compose import load
from kha_train.config.resolve import resolve_decoding
from kha_train.config.schema import RunConfig
from kha_train.data.sources import open_shards
from kha_train.data.tokenizer import Tokenizer
from kha_train.data.tokenizer_kinds import FILE_NAMES, dataset_tokenizer, open_tokenizer
from kha_train.decode.absorb import absorb, absorbed_config
from kha_train.decode.sampling import Sampling, drawn
from kha_train.distributed import World
from kha_train.errors import ConfigError, between
from kha_train.estimate.counts import cache_bytes_per_token
from kha_train.model.attention.cache import Cache
from kha_train.model.decoder import Decoder, build_decoder
from kha_train.model.init import initial_values, reset_buffers
from kha_train.record.imported import IMPORTED


class Encoder(Protocol):
    """What is asked of a tokenizer."""

    special_ids: dict[str, int]

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, without special ids."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""


@dataclass(frozen=True)
class TrainedModel:
    """A run's decoder, ready to generate, the step of its checkpoint, and its tokenizer (None when the data has
    none).
    """

    config: RunConfig
    decoder: Decoder
    step: int
    tokenizer: Tokenizer | None


def load_run(path: Path, report: Callable[[str], None], device: torch.device | None = None) -> TrainedModel:
    """The newest checkpoint of a run that verifies, or the one whose directory is `path`, in fp32, with its interaction
    absorbed if that is possible and does not enlarge the cache.

    Raises ConfigError (no run, no checkpoint), CheckpointError or DataError (damaged or lost files).
    """
    run_dir = home_of(path)
    config = load(run_dir / "config.yaml")
    if is_checkpoint(path):
        checkpoint = open_verified(path, World.single())
    else:
        check_not_lost(path)
        newest = find_newest(path, World.single(), report)
        if newest is None:
            raise ConfigError("the run has no checkpoint yet", field="run", value=str(path))
        checkpoint = newest
    decoder = materialise(config, checkpoint, device or torch.device("cpu"))
    if absorbing_helps(config):
        decoder = absorb(decoder)
    return TrainedModel(decoder.config, decoder.eval(), checkpoint.step, tokenizer_of(config, run_dir))


def absorbing_helps(config: RunConfig) -> bool:
    """Whether the interaction of `config` can be absorbed without a larger cache."""
    simpler = absorbed_config(config)
    return simpler is not None and cache_bytes_per_token(simpler) <= cache_bytes_per_token(config)


@torch.no_grad()
def generate(decoder: Decoder, prompt_BT: Tensor, sampling: Sampling, stop: int | None = None) -> Iterator[Tensor]:
    """The next token of every row, int64 [B] each, until `sampling.tokens` are drawn or every row has drawn `stop`; a
    finished row keeps yielding `stop`.

    Raises ConfigError for wrong settings, or when prompt and new tokens are longer than `model.seq_len`.
    """
    longest = decoder.config.model.seq_len
    problem = sampling.invalid() or too_long(prompt_BT.shape[1], sampling.tokens, longest)
    if problem:
        raise problem
    cache = Cache(prompt_BT.shape[1] + sampling.tokens)
    yield from drawn(lambda new_BT: decoder(new_BT, cache=cache).logits_BTV[:, -1], prompt_BT, sampling, stop)


def encode_prompt(tokenizer: Encoder | None, text: str, ids: Sequence[int], vocabulary: int) -> list[int]:
    """The prompt as ids, from text or from `ids`; an empty text starts a new document.

    Raises ConfigError when there is no tokenizer for a text, an id is not in the vocabulary, or nothing is left.
    """
    found = list(ids)
    if not found:
        if tokenizer is None:
            fix = "give ids: --ids 1,2,3"
            raise ConfigError("the model's data has no tokenizer", field="prompt", value=text, fix=fix)
        start = [tokenizer.special_ids[name] for name in ("bos", "eos") if name in tokenizer.special_ids]
        found = tokenizer.encode([text])[0].tolist() or start[:1]
    outside = [number for number in found if not 0 <= number < vocabulary]
    if not found:
        raise ConfigError(
            "empty, and the tokenizer has no id to start a document with", field="prompt", fix="give a text"
        )
    if outside:
        raise ConfigError("not in the vocabulary", field="prompt", value=outside, allowed=between(0, vocabulary - 1))
    return found


def materialise(config: RunConfig, checkpoint: Checkpoint, device: torch.device) -> Decoder:
    """The decoder of `checkpoint` on `device`, in fp32, with its interaction as it was trained, whatever ZeRO stage and
    number of ranks wrote it. Raises CheckpointError when it is not one of `config`.
    """
    with torch.device("meta"):
        decoder = build_decoder(config, resolve_decoding(config))
    shapes = {name: tuple(value.shape) for name, value in decoder.named_parameters()}
    check_parameters(checkpoint, shapes)
    check_buffers(checkpoint, {name: tuple(buffer.shape) for name, buffer in _persistent_buffers(decoder)})
    for module, name, full_name, _ in list(initial_values(decoder, config.run.seed)):
        value = checkpoint.read(full_name, "master").view(shapes[full_name])
        module._parameters[name] = nn.Parameter(value.to(device), requires_grad=False)
    decoder.tie_weights()
    reset_buffers(decoder, config.run.seed, device)
    decoder.load_state_dict({name: value.to(device) for name, value in checkpoint.buffers().items()}, strict=False)
    return decoder


def tokenizer_of(config: RunConfig, run_dir: Path | None = None) -> Tokenizer | None:
    """The tokenizer of a run's data, None where nobody knows it. An imported run brings its own, and needs no data.
    `run_dir` is where the run is now, if not at `run.dir`. Raises ConfigError and DataError as `open_shards`.
    """
    place = run_dir or Path(config.run.dir)
    if (place / IMPORTED).is_file() and not Path(config.data.validation).exists():
        if not any((place / name).is_file() for name in FILE_NAMES):
            return None
        own = open_tokenizer(place)
        # A model may have more ids than its tokenizer, and draw one of them.
        return own.padded(max(own.vocab_size, config.model.vocab_size))
    return dataset_tokenizer(open_shards(config, config.data.validation, "data.validation"))


def _persistent_buffers(decoder: Decoder) -> list[tuple[str, Tensor]]:
    kept = decoder.state_dict(keep_vars=True)
    return [(name, buffer) for name, buffer in decoder.named_buffers() if name in kept]


def too_long(prompt: int, new: int, longest: int) -> ConfigError | None:
    """The error about a prompt and new tokens that are together longer than the rows of training, or None."""
    if prompt + new <= longest:
        return None
    return ConfigError(
        f"a prompt of {prompt} and {new} new tokens; the model was trained on rows of {longest}",
        field="tokens",
        value=new,
        allowed=between(1, longest - prompt),
        fix=None if prompt < longest else "a shorter prompt",
    )
