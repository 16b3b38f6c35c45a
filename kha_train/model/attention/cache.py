"""The decoding cache: what is kept of earlier tokens, so that a new token needs only its own forward.

Each attention base decides what it keeps: keys and values, MLA its latent, GTA its tied states, linear
attention sums over tokens. All rows of a batch have the same number of tokens.
"""

# B batch   T new tokens   U tokens seen with them

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerCache:
    """The cached tensors of one layer, each [B, capacity, ...], allocated with the first tokens."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.seen = capacity, 0
        self._kept: tuple[Tensor, ...] = ()

    def extend(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Add [B, T, ...] of the new tokens; returns [B, U, ...] of all tokens so far, as views."""
        if not self._kept:
            self._kept = tuple(torch.empty_like(x[:, :1]).repeat_interleave(self.capacity, 1) for x in new)
        end = self.seen + new[0].shape[1]
        assert end <= self.capacity, f"{end} tokens in a cache for {self.capacity}"
        for kept, x in zip(self._kept, new, strict=True):
            kept[:, self.seen : end] = x
        self.seen = end
        return tuple(kept[:, :end] for kept in self._kept)

    def numbers(self) -> int:
        """Numbers kept per token and row."""
        return sum(kept[0, 0].numel() for kept in self._kept)


class Cache:
    """The caches of all layers, for at most `capacity` tokens per row; `seen` is the number of tokens before the
    current forward. A layer whose attention is linear keeps sums over tokens instead of tokens.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.seen = capacity, 0
        self._positions = LayerCache(capacity)
        self._layers: dict[nn.Module, LayerCache] = {}
        self._sums: dict[nn.Module, tuple[Tensor, ...]] = {}

    def extend(self, layer: nn.Module, *new: Tensor) -> tuple[Tensor, ...]:
        """Add [B, T, ...] of the new tokens to the cache of `layer`; returns [B, U, ...] of all its tokens."""
        return self._layers.setdefault(layer, LayerCache(self.capacity)).extend(*new)

    def positions(self, new_BT: Tensor) -> Tensor:
        """Add the positions of the new tokens; returns those of all tokens, int64 [B, U]."""
        (all_BU,) = self._positions.extend(new_BT)
        return all_BU

    def add(self, layer: nn.Module, *new: Tensor) -> tuple[Tensor, ...]:
        """Add to the sums of `layer` what the new tokens add to each, [B, ...]; returns the sums over the tokens before
        them.
        """
        before = self._sums.get(layer) or tuple(torch.zeros_like(x) for x in new)
        self._sums[layer] = tuple(x + y for x, y in zip(before, new, strict=True))
        return before

    def numbers(self) -> int:
        """Numbers kept per token and row, over all layers."""
        return sum(layer.numbers() for layer in self._layers.values())

    def row_numbers(self) -> int:
        """Numbers kept per row, however many tokens it has, over all layers."""
        return sum(x[0].numel() for sums in self._sums.values() for x in sums)
