"""Texts that are being written token by token: where they end, and which part of one nothing can change any more."""

# B rows   T tokens

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from kha_train.decode.sampling import Sampling

End = Literal["length", "eos", "stop"]
_INCOMPLETE = "\ufffd"
"""How bytes that are no whole character yet are shown."""


@dataclass
class Writing:
    """The `ids` drawn so far, without the one that ends a document, and their `text`, cut before the first stop string.

    `decode` turns ids into text. `end` says why it ended: a stop string, the end of a document, or (until one of them
    comes) the number of tokens.
    """

    decode: Callable[[Sequence[int]], str]
    eos: int | None = None
    stops: tuple[str, ...] = ()
    ids: list[int] = field(default_factory=list)
    text: str = ""
    end: End = "length"

    @property
    def ended(self) -> bool:
        """Whether nothing follows."""
        return self.end != "length"

    def add(self, token: int) -> None:
        """Take the next token; none after the end."""
        if self.ended:
            return
        if token == self.eos:
            self.end = "eos"
            return
        self.ids.append(token)
        self.text = self.decode(self.ids)
        places = [place for stop in self.stops if stop and (place := self.text.find(stop)) >= 0]
        if places:
            self.text, self.end = self.text[: min(places)], "stop"

    def settled(self, finished: bool) -> str:
        """The part of the text that no further token changes; all of it once it is `finished`. An incomplete character
        at its end is held back, and what may be the beginning of a stop string.
        """
        if finished or self.ended:
            return self.text
        text = self.text.rstrip(_INCOMPLETE)
        held = max((_begun(text, stop) for stop in self.stops), default=0)
        return text[: len(text) - held]


def _begun(text: str, stop: str) -> int:
    """The length of the longest beginning of `stop` that `text` ends with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


Continue = Callable[[Tensor, Sampling], Iterator[Tensor]]
"""The next token of every row of a prompt, int64 [B] each."""


@dataclass(frozen=True)
class Order:
    """What to write: `samples` texts for each of `prompts` (ids), at most `batch` at a time, by `sampling`, until one
    of `stops` or the id `eos`.
    """

    prompts: Sequence[Sequence[int]]
    sampling: Sampling
    samples: int = 1
    batch: int = 16
    eos: int | None = None
    stops: tuple[str, ...] = ()


def write(
    order: Order,
    go_on: Continue,
    decode: Callable[[Sequence[int]], str],
    told: Callable[[int, Writing], None] = lambda row, writing: None,
) -> list[Writing]:
    """The texts of every prompt, the samples of one beside each other. `told` receives the number of a text and the
    text after each token.

    Rows of one length go together, so no padding takes part, and every row has its own random numbers: a text is the
    same alone and in any batch, but for rounding.
    """
    rows = [(prompt, sample) for prompt in order.prompts for sample in range(order.samples)]
    writings = [Writing(decode, order.eos, order.stops) for _ in rows]
    by_length: dict[int, list[int]] = {}
    for row, (prompt, _) in enumerate(rows):
        by_length.setdefault(len(prompt), []).append(row)
    for alike in by_length.values():
        for first in range(0, len(alike), order.batch):
            some = alike[first : first + order.batch]
            sampling = replace(order.sampling, streams=tuple(rows[row][1] for row in some))
            for drawn_B in go_on(torch.tensor([rows[row][0] for row in some]), sampling):
                for row, token in zip(some, drawn_B.tolist(), strict=True):
                    if not writings[row].ended:
                        writings[row].add(token)
                        told(row, writings[row])
                if all(writings[row].ended for row in some):
                    break
    return writings
