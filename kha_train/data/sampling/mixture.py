"""Assigns samples to sources by exact integer quotas, with O(1) memory and O(1) seek.

Sample numbers are assigned in blocks of P slots. Shares are multiples of 1/D, D = 2^30, cumulated to W_0 = 0 ... W_S =
D; before block k source j has given C_j(k) = floor(W_{j+1} k P / D) - floor(W_j k P / D) samples. A block's quotas are
laid out in order and permuted by a key of (seed, k); inside the block each source continues from C_j(k), so that its
own order does not depend on the other sources. P is at least 1024, and large enough for the smallest share to have a
slot in every block. Then no quota is negative, and counts are within one sample of share x n at every block end.
"""

# S sources  N samples  P slots of a block

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from kha_train.data.sampling.order import Permutation
from kha_train.errors import ConfigError

UNITS = 1 << 30
LEAST_SLOTS = 1024
LEAST_SHARE = 1e-6
_CACHED_BLOCKS = 4


class Phase(NamedTuple):
    """From sample `start` on, sources have these `weights` (relative to their sum; 0: not in this phase)."""

    start: int
    weights: tuple[float, ...]


class _Phase(NamedTuple):
    """A phase in integers: its first block, cumulated shares, and the samples of each source before it."""

    block: int
    cumulated: tuple[int, ...]
    before: tuple[int, ...]


class Mixture:
    """Sample number -> (source, the source's own sample number), endlessly.

    `slots` is P; `shares` are the exact quantised shares of the first phase. Raises ConfigError for invalid weights
    (negative, none positive, a share under 1e-6) and for a phase that does not start at a later multiple of P than the
    one before.
    """

    def __init__(self, phases: Sequence[Phase], *, seed: int) -> None:
        self._seed = seed
        cumulated = [_cumulate(phase.weights, f"data.phases[{i}]") for i, phase in enumerate(phases)]
        shares = [b - a for sums in cumulated for a, b in pairwise(sums)]
        smallest = min(share for share in shares if share)
        self.slots = LEAST_SLOTS
        while self.slots * smallest < UNITS:
            self.slots *= 2
        self.shares = tuple((b - a) / UNITS for a, b in zip(cumulated[0], cumulated[0][1:], strict=False))
        self._phases = self._lay_out(phases, cumulated)
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def samples(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Source (int64 index) and its own sample number (int64) of `count` samples, starting at `first`."""
        assert first >= 0 and count >= 0, (first, count)
        parts = [(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))]
        while count > 0:
            number, offset = divmod(first, self.slots)
            sources, numbers = (column[offset : offset + count] for column in self._block(number))
            parts.append((sources, numbers))
            first, count = first + len(sources), count - len(sources)
        sources_N, numbers_N = (np.concatenate(column) for column in zip(*parts, strict=True))
        return sources_N, numbers_N

    def counts(self, block: int) -> tuple[int, ...]:
        """The samples of each source before `block`."""
        phase = next(phase for phase in reversed(self._phases) if phase.block <= block)
        return self._given(phase, block)

    def _given(self, phase: _Phase, block: int) -> tuple[int, ...]:
        # Python integers: W k P exceeds 2^63 near k P = 2^33.
        dealt = [share * (block - phase.block) * self.slots // UNITS for share in phase.cumulated]
        own = (b - a for a, b in pairwise(dealt))
        return tuple(before + more for before, more in zip(phase.before, own, strict=True))

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if number in self._blocks:
            self._blocks.move_to_end(number)
            return self._blocks[number]
        before, after = self.counts(number), self.counts(number + 1)
        quotas = [b - a for a, b in zip(before, after, strict=True)]
        assert min(quotas) >= 0 and sum(quotas) == self.slots, quotas
        permutation = Permutation(self.slots, seed=self._seed, source="mixture", epoch=number)
        layout_P = np.repeat(np.arange(len(quotas)), quotas)
        sources_P = layout_P[permutation.forward(np.arange(self.slots))]
        numbers_P = np.empty(self.slots, dtype=np.int64)
        for source, quota in enumerate(quotas):
            numbers_P[sources_P == source] = before[source] + np.arange(quota)
        self._blocks[number] = sources_P, numbers_P
        if len(self._blocks) > _CACHED_BLOCKS:
            self._blocks.popitem(last=False)
        return sources_P, numbers_P

    def _lay_out(self, phases: Sequence[Phase], cumulated: Sequence[tuple[int, ...]]) -> list[_Phase]:
        """Raises ConfigError for a start that is not a later multiple of P."""
        laid: list[_Phase] = []
        for index, (phase, sums) in enumerate(zip(phases, cumulated, strict=True)):
            block, rest = divmod(phase.start, self.slots)
            if rest or (laid and block <= laid[-1].block):
                raise ConfigError(
                    "weights must change at a later multiple of the mixture's block",
                    field=f"data.phases[{index}].start_sample",
                    value=phase.start,
                    allowed=f"multiples of {self.slots}, each above the one before",
                    fix=f"{block * self.slots} or {(block + 1) * self.slots}",
                )
            before = self._given(laid[-1], block) if laid else (0,) * (len(sums) - 1)
            laid.append(_Phase(block, sums, before))
        return laid


def _cumulate(weights: Sequence[float], field: str) -> tuple[int, ...]:
    """Cumulated shares in units of 1/D. Raises ConfigError for invalid weights."""
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ConfigError("weights must not be negative, and one must be above 0", field=field, value=tuple(weights))
    total = sum(map(Fraction, weights), Fraction(0))
    sums = [Fraction(0), *accumulate(Fraction(weight) for weight in weights)]
    cumulated = tuple(int(part * UNITS / total) for part in sums)
    for weight in weights:
        if weight and Fraction(weight) / total < LEAST_SHARE:
            raise ConfigError(f"a share is under {LEAST_SHARE}", field=field, value=weight, fix="leave the source out")
    return cumulated
