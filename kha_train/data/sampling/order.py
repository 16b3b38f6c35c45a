"""The order of samples: a permutation of the rows for each epoch, computed one position at a time.

A mixed-radix Feistel network over [0, n) with cycle walking: O(1) memory, O(1) seek, integers only, hence the same on
every machine and NumPy version. n rows are treated as a grid of a x b cells with a = ceil(sqrt(n)), b = ceil(n / a); a
round adds to one coordinate a keyed hash of the other. The few cells beyond n (fewer than a of them) are permuted again
until they fall inside.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections import OrderedDict

import numpy as np

from kha_train.data.format.canonical import canonical_json
from kha_train.errors import DataError, between

ALGORITHM = "mixed-radix-feistel-1"
ROUNDS = 6
BLOCK = 4096
SUPER_BLOCK = 256
_CACHED_BLOCKS = 4
_GOLDEN, _MIX_1, _MIX_2 = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_S30, _S27, _S31 = np.uint64(30), np.uint64(27), np.uint64(31)


def keyed_hash(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """The splitmix64 finaliser of x * golden + key, element by element; `x` is a uint64 array, arithmetic wraps."""
    z = x * _GOLDEN + key
    z = (z ^ (z >> _S30)) * _MIX_1
    z = (z ^ (z >> _S27)) * _MIX_2
    return z ^ (z >> _S31)


def round_keys(n: int, *, seed: int, source: str, epoch: int, rounds: int = ROUNDS) -> np.ndarray:
    """The uint64 key of each round: BLAKE2b over canonical JSON, so that Python and NumPy integers give the same
    order.
    """
    identity = {
        "algorithm": ALGORITHM,
        "n": operator.index(n),
        "rounds": operator.index(rounds),
        "seed": operator.index(seed),
        "source": source,
        "epoch": operator.index(epoch),
    }
    digest = hashlib.blake2b(canonical_json(identity), digest_size=8 * rounds).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


class Permutation:
    """A keyed permutation of [0, n). Raises DataError when n < 1."""

    def __init__(self, n: int, *, seed: int, source: str, epoch: int) -> None:
        if n < 1:
            raise DataError("there is no sample to order", field=source, value=n)
        self.n = operator.index(n)
        self._keys = round_keys(n, seed=seed, source=source, epoch=epoch)
        side = math.isqrt(self.n - 1) + 1
        self._a, self._b = np.uint64(side), np.uint64(-(-self.n // side))

    def forward(self, position: np.ndarray) -> np.ndarray:
        """The row at each position; int64 arrays both. Raises DataError for a position outside [0, n)."""
        values = np.atleast_1d(np.asarray(position, dtype=np.int64))
        if values.size and not (0 <= values.min() and values.max() < self.n):
            raise DataError(
                "a sample number outside the dataset", value=int(values.max()), allowed=between(0, self.n - 1)
            )
        # uint64 with int64 becomes float64 in NumPy: everything below stays uint64.
        x = self._pass(values.astype(np.uint64))
        outside = np.flatnonzero(x >= np.uint64(self.n))
        while outside.size:
            x[outside] = self._pass(x[outside])
            outside = outside[x[outside] >= np.uint64(self.n)]
        return x.astype(np.int64)

    def _pass(self, x: np.ndarray) -> np.ndarray:
        left: np.ndarray
        right: np.ndarray
        left, right = x // self._b, x % self._b
        for i, key in enumerate(self._keys):
            if i % 2 == 0:
                left = (left + keyed_hash(right, key) % self._a) % self._a
            else:
                right = (right + keyed_hash(left, key) % self._b) % self._b
        return left * self._b + right


class SampleOrder:
    """Sample number -> row, endlessly: sample g is position g mod n of epoch g // n, with a new permutation in each
    epoch.

    A pure function of (n, seed, source name, shuffle, g). `shuffle` is `global`, or `block` (see `BlockPermutation`).
    Positions are computed in blocks of 4096, because each call has a fixed cost, and a few blocks are cached. Raises
    DataError when n < 1.
    """

    def __init__(self, n: int, *, seed: int, source: str, shuffle: str = "global") -> None:
        self.n, self._seed, self._source = operator.index(n), seed, source
        kinds: dict[str, type[Permutation | BlockPermutation]] = {
            "global": Permutation,
            "block": BlockPermutation,
        }
        self._permutation = kinds[shuffle]
        self._permutation(n, seed=seed, source=source, epoch=0)
        self._blocks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def rows(self, first: int, count: int) -> np.ndarray:
        """The rows (int64) of the samples first, first + 1, ..., first + count - 1."""
        assert first >= 0 and count >= 0, (first, count)
        parts = []
        while count > 0:
            epoch, position = divmod(first, self.n)
            number, offset = divmod(position, BLOCK)
            part = self._block(epoch, number)[offset : offset + count]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _block(self, epoch: int, number: int) -> np.ndarray:
        if (epoch, number) in self._blocks:
            self._blocks.move_to_end((epoch, number))
            return self._blocks[epoch, number]
        positions = np.arange(number * BLOCK, min((number + 1) * BLOCK, self.n), dtype=np.int64)
        permutation = self._permutation(self.n, seed=self._seed, source=self._source, epoch=epoch)
        self._blocks[epoch, number] = rows = permutation.forward(positions)
        if len(self._blocks) > _CACHED_BLOCKS:
            self._blocks.popitem(last=False)
        return rows


class BlockPermutation:
    """A permutation of [0, n) that reads remote storage in contiguous groups. It is not a global shuffle.

    Rows are grouped into super-blocks of 256 neighbours; the order of whole super-blocks is permuted, then the rows
    inside each window of 16 super-blocks. The rows beyond the last whole super-block come last, permuted among
    themselves. Raises DataError when n < 1.
    """

    def __init__(self, n: int, *, seed: int, source: str, epoch: int) -> None:
        self.n = operator.index(n)
        self._identity = {"seed": seed, "epoch": epoch}
        self._source = source
        self._whole = self.n // SUPER_BLOCK
        size = self._whole or self.n
        self._super_blocks = Permutation(size, seed=seed, source=f"{source}/super-blocks", epoch=epoch)

    def forward(self, position: np.ndarray) -> np.ndarray:
        """The row at each position; int64 arrays both. Raises DataError for a position outside [0, n)."""
        position = np.atleast_1d(np.asarray(position, dtype=np.int64))
        rows = np.empty_like(position)
        windows = np.minimum(position, self._whole * SUPER_BLOCK) // BLOCK
        tail = position >= self._whole * SUPER_BLOCK
        for window in np.unique(windows[~tail]).tolist():
            inside = (windows == window) & ~tail
            first = window * BLOCK
            size = min(BLOCK, self._whole * SUPER_BLOCK - first)
            place = self._inner(size, f"window {window}").forward(position[inside] - first)
            block = self._super_blocks.forward((first + place) // SUPER_BLOCK)
            rows[inside] = block * SUPER_BLOCK + place % SUPER_BLOCK
        if tail.any():
            first = self._whole * SUPER_BLOCK
            rows[tail] = first + self._inner(self.n - first, "tail").forward(position[tail] - first)
        return rows

    def _inner(self, size: int, name: str) -> Permutation:
        return Permutation(size, source=f"{self._source}/{name}", **self._identity)
