"""How the next token is drawn from logits, so that a text depends on its prompt and seed alone.

Each row has a stream of uniform numbers of its own, and a number chooses a token by the inverse of the cumulative
distribution. So neither the other rows of a batch nor the size of the vocabulary change what is drawn.
"""

# B rows   T tokens   V vocabulary

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kha_train.errors import ConfigError, DivergedError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: with `temperature` (below 1 sharpens, 0 takes the most likely token), from the
    `top_k` most likely tokens (0: all), and of these from the smallest set whose probability reaches `top_p`.

    The same `seed` draws the same tokens; `streams` has the number of the random stream of each row (empty: 0 for all),
    by which several texts of one prompt differ.
    """

    tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    streams: tuple[int, ...] = ()

    def invalid(self) -> ConfigError | None:
        """The error in these settings, or None."""
        if self.tokens < 1:
            return ConfigError("must be at least 1", field="tokens", value=self.tokens)
        if not 0 <= self.temperature < math.inf:
            return ConfigError(
                "is not a valid temperature", field="temperature", value=self.temperature, allowed="0 or more"
            )
        if not -(2**63) <= self.seed < 2**63:
            return ConfigError("out of range", field="seed", value=self.seed, allowed="64 bits")
        if not 0 < self.top_p <= 1:
            return ConfigError("must be a share", field="top_p", value=self.top_p, allowed="above 0, up to 1")
        if self.top_k < 0:
            return ConfigError("must be a number of tokens", field="top_k", value=self.top_k, allowed="0 (all) or more")
        return None


class Streams:
    """The random numbers of `rows` rows."""

    def __init__(self, sampling: Sampling, rows: int) -> None:
        numbers = sampling.streams or (0,) * rows
        assert len(numbers) == rows, "one stream for each row"
        self._generators = [torch.Generator().manual_seed(_seed_of(sampling.seed, number)) for number in numbers]

    def next(self) -> Tensor:
        """A number from 0 up to 1 for each row, fp64 [B] on the CPU."""
        return torch.stack([torch.rand((), dtype=torch.float64, generator=one) for one in self._generators])


def draw(logits_BV: Tensor, sampling: Sampling, streams: Streams) -> Tensor:
    """One token for each row, int64 [B]. Raises DivergedError when the model's logits are not finite."""
    # A token with logit -inf is never drawn.
    if not torch.isfinite(logits_BV.amax(dim=-1)).all():
        fix = "an older checkpoint may be intact: `kha checkpoint list`, `kha spikes`"
        raise DivergedError("the model's logits are not finite", field="checkpoint", fix=fix)
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    return choose(logits_BV, sampling, streams.next().to(logits_BV.device))


def drawn(
    logits_of: Callable[[Tensor], Tensor], prompt_BT: Tensor, sampling: Sampling, stop: int | None
) -> Iterator[Tensor]:
    """The next token of every row, int64 [B] each, until `sampling.tokens` are drawn or every row has drawn `stop`; a
    finished row keeps yielding `stop`. `logits_of` takes the tokens that it has not seen, and gives the logits [B, V]
    after the last of them.
    """
    streams, new_BT = Streams(sampling, len(prompt_BT)), prompt_BT
    done_B = torch.zeros(len(prompt_BT), dtype=torch.bool, device=prompt_BT.device)
    for _ in range(sampling.tokens):
        drawn_B = draw(logits_of(new_BT), sampling, streams)
        if stop is not None:
            drawn_B = drawn_B.masked_fill(done_B, stop)
            done_B |= drawn_B == stop
        yield drawn_B
        if done_B.all():
            return
        new_BT = drawn_B.unsqueeze(1)


def choose(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor) -> Tensor:
    """The token, int64 [B], that each number of `uniform_B` (fp64, from 0 up to 1) chooses among the kept ones, the
    most likely first: the first token at which the cumulative probability exceeds it.
    """
    # After subtraction the largest logit is 0, so the softmax exists for any temperature.
    below_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)).double() / sampling.temperature
    probability_BV, token_BV = below_BV.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        probability_BV[:, sampling.top_k :] = 0.0
        probability_BV /= probability_BV.sum(dim=-1, keepdim=True)
    before_BV = probability_BV.cumsum(dim=-1) - probability_BV
    probability_BV = probability_BV.masked_fill(before_BV >= sampling.top_p, 0.0)
    reached_BV = probability_BV.cumsum(dim=-1)
    place_B = (reached_BV <= uniform_B.unsqueeze(-1) * reached_BV[:, -1:]).sum(dim=-1)
    # Rounding may put the product on the total itself.
    last_B = (probability_BV > 0).sum(dim=-1) - 1
    return token_BV.gather(-1, place_B.minimum(last_B).unsqueeze(-1)).squeeze(-1)


def _seed_of(seed: int, stream: int) -> int:
    """63 bits of a hash: neighbouring seeds and streams share nothing."""
    text = f"kha_train generate, seed {seed}, stream {stream}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
