"""Options of the attention variants: the headers, free of torch, of what `kha_train/model/attention` builds.

Each class says which fields a variant takes, and declares in words what it cannot be combined with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Projection = Literal["q", "k", "v"]


@dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """What every attention base has: its registry name and the shape of its queries."""

    name: str
    query_heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class GroupedQueryOptions(BaseOptions):
    """Grouped-query attention; `kv_heads` = `query_heads` is MHA, 1 is MQA."""

    kv_heads: int


@dataclass(frozen=True, kw_only=True)
class InteractionOptions:
    """What every head interaction has: its registry name. `none` has nothing else."""

    name: str

    def admits(self, base: BaseOptions) -> str | None:
        """Why this interaction cannot sit on `base`, in words a user can act on; None when it can."""
        return None


@dataclass(frozen=True, kw_only=True)
class KnockingOptions(InteractionOptions):
    """Knocking-heads: matrices shared by all heads of a kind, on any of the projections q, k, v (KHA eq 5-9)."""

    on: tuple[Projection, ...] = ("v",)


