"""The contract of an attention variant's options: the torch-free header of the modules in `kha_train/model/attention`.

Each class holds the fields of a variant, checks them and its partners, and counts what one layer of it holds and costs.
A multiplication and an addition are two operations; only matrix products are counted. The variants that come with the
package have theirs in `bases.py` and `interactions.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, get_args

from kha_train.errors import ConfigError
from kha_train.variants.backends import Asked

Projection = Literal["q", "k", "v"]
QkNorm = Literal["per_head", "full_width", "none"]
Positions = Literal["rope", "alibi", "learned", "none"]
OutputGate = Literal["none", "headwise", "elementwise"]


class PositionTraits(NamedTuple):
    """What a kind of positions does: `turns` queries and keys by rotary embedding, adds a `bias` to the scores, or adds
    a vector to the `embedding`."""

    turns: bool = False
    bias: bool = False
    embedding: bool = False


POSITIONS: dict[Positions, PositionTraits] = {
    "rope": PositionTraits(turns=True),
    "alibi": PositionTraits(bias=True),
    "learned": PositionTraits(embedding=True),
    "none": PositionTraits(),
}


class HeadShape(NamedTuple):
    """What an attention base tells an interaction about its heads: the number of each kind, and their width. `latent`:
    keys and values are never computed at inference; `tied`: keys and values are one state, which counts as the values;
    `altered`: more than a number for each head stands between the weighted sum of values and the output projection, so
    no map of values can be folded into the latter; `normed`: keys are normalised after the interaction;
    `summed`: decoding keeps sums over tokens, of keys and values that are composed; `projected`: decoding can keep keys
    as they are projected, and normalise and rotate them when it reads them.
    """

    query_heads: int
    kv_heads: int
    key_width: int
    value_width: int
    latent: bool = False
    tied: bool = False
    altered: bool = False
    normed: bool = True
    summed: bool = False
    projected: bool = False

    def count(self, projection: Projection) -> int:
        """Number of heads of the projection."""
        return self.query_heads if projection == "q" else self.kv_heads

    def width(self, projection: Projection) -> int:
        """Width of each of them."""
        return self.value_width if projection == "v" else self.key_width


class InputWidths(NamedTuple):
    """The number of inputs of each projection, and the number of outputs of the output projection: they determine the
    cost of multiplying a matrix into its weight.
    """

    q: int
    k: int
    v: int
    output: int


class Partners(NamedTuple):
    """Other settings that an attention base may refuse to work with."""

    qk_norm: QkNorm
    positions: Positions
    seq_len: int
    layers: int


@dataclass(frozen=True, kw_only=True)
class BaseOptions(ABC):
    """What every attention base has: its registry name and the shape of its queries. The counts are for one layer.

    `output_gate` multiplies the output of each head, before the output projection, by the sigmoid of a projection of
    the layer's input: one number for each head (`headwise`) or for each dimension of a head (`elementwise`).
    """

    turns_whole_heads: ClassVar[bool] = False
    """Whether queries and keys are normalised and rotated as whole heads, so that one kernel can do both."""
    kernel_calls: ClassVar[int] = 1
    """How often it calls its backend in a forward, with the same queries and keys."""
    asks: ClassVar[Asked] = "softmax"
    """What it asks of a backend."""
    name: str
    query_heads: int
    head_dim: int
    output_gate: OutputGate = "none"

    def invalid(self) -> ConfigError | None:
        """The error in these options, or None."""
        if self.query_heads < 1:
            return ConfigError("must be at least 1", field="attention.base.query_heads", value=self.query_heads)
        if self.head_dim < 1:
            return ConfigError("must be at least 1", field="model.head_dim", value=self.head_dim)
        return None

    def conflict(self, partners: Partners) -> ConfigError | None:
        """The setting that this base cannot work with, or None."""
        return None

    def separable_heads(self) -> int:
        """The number of equal parts of heads that can be computed apart from each other."""
        return self.query_heads

    def rotary_width(self) -> int:
        """The width of the part of a query or key that rotary embedding acts on. `turned_dimensions` of it are
        rotated.
        """
        return self.head_dim

    def kernel_width(self) -> int:
        """The width of the queries and keys that a kernel reads: beside a latent, the rotary part too."""
        heads = self.heads()
        return heads.key_width + (self.rotary_width() if heads.latent else 0)

    def rotary_setting(self, width: int) -> tuple[str, int]:
        """The field of these options that sets `rotary_width`, and the value that makes it `width`."""
        return "head_dim", width

    def identities(self) -> Mapping[str, float | None]:
        """The matrices through which this base lets heads exchange information, by name, as in `InteractionOptions`."""
        return {}

    def input_widths(self, hidden_size: int) -> InputWidths:
        """See `InputWidths`."""
        return InputWidths(hidden_size, hidden_size, hidden_size, hidden_size)

    def gate_outputs(self) -> int:
        """Numbers per token by which the output gate multiplies."""
        heads = self.heads()
        widths: dict[OutputGate, int] = {"none": 0, "headwise": 1, "elementwise": heads.value_width}
        return heads.query_heads * widths[self.output_gate]

    def gate_numbers(self) -> int:
        """Numbers per token that the backward needs for the output gate: its values, and the gated outputs."""
        heads = self.heads()
        return 0 if self.output_gate == "none" else self.gate_outputs() + heads.query_heads * heads.value_width

    def token_flops(self, hidden_size: int) -> int:
        """Operations per token, forward, without scores and weighted sum."""
        return 2 * self.parameters(hidden_size)

    def saved_numbers(self, qk_norm: QkNorm) -> int:
        """Numbers per token that the backward needs between the projections and the kernel, without those of an
        interaction: a norm keeps its input, the normalised input and one number per head.
        """
        heads = self.heads()
        if qk_norm == "none":
            return 0
        scales = 2 if qk_norm == "full_width" else heads.query_heads + heads.kv_heads
        return 2 * heads.key_width * (heads.query_heads + heads.kv_heads) + scales

    def normalised_numbers(self, qk_norm: QkNorm) -> int:
        """How many of `saved_numbers` a norm does not keep that is one kernel, as on CUDA: the normalised input."""
        heads = self.heads()
        return 0 if qk_norm == "none" else heads.key_width * (heads.query_heads + heads.kv_heads)

    def saved_score_copies(self, width: int) -> int:
        """How many copies of all scores the backward needs besides the weights of the softmax, in a dtype of `width`
        bytes.
        """
        return 0

    def score_flops(self, tokens: int) -> int:
        """Operations per token, forward, of scores and weighted sum in a row of so many tokens that is one document:
        causal order halves them.
        """
        return tokens * self.pair_flops() // 2

    def row_numbers(self) -> int:
        """Numbers that decoding keeps per row, however many tokens it has."""
        return 0

    def own_kernel_numbers(self, backend: str, tokens: int, split: bool, width: int) -> int | None:
        """Numbers of `width` bytes per token that the backward needs of scores and weighted sum, in rows of `tokens`
        that are `split` into documents or not; None for what the backends of softmax(QK)V keep.
        """
        return None

    @abstractmethod
    def heads(self) -> HeadShape:
        """The heads that an interaction acts on."""

    @abstractmethod
    def parameters(self, hidden_size: int) -> int:
        """Number of parameters of all its matrices, those of the output gate among them."""

    @abstractmethod
    def norm_parameters(self, qk_norm: QkNorm) -> int:
        """Number of parameters of the norms inside the attention."""

    @abstractmethod
    def pair_flops(self) -> int:
        """Operations for one query token and one attended token, over all heads: scores and weighted sum."""

    @abstractmethod
    def cache_numbers(self) -> int:
        """Numbers that decoding keeps per earlier token."""


class Implementation(NamedTuple):
    """How an interaction is computed, `eager`, `folded` or `triton`, and the reason; `folded` says whether a part of it
    is multiplied into neighbouring weights.
    """

    name: str
    why: str
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class InteractionOptions:
    """What every head interaction has: its registry name. `none` has nothing else. The counts are for one layer."""

    name: str

    def at(self, layer: int) -> InteractionOptions:
        """The options of one layer, counted from 0: counts and the module are made of these."""
        return self

    def invalid(self) -> ConfigError | None:
        """The error in these options, or None."""
        return None

    def refuses(self, base: BaseOptions) -> str | None:
        """Why this interaction does not work on `base`, in words that help the user; None when it does."""
        return None

    def identities(self, heads: HeadShape) -> Mapping[str, float | None]:
        """The matrices through which heads exchange information, by name: the value on the diagonal (zero elsewhere) at
        which each leaves heads unchanged, or None where there is none. The module that owns one declares it with
        `DeclaredModule.declare_interaction`.
        """
        return {}

    def parameters(self, heads: HeadShape) -> int:
        """Number of its parameters."""
        return 0

    def frozen_numbers(self, heads: HeadShape) -> int:
        """Number of elements of matrices that are never trained: no parameters, but fp32 numbers on every rank."""
        return 0

    def flops(self, heads: HeadShape) -> int:
        """Operations per token, forward, as the definition computes it."""
        return 0

    def components(self, projection: Projection, heads: HeadShape) -> int:
        """How many heads the base projects, of which the interaction makes those of `heads`."""
        return heads.count(projection)

    def cache_numbers(self, heads: HeadShape) -> int:
        """Numbers that decoding keeps per earlier token, besides those of the base: none where heads exchange
        information before keys and values are stored, or after they are read; fewer than none where fewer heads are
        stored than read.
        """
        return 0

    def conflict(self, partners: Partners) -> ConfigError | None:
        """The setting that this interaction cannot work with, or None."""
        return None

    def saved_numbers(self, heads: HeadShape, way: Implementation) -> int:
        """Numbers per token that the backward needs besides those of the base and its kernel."""
        return 0

    def normalised_numbers(self, heads: HeadShape) -> int:
        """How many of `saved_numbers` a norm does not keep that is one kernel, as on CUDA."""
        return 0

    def implementation(self, heads: HeadShape, inputs: InputWidths, tokens: int, kernels: str) -> Implementation:
        """The implementation for forwards of so many tokens, under `engine.kernels`."""
        return Implementation("eager", "it has no other")

    def strides_values(self) -> bool:
        """Whether, unfolded, it leaves values in a layout that fused kernels do not support."""
        return False

    def warnings(self) -> list[str]:
        """Warnings about settings that are allowed but cost more than a user may expect."""
        return []

    def absorbed(self, heads: HeadShape) -> InteractionOptions | None:
        """What remains of the interaction once its matrices are multiplied into the projections; None when they cannot
        be.
        """
        return self


@dataclass(frozen=True, kw_only=True)
class FoldableOptions(InteractionOptions, ABC):
    """An interaction that can be multiplied into the weights of the neighbouring projections.

    `impl`: `eager` is the definition, on activations; `folded` is the same function with the same gradients, computed
    on weights, whose cost does not depend on the number of tokens; `triton` folds what can be folded and computes the
    rest in one kernel, if there is one; `auto` selects the cheaper of the first two, or the kernel with
    `engine.kernels: triton`. Only the speed differs.
    """

    impl: Literal["auto", "eager", "folded", "triton"] = "auto"

    def unfoldable(self, heads: HeadShape) -> str | None:
        """Why it cannot be folded on these heads, or None."""
        return None

    def without_kernel(self, heads: HeadShape) -> str | None:
        """Why it has no kernel on these heads, or None."""
        return "nothing is left to compute once it is folded, so it has no kernel"

    @abstractmethod
    def saved_flops(self, heads: HeadShape, inputs: InputWidths) -> int:
        """Operations per token that folding saves."""

    @abstractmethod
    def fold_flops(self, heads: HeadShape, inputs: InputWidths) -> int:
        """Operations per forward that folding costs."""

    @abstractmethod
    def folded_numbers(self, heads: HeadShape, inputs: InputWidths) -> int:
        """Number of elements of the folded weights."""

    def refuses(self, base: BaseOptions) -> str | None:
        """An explicit `folded` or `triton` must be possible."""
        reasons = {"folded": self.unfoldable(base.heads()), "triton": self.without_kernel(base.heads())}
        reason = reasons.get(self.impl)
        if reason:
            return f"impl={self.impl} is not possible: {reason}; take attention.interaction.impl=eager or auto"
        return super().refuses(base)

    def implementation(self, heads: HeadShape, inputs: InputWidths, tokens: int, kernels: str) -> Implementation:
        """See `InteractionOptions.implementation`."""
        unfoldable = self.unfoldable(heads)
        if self.impl in ("eager", "folded"):
            return Implementation(self.impl, "chosen by attention.interaction.impl", self.impl == "folded")
        if self.impl == "triton":
            return Implementation("triton", "chosen by attention.interaction.impl", not unfoldable)
        if kernels == "triton" and not self.without_kernel(heads):
            return Implementation("triton", "chosen by engine.kernels", not unfoldable)
        if unfoldable:
            return Implementation("eager", unfoldable)
        folding, spared = self.fold_flops(heads, inputs), tokens * self.saved_flops(heads, inputs)
        why = f"folding a layer costs {folding:.3g} operations and spares {spared:.3g}"
        return Implementation("folded", why, True) if folding < spared else Implementation("eager", why)


def component_parameters(base: BaseOptions, interaction: InteractionOptions, hidden_size: int) -> int:
    """How many parameters more (fewer: below 0) the projections of a layer have because the interaction composes its
    heads of another number of them (`InteractionOptions.components`)."""
    heads, inputs = base.heads(), base.input_widths(hidden_size)
    return sum(
        (interaction.components(p, heads) - heads.count(p)) * heads.width(p) * int(getattr(inputs, p))
        for p in get_args(Projection)
    )


def shared_key_repeats(query_heads: int, kv_heads: int, ranks: int) -> int:
    """How often each key/value head is repeated, so that every one of `ranks` that share rows gets equally many, and
    those that its query heads read. `ranks` divide `query_heads`.
    """
    group = query_heads // kv_heads
    return next(n for n in range(1, group + 1) if group % n == 0 and kv_heads * n % ranks == 0)
