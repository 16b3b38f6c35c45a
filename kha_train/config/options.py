"""Options of the attention variants: the headers, free of torch, of what `kha_train/model/attention` builds.

Each class holds the fields a variant takes, and says itself what is wrong with them or with its partner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kha_train.errors import ConfigError

Projection = Literal["q", "k", "v"]


@dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """What every attention base has: its registry name and the shape of its queries."""

    name: str
    query_heads: int
    head_dim: int

    def invalid(self) -> ConfigError | None:
        """What is wrong with these options, or None."""
        if self.query_heads < 1:
            return ConfigError("must be at least 1", field="attention.base.query_heads", value=self.query_heads)
        if self.head_dim < 2 or self.head_dim % 2:
            return ConfigError(
                "rotary embedding turns pairs", field="model.head_dim", value=self.head_dim, allowed="even numbers"
            )
        return None


@dataclass(frozen=True, kw_only=True)
class GroupedQueryOptions(BaseOptions):
    """Grouped-query attention; `kv_heads` = `query_heads` is MHA, 1 is MQA."""

    kv_heads: int

    def invalid(self) -> ConfigError | None:
        """Query heads must deal out evenly to the key/value heads."""
        divisors = [n for n in range(1, self.query_heads + 1) if self.query_heads % n == 0]
        if self.kv_heads not in divisors:
            return ConfigError(
                f"does not divide {self.query_heads} query heads",
                field="model.kv_heads",
                value=self.kv_heads,
                allowed=", ".join(map(str, divisors)),
                fix=f"model.kv_heads={max(n for n in divisors if n <= max(self.kv_heads, 1))}",
            )
        return super().invalid()


@dataclass(frozen=True, kw_only=True)
class InteractionOptions:
    """What every head interaction has: its registry name. `none` has nothing else."""

    name: str

    def invalid(self) -> ConfigError | None:
        """What is wrong with these options, or None."""
        return None

    def refuses(self, base: BaseOptions) -> str | None:
        """Why this interaction cannot sit on `base`, in words a user can act on; None when it can."""
        return None


@dataclass(frozen=True, kw_only=True)
class KnockingOptions(InteractionOptions):
    """Knocking-heads: matrices shared by all heads of a kind, on any of the projections q, k, v (KHA eq 5-9)."""

    projections: tuple[Projection, ...] = ("v",)

    def invalid(self) -> ConfigError | None:
        """At least one projection, each once."""
        if not self.projections or len(set(self.projections)) != len(self.projections):
            return ConfigError(
                "name each projection once",
                field="attention.interaction.projections",
                value=list(self.projections),
                allowed="a non-empty choice of q, k, v",
                fix="attention.interaction.projections=[v]",
            )
        return None
