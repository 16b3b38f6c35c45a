"""Options of the package's own attention bases. Their counts are the formulas of docs/attention.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from kha_train.errors import ConfigError, Settings
from kha_train.variants.attention import POSITIONS, BaseOptions, HeadShape, InputWidths, Partners, QkNorm
from kha_train.variants.backends import Asked


@dataclass(frozen=True, kw_only=True)
class GroupedQueryOptions(BaseOptions):
    """Grouped-query attention; `kv_heads` = `query_heads` is MHA, 1 is MQA."""

    turns_whole_heads: ClassVar[bool] = True
    kv_heads: int

    def invalid(self) -> ConfigError | None:
        """Query heads must divide evenly among the key/value heads."""
        divisors = [n for n in range(1, self.query_heads + 1) if self.query_heads % n == 0]
        if self.kv_heads not in divisors:
            return ConfigError(
                f"does not divide {self.query_heads} query heads",
                field="model.kv_heads",
                value=self.kv_heads,
                allowed=", ".join(map(str, divisors)),
                fix=Settings(f"model.kv_heads={max(n for n in divisors if n <= max(self.kv_heads, 1))}"),
                code="E03",
            )
        return super().invalid()

    def heads(self) -> HeadShape:
        """See `BaseOptions.heads`."""
        altered = self.output_gate == "elementwise"
        width = self.head_dim
        return HeadShape(self.query_heads, self.kv_heads, width, width, altered=altered, projected=True)

    def parameters(self, hidden_size: int) -> int:
        """Queries and output, keys and values, gate."""
        return hidden_size * (2 * self.head_dim * (self.query_heads + self.kv_heads) + self.gate_outputs())

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
class GroupedTiedOptions(GroupedQueryOptions):
    """Grouped-tied attention (GTA): `kv_heads` states are values and the first half of the keys; the other half of the
    keys is one rotary head, shared by all."""

    turns_whole_heads: ClassVar[bool] = False

    def conflict(self, partners: Partners) -> ConfigError | None:
        """The rotary key needs rotation, and it has its own norm."""
        if partners.qk_norm == "full_width":
            return ConfigError(
                "a tied key has no full width: half of it is shared by all heads",
                field="attention.qk_norm",
                value="full_width",
                allowed="per_head, none",
            )
        return _needs_rotation(partners, "gta")

    def rotary_width(self) -> int:
        """Half a head."""
        return self.head_dim // 2

    def rotary_setting(self, width: int) -> tuple[str, int]:
        """See `BaseOptions.rotary_setting`."""
        return "head_dim", 2 * width

    def heads(self) -> HeadShape:
        """The tied states count as values."""
        return super().heads()._replace(tied=True)

    def parameters(self, hidden_size: int) -> int:
        """Queries and output, tied states, rotary key, gate."""
        tied = self.head_dim * (2 * self.query_heads + self.kv_heads) + self.rotary_width()
        return hidden_size * (tied + self.gate_outputs())

    def norm_parameters(self, qk_norm: QkNorm) -> int:
        """One gain for queries, one for the tied half of a key and one for its rotary half."""
        return 0 if qk_norm == "none" else 2 * self.head_dim

    def saved_numbers(self, qk_norm: QkNorm) -> int:
        """Norms of queries, of the rotary key and of the tied half, whose input is the state itself."""
        if qk_norm == "none":
            return 0
        tied = self.kv_heads * (self.head_dim - self.rotary_width() + 1)
        return self.query_heads * (2 * self.head_dim + 1) + 2 * self.rotary_width() + 1 + tied

    def normalised_numbers(self, qk_norm: QkNorm) -> int:
        """Those of queries, of the rotary key and of the tied half."""
        if qk_norm == "none":
            return 0
        tied = self.kv_heads * (self.head_dim - self.rotary_width())
        return self.query_heads * self.head_dim + self.rotary_width() + tied

    def cache_numbers(self) -> int:
        """The tied states and one rotary key."""
        return self.kv_heads * self.head_dim + self.rotary_width()


@dataclass(frozen=True, kw_only=True)
class LatentOptions(BaseOptions):
    """Multi-head latent attention (MLA): keys and values are computed from one latent of `latent_width`, and one rotary
    key of `rotary_dim` serves all heads. With `query_latent_width` above 0, queries are computed from a latent too.
    """

    latent_width: int
    rotary_dim: int
    query_latent_width: int = 0

    def invalid(self) -> ConfigError | None:
        """The widths of latents must be positive."""
        if self.latent_width < 1:
            return ConfigError("must be at least 1", field="attention.base.latent_width", value=self.latent_width)
        if self.query_latent_width < 0:
            return ConfigError(
                "must not be negative", field="attention.base.query_latent_width", value=self.query_latent_width
            )
        return super().invalid()

    def conflict(self, partners: Partners) -> ConfigError | None:
        """A norm between latent and score would prevent decoding from attending to the latents themselves."""
        if partners.qk_norm != "none":
            return ConfigError(
                "mla normalises its latents; a norm of its keys could not be absorbed when decoding",
                field="attention.qk_norm",
                value=partners.qk_norm,
                fix=Settings("attention.qk_norm=none"),
            )
        return _needs_rotation(partners, "mla")

    def rotary_width(self) -> int:
        """The rotary key."""
        return self.rotary_dim

    def rotary_setting(self, width: int) -> tuple[str, int]:
        """See `BaseOptions.rotary_setting`."""
        return "rotary_dim", width

    def heads(self) -> HeadShape:
        """The heads without their rotary part."""
        altered = self.output_gate == "elementwise"
        return HeadShape(self.query_heads, self.query_heads, self.head_dim, self.head_dim, latent=True, altered=altered)

    def input_widths(self, hidden_size: int) -> InputWidths:
        """Keys and values are computed from the latent, and queries may be."""
        return InputWidths(self.query_latent_width or hidden_size, self.latent_width, self.latent_width, hidden_size)

    def parameters(self, hidden_size: int) -> int:
        """Queries (with their latent), latent and rotary key and gate, keys and values, output."""
        queries = self.query_heads * (self.head_dim + self.rotary_dim)
        latent = self.query_latent_width
        query = latent * (hidden_size + queries) if latent else hidden_size * queries
        down = hidden_size * (self.latent_width + self.rotary_dim + self.gate_outputs())
        return query + down + self.query_heads * self.head_dim * (2 * self.latent_width + hidden_size)

    def norm_parameters(self, qk_norm: QkNorm) -> int:
        """The latents'."""
        return self.latent_width + self.query_latent_width

    def saved_numbers(self, qk_norm: QkNorm) -> int:
        """Each latent before its norm, normalised, and as the projections read it."""
        return sum(3 * width + 1 for width in (self.latent_width, self.query_latent_width) if width)

    def normalised_numbers(self, qk_norm: QkNorm) -> int:
        """Each latent once: `saved_numbers` counts it before its gain too."""
        return self.latent_width + self.query_latent_width

    def pair_flops(self) -> int:
        """q . k with its rotary part, and weight * v."""
        return 2 * self.query_heads * (2 * self.head_dim + self.rotary_dim)

    def cache_numbers(self) -> int:
        """The latent and the rotary key."""
        return self.latent_width + self.rotary_dim


@dataclass(frozen=True, kw_only=True)
class TalkingHeadsOptions(GroupedQueryOptions):
    """Talking-heads attention: scores and weights are mixed across heads. All scores are in memory, so rows are limited
    to `max_tokens`.
    """

    asks: ClassVar[Asked] = "scores"
    max_tokens: int = 2048

    def conflict(self, partners: Partners) -> ConfigError | None:
        """Only short rows: all their scores are held."""
        if partners.seq_len > self.max_tokens:
            return ConfigError(
                f"talking_heads holds all scores of a row, and is kept to attention.base.max_tokens={self.max_tokens}",
                field="model.seq_len",
                value=partners.seq_len,
                fix="shorten the rows, or raise attention.base.max_tokens if there is enough memory",
            )
        return None

    def identities(self) -> Mapping[str, float]:
        """The mixes of scores and of weights."""
        return {"score_mix": 1.0, "weight_mix": 1.0}

    def parameters(self, hidden_size: int) -> int:
        """Those of the heads, and a mix of scores and one of weights."""
        return super().parameters(hidden_size) + 2 * self.query_heads**2

    def token_flops(self, hidden_size: int) -> int:
        """The cost of the mixes depends on pairs of tokens."""
        return 2 * super().parameters(hidden_size)

    def saved_score_copies(self, width: int) -> int:
        """The scores before mixing and, unless softmax's own copy serves, the weights before mixing."""
        return 1 if width == 4 else 2

    def pair_flops(self) -> int:
        """q . k, weight * v, and both mixes."""
        return super().pair_flops() + 4 * self.query_heads**2


@dataclass(frozen=True, kw_only=True)
class DifferentialOptions(GroupedQueryOptions):
    """Differential attention: two query heads, two key heads and a value of double width make one output."""

    kernel_calls: ClassVar[int] = 2

    def invalid(self) -> ConfigError | None:
        """Heads of keys come in pairs."""
        if self.kv_heads % 2:
            return ConfigError(
                "differential attention takes the difference of pairs of heads",
                field="model.kv_heads",
                value=self.kv_heads,
                allowed="even numbers that divide model.query_heads",
                fix="an even number",
            )
        return super().invalid()

    def conflict(self, partners: Partners) -> ConfigError | None:
        """A bias has a slope for each head."""
        return _takes_no_bias(partners, "the two maps of a pair would have different slopes")

    def heads(self) -> HeadShape:
        """The halves of a value count as two heads; each pair's output is normalised."""
        return super().heads()._replace(altered=True)

    def separable_heads(self) -> int:
        """The pairs of key heads."""
        return self.kv_heads // 2

    def parameters(self, hidden_size: int) -> int:
        """Those of grouped-query attention, and the four vectors of lambda."""
        return super().parameters(hidden_size) + 4 * self.head_dim

    def token_flops(self, hidden_size: int) -> int:
        """Lambda is made once, and not for each token."""
        return 2 * super().parameters(hidden_size)

    def norm_parameters(self, qk_norm: QkNorm) -> int:
        """One more gain, as wide as a value, for the outputs of all pairs."""
        return super().norm_parameters(qk_norm) + 2 * self.head_dim

    def saved_numbers(self, qk_norm: QkNorm) -> int:
        """The difference, normalised, and the result."""
        return super().saved_numbers(qk_norm) + 3 * self.query_heads * self.head_dim + self.query_heads // 2

    def normalised_numbers(self, qk_norm: QkNorm) -> int:
        """And the normalised difference."""
        return super().normalised_numbers(qk_norm) + self.query_heads * self.head_dim

    def pair_flops(self) -> int:
        """Both halves of a value by a call of its own, which computes the scores again."""
        return self.kernel_calls * super().pair_flops()


@dataclass(frozen=True, kw_only=True)
class LinearOptions(GroupedQueryOptions):
    """Causal linear attention. `chunk_tokens` is the length of the chunks of backend `chunked`: speed, not results."""

    asks: ClassVar[Asked] = "linear"
    turns_whole_heads: ClassVar[bool] = False
    chunk_tokens: int = 64

    def conflict(self, partners: Partners) -> ConfigError | None:
        """There is no softmax whose scores a bias could lower."""
        return _takes_no_bias(partners, "a bias of scores acts inside a softmax, and linear attention has none")

    def heads(self) -> HeadShape:
        """See `BaseOptions.heads`."""
        return super().heads()._replace(summed=True)

    def pair_flops(self) -> int:
        """q . k and its product with v; the product of a mask with k, for the denominator."""
        return super().pair_flops() + 2 * self.kv_heads * self.head_dim

    def score_flops(self, tokens: int) -> int:
        """As `chunked` computes it: pairs inside a chunk and the mask as a product; in a row of several chunks, adding
        to the sums over tokens and reading them.
        """
        within = min(tokens, self.chunk_tokens) * (self.pair_flops() + 2 * self.kv_heads) // 2
        sums = 2 * self.head_dim * (self.head_dim * (self.query_heads + self.kv_heads) + 2 * self.kv_heads)
        return within + (sums if tokens > self.chunk_tokens else 0)

    def cache_numbers(self) -> int:
        """Nothing for a single token."""
        return 0

    def row_numbers(self) -> int:
        """The sums of k v^T and of k."""
        return self.kv_heads * self.head_dim * (self.head_dim + 1)

    def own_kernel_numbers(self, backend: str, tokens: int, split: bool, width: int) -> int:
        """See `BaseOptions.own_kernel_numbers`."""
        queries, keys = self.query_heads * self.head_dim, self.kv_heads * self.head_dim
        chunk = tokens if backend == "eager" else min(tokens, self.chunk_tokens)
        # Inputs and both parts of the feature map; q with its sum of keys, numerator, denominator and their ratio.
        outside = 3 * (queries + keys) + 3 * queries + keys + self.query_heads
        # q, k, v in chunks, all scores of a chunk, and those of the denominator.
        inside = queries + 2 * keys + (self.query_heads + self.kv_heads) * chunk
        if chunk == tokens:
            return outside + inside
        return outside + inside + keys * (self.head_dim + 1) // chunk + (queries + keys if split else 0)


def _needs_rotation(partners: Partners, name: str) -> ConfigError | None:
    if POSITIONS[partners.positions].turns:
        return None
    return ConfigError(
        f"{name} keeps its positions in a rotary key of its own",
        field="attention.positions",
        value=partners.positions,
        fix=Settings("attention.positions=rope"),
    )


def _takes_no_bias(partners: Partners, reason: str) -> ConfigError | None:
    if not POSITIONS[partners.positions].bias:
        return None
    return ConfigError(
        reason,
        field="attention.positions",
        value=partners.positions,
        allowed=", ".join(name for name, traits in POSITIONS.items() if not traits.bias),
        fix=Settings("attention.positions=rope"),
    )
