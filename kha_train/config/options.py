"""Options of the attention variants: the headers, free of torch, of what `kha_train/model/attention` builds.

Each class holds the fields a variant takes, says itself what is wrong with them or with its partner, and counts what
one layer of it holds and costs. A multiplication and an addition are two operations; only matrix products are counted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from kha_train.errors import ConfigError

Projection = Literal["q", "k", "v"]
QkNorm = Literal["per_head", "full_width", "none"]


class HeadShape(NamedTuple):
    """What an attention base tells an interaction about its heads: how many of each kind, and how wide."""

    query_heads: int
    kv_heads: int
    key_width: int
    value_width: int

    def count(self, projection: Projection) -> int:
        """How many heads the projection makes."""
        return self.query_heads if projection == "q" else self.kv_heads

    def width(self, projection: Projection) -> int:
        """How wide each of them is."""
        return self.value_width if projection == "v" else self.key_width


@dataclass(frozen=True, kw_only=True)
class BaseOptions(ABC):
    """What every attention base has: its registry name and the shape of its queries. The counts are for one layer."""

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

    @abstractmethod
    def heads(self) -> HeadShape:
        """The heads that an interaction meets."""

    @abstractmethod
    def projection_parameters(self, hidden_size: int) -> int:
        """Parameters of all matrices; a token costs two operations for each."""

    @abstractmethod
    def norm_parameters(self, qk_norm: QkNorm) -> int:
        """Parameters of the norms inside the attention."""

    @abstractmethod
    def pair_flops(self) -> int:
        """Operations for one query token and one token it attends to, over all heads: scores and weighted sum."""

    @abstractmethod
    def cache_numbers(self) -> int:
        """Numbers that decoding keeps for every token seen."""


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

    def heads(self) -> HeadShape:
        """See `BaseOptions.heads`."""
        return HeadShape(self.query_heads, self.kv_heads, self.head_dim, self.head_dim)

    def projection_parameters(self, hidden_size: int) -> int:
        """Queries and output, keys and values."""
        return 2 * hidden_size * self.head_dim * (self.query_heads + self.kv_heads)

    def norm_parameters(self, qk_norm: QkNorm) -> int:
        """One gain for all heads of a kind, or one for each."""
        gains = {"per_head": 2, "full_width": self.query_heads + self.kv_heads, "none": 0}
        return gains[qk_norm] * self.head_dim

    def pair_flops(self) -> int:
        """q . k and weight * v."""
        return 4 * self.query_heads * self.head_dim

    def cache_numbers(self) -> int:
        """Keys and values."""
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class InteractionOptions:
    """What every head interaction has: its registry name. `none` has nothing else. The counts are for one layer."""

    name: str

    def invalid(self) -> ConfigError | None:
        """What is wrong with these options, or None."""
        return None

    def refuses(self, base: BaseOptions) -> str | None:
        """Why this interaction cannot sit on `base`, in words a user can act on; None when it can."""
        return None

    def parameters(self, heads: HeadShape) -> int:
        """Its parameters."""
        return 0

    def flops(self, heads: HeadShape) -> int:
        """Operations for one token, forward, as the definition computes it."""
        return 0


@dataclass(frozen=True, kw_only=True)
class KnockingOptions(InteractionOptions):
    """Knocking-heads: matrices shared by all heads of a kind, on any of the projections q, k, v (KHA eq 5-9)."""

    matrices: ClassVar[int]
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

    def parameters(self, heads: HeadShape) -> int:
        """Square matrices, shared by the heads of a kind."""
        return sum(self.matrices * heads.width(p) ** 2 for p in self.projections)

    def flops(self, heads: HeadShape) -> int:
        """Every head times every matrix."""
        return sum(2 * self.matrices * heads.count(p) * heads.width(p) ** 2 for p in self.projections)


@dataclass(frozen=True, kw_only=True)
class KnockingLinearOptions(KnockingOptions):
    """KHA-Linear: one matrix for each projection."""

    matrices: ClassVar[int] = 1


@dataclass(frozen=True, kw_only=True)
class KnockingMlpOptions(KnockingOptions):
    """KHA-MLP: up, gate and down for each projection."""

    matrices: ClassVar[int] = 3
