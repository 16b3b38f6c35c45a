"""A model that nobody trains here, with its tokenizer: it scores batches of ids, and it continues texts.

`DecoderModel` is that of a run's checkpoint. `kha_train/export` makes the one of an export.
"""

# B rows of the same length  T tokens of a row  V vocabulary

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from kha_train.data.rows.batch import Batch
from kha_train.decode.generate import Encoder, generate
from kha_train.decode.sampling import Sampling
from kha_train.decode.writing import Writing
from kha_train.distributed import World
from kha_train.errors import ConfigError
from kha_train.model.decoder import Decoder, DecoderOutput
from kha_train.model.host import inputs_of


@dataclass(frozen=True)
class Text:
    """How texts become ids for a model that sees `context` tokens at once. The id `prefix` stands before a text that
    nothing precedes; `end`, if any, ends a generated text."""

    encoder: Encoder
    context: int
    prefix: int
    end: int | None

    @classmethod
    def of(cls, encoder: Encoder, context: int, prefix: str = "") -> Text:
        """With the special id named `prefix`; by default the end of a document, which precedes the next one in training
        data, or the beginning where there is no end.

        Raises ConfigError when the tokenizer does not have it.
        """
        ids = encoder.special_ids
        for name in (prefix,) if prefix else ("eos", "bos"):
            if name in ids:
                return cls(encoder, context, ids[name], ids.get("eos"))
        raise ConfigError(
            "the tokenizer has no such id", field="prefix", value=prefix or "eos, bos", allowed=", ".join(ids) or "none"
        )

    def encode(self, text: str) -> list[int]:
        """The ids of `text`."""
        ids: list[int] = self.encoder.encode([text])[0].tolist()
        return ids


class Prompt(NamedTuple):
    """Ids to continue according to `sampling`, until the text of the new ones contains one of `until`, with the random
    numbers of `stream`."""

    ids: tuple[int, ...]
    sampling: Sampling
    until: tuple[str, ...]
    stream: int = 0


class TextModel(ABC):
    """A model on a `device` in this process: a `Scorer` that also writes. `text` is its way with texts, None where
    nobody knows its tokenizer."""

    def __init__(self, text: Text | None, device: torch.device) -> None:
        self._text, self.world = text, World(device=device)

    @property
    def text(self) -> Text:
        """Its way with texts. Raises ConfigError where it has none."""
        if self._text is None:
            raise ConfigError("tasks of texts need a tokenizer, and its data have none", field="tasks")
        return self._text

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """The number of ids."""

    @abstractmethod
    def evaluate(self, batch: Batch, by_token: bool = False) -> DecoderOutput:
        """See `Scorer.evaluate`."""

    @abstractmethod
    def generate(self, prompt_BT: Tensor, sampling: Sampling) -> Iterator[Tensor]:
        """The next token of every row, int64 [B] each, `sampling.tokens` times at most; a row that has drawn
        `text.end` repeats it."""

    def write(self, prompts: Sequence[Prompt], size: int, advance: Callable[[int], None]) -> list[str]:
        """What follows each prompt, without the text that ended it. At most `size` prompts, of the same length and
        sampling, go together, so no padding takes part. `advance` is called for every prompt.
        """
        alike: dict[tuple[int, Sampling], list[int]] = {}
        for number, prompt in enumerate(prompts):
            alike.setdefault((len(prompt.ids), prompt.sampling), []).append(number)
        written = [""] * len(prompts)
        for numbers in alike.values():
            for first in range(0, len(numbers), size):
                some = numbers[first : first + size]
                for number, text in zip(some, self._write([prompts[one] for one in some]), strict=True):
                    written[number] = text
                advance(len(some))
        return written

    def _write(self, prompts: Sequence[Prompt]) -> list[str]:
        prompt_BT = torch.tensor([prompt.ids for prompt in prompts])
        writings = [Writing(self.text.encoder.decode, self.text.end, prompt.until) for prompt in prompts]
        sampling = replace(prompts[0].sampling, streams=tuple(prompt.stream for prompt in prompts))
        for drawn_B in self.generate(prompt_BT, sampling):
            for writing, token in zip(writings, drawn_B.tolist(), strict=True):
                writing.add(token)
            if all(writing.ended for writing in writings):
                break
        return [writing.text for writing in writings]


class DecoderModel(TextModel):
    """A decoder in evaluation mode with its tokenizer."""

    def __init__(self, decoder: Decoder, text: Text | None) -> None:
        super().__init__(text, decoder.embedding.weight.device)
        self.decoder = decoder

    @property
    def vocabulary(self) -> int:
        """See `TextModel.vocabulary`."""
        return int(self.decoder.config.model.vocab_size)

    @torch.no_grad()
    def evaluate(self, batch: Batch, by_token: bool = False) -> DecoderOutput:
        """See `Scorer.evaluate`."""
        found: DecoderOutput = self.decoder(*inputs_of(batch, self.world.device), by_token=by_token)
        return found

    def generate(self, prompt_BT: Tensor, sampling: Sampling) -> Iterator[Tensor]:
        """See `TextModel.generate`."""
        return generate(self.decoder, prompt_BT.to(self.world.device), sampling, self.text.end)
