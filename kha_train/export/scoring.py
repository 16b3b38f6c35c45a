"""Scores an export as transformers computes it, and writes with it: what `kha eval` and `kha generate` take of a
directory that is no run.
"""

# B rows  T places of a row  N = B * T, flattened  S segments that go together  L tokens of the longest of them
# V vocabulary  E experts

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kha_train.config.constants import IGNORE_LABEL
from kha_train.data.rows.batch import Batch
from kha_train.decode.sampling import Sampling, drawn
from kha_train.errors import ConfigError
from kha_train.evaluate.text_model import Text, TextModel
from kha_train.export.hugging_face import load, load_tokenizer, missing
from kha_train.model.decoder import DecoderOutput
from kha_train.model.loss import TokenScores

TOKENS_AT_ONCE = 2048
"""Tokens of one forward, unless a single segment has more: logits of all of them are in memory."""


class TheirTokenizer:
    """A tokenizer of transformers, as ours are used."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Some libraries take a blank off the beginning of a text. Ids that continue one keep theirs behind a letter.
        self._before: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
        named = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
        self.special_ids: dict[str, int] = {name: number for name, number in named.items() if number is not None}

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Encoder.encode`."""
        found = (self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        return [np.asarray(ids, dtype=np.int32) for ids in found]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Encoder.decode`."""
        before, text = self._decoded(self._before), self._decoded([*self._before, *ids])
        return text[len(before) :]

    def _decoded(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class ExportModel(TextModel):
    """A model of transformers with its `tokenizer` (None: it has none). Segments of a batch become rows of their own,
    padded on the right, for a stock model isolates no documents.
    """

    def __init__(self, model: nn.Module, tokenizer: TheirTokenizer | None, prefix: str, device: torch.device) -> None:
        self._model: Any = model.to(device)
        self.tokenizer = tokenizer
        super().__init__(None if tokenizer is None else Text.of(tokenizer, self.longest, prefix), device)

    @property
    def longest(self) -> int:
        """The most tokens of a row."""
        return int(self._model.config.max_position_embeddings)

    @property
    def vocabulary(self) -> int:
        """The number of ids."""
        return int(self._model.config.vocab_size)

    @torch.no_grad()
    def evaluate(self, batch: Batch, by_token: bool = False) -> DecoderOutput:
        """See `Scorer.evaluate`."""
        tokens_N, labels_N = batch.tokens_BT.flatten(), batch.labels_BT.flatten()
        nats_N, hits_N = torch.zeros(len(tokens_N)), torch.zeros(len(tokens_N), dtype=torch.bool)
        borders = batch.layout.borders_S.tolist()
        scored = [(start, end) for start, end in pairwise(borders) if (labels_N[start:end] != IGNORE_LABEL).any()]
        for together in _batched(scored):
            L = max(end - start for start, end in together)
            tokens_SL = torch.zeros(len(together), L, dtype=torch.int64)
            for row, (start, end) in enumerate(together):
                tokens_SL[row, : end - start] = tokens_N[start:end]
            logits_SLV = self._model(tokens_SL.to(self.world.device)).logits
            for row, (start, end) in enumerate(together):
                nats_N[start:end], hits_N[start:end] = _scores(logits_SLV[row, : end - start], labels_N[start:end])
        tokens = TokenScores(nats_N.view(batch.tokens_BT.shape), hits_N.view(batch.tokens_BT.shape))
        device = self.world.device
        tokens = TokenScores(tokens.nats.to(device), tokens.hits.to(device))
        load_LE = torch.zeros(0, 0, dtype=torch.int64, device=device)
        return DecoderOutput(None, None if by_token else tokens.nats.sum(), load_LE, None, {}, tokens)

    @torch.no_grad()
    def generate(self, prompt_BT: Tensor, sampling: Sampling) -> Iterator[Tensor]:
        """See `TextModel.generate`."""
        cache = None

        def logits_of(new_BT: Tensor) -> Tensor:
            nonlocal cache
            output = self._model(new_BT, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits_BV: Tensor = output.logits[:, -1].float()
            return logits_BV

        end = None if self._text is None else self._text.end
        yield from drawn(logits_of, prompt_BT.to(self.world.device), sampling, end)


def open_export(directory: Path, prefix: str, device: torch.device) -> ExportModel:
    """The model of an export in fp32, with its drop-in heads and its tokenizer, if it has one. `prefix` as `Text.of`.

    Raises ConfigError when transformers is not installed or cannot load the directory.
    """
    if problem := missing():
        raise ConfigError(problem, field="model", value=str(directory), fix="pip install 'kha_train[export]'")
    try:
        model: Any = load(directory)
        tokenizer = TheirTokenizer(load_tokenizer(directory)) if (directory / "tokenizer.json").is_file() else None
    except (OSError, ValueError, KeyError, RuntimeError, ArithmeticError, TypeError, AttributeError) as error:
        what = " ".join(str(error).split())[:300]
        raise ConfigError(f"cannot be loaded: {what}", field="model", value=str(directory)) from error
    return ExportModel(model, tokenizer, prefix, device)


def _batched(segments: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Segments of similar length together, the longest first."""
    together: list[tuple[int, int]] = []
    for segment in sorted(segments, key=lambda one: one[0] - one[1]):
        longest = together[0] if together else segment
        if together and (len(together) + 1) * (longest[1] - longest[0]) > TOKENS_AT_ONCE:
            yield together
            together = []
        together.append(segment)
    if together:
        yield together


def _scores(logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each label, and whether it had the largest logit; 0 and False where masked. On the CPU."""
    labels_T = labels_T.to(logits_TV.device)
    masked_T = labels_T == IGNORE_LABEL
    log_p_TV = logits_TV.float().log_softmax(dim=-1)
    chosen_T = log_p_TV.gather(-1, labels_T.masked_fill(masked_T, 0).unsqueeze(-1)).squeeze(-1)
    return -chosen_T.masked_fill(masked_T, 0.0).cpu(), (log_p_TV.argmax(dim=-1) == labels_T).cpu()
