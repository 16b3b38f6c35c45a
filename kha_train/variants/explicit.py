"""Options of explicit multi-head attention. Its counts are the formulas of docs/attention.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kha_train.errors import ConfigError, Settings
from kha_train.variants.attention import (
    BaseOptions,
    FoldableOptions,
    HeadShape,
    Implementation,
    InputWidths,
    InteractionOptions,
    Partners,
    Projection,
)
from kha_train.variants.interactions import TIED, MatrixOptions, each_once


def virtual_heads(absorbed: InteractionOptions, heads: HeadShape, by_layer: Sequence[int]) -> InteractionOptions:
    """The options of a model whose heads are compressed to so many in each layer (0: not at all), where `absorbed` is
    what is left of its interaction: a norm of the outputs stays.
    """
    return ExplicitOptions(
        name="explicit",
        compose=("v",) if heads.tied else ("k", "v"),
        component_heads_by_layer=tuple(by_layer),
        head_norm=isinstance(absorbed, ExplicitOptions) and absorbed.head_norm,
    )


@dataclass(frozen=True, kw_only=True)
class ExplicitOptions(MatrixOptions, FoldableOptions):
    """Explicit multi-head attention (MEA eq 10-17): keys and values of all heads are composed by a G x G matrix, and
    `head_norm` normalises each head's output. `mix_after_rope` composes keys after norm and rotation instead. Without
    `train` the compositions are frozen; the norm's gain is trained all the same.

    `component_heads` is h' of eq 10 for what is composed: the base projects so many heads, and an h' x G matrix makes
    the G key/value heads of them; 0: as many. With fewer, decoding caches the components and composes them when it
    reads them. With fewer or more, no values leave heads unchanged: with `init.kind: identity` each component serves a
    block of heads, as in grouped-query attention. `component_heads_by_layer` has h' of each layer instead; 0: nothing
    is composed there.
    """

    compose: tuple[Projection, ...] = ("k", "v")
    component_heads: int = 0
    component_heads_by_layer: tuple[int, ...] = ()
    head_norm: bool = True
    mix_after_rope: bool = False

    def at(self, layer: int) -> InteractionOptions:
        """See `InteractionOptions.at`."""
        if not self.component_heads_by_layer:
            return self
        count = self.component_heads_by_layer[layer]
        if count:
            return replace(self, component_heads=count, component_heads_by_layer=())
        return self.uncomposed()

    def uncomposed(self) -> InteractionOptions:
        """What is left where nothing is composed: the norm of the outputs, or nothing."""
        if self.head_norm:
            return ExplicitOptions(name=self.name, compose=(), head_norm=True, impl="eager")
        return InteractionOptions(name="none")

    def invalid(self) -> ConfigError | None:
        """Only keys and values are composed, and something must be done at all."""
        if "q" in self.compose:
            return ConfigError(
                "queries are not composed (MEA eq 11)", field="attention.interaction.compose", allowed="k, v"
            )
        if self.mix_after_rope and "k" not in self.compose:
            return ConfigError("keys are not composed", field="attention.interaction.mix_after_rope", value=True)
        if not self.compose and self.component_heads:
            return ConfigError(
                "nothing is composed",
                field="attention.interaction.component_heads",
                value=self.component_heads,
                fix=Settings("attention.interaction.component_heads=0"),
            )
        by_layer = self.component_heads_by_layer
        if by_layer and (self.component_heads or not self.compose or not any(by_layer)):
            return ConfigError(
                "is given beside a number for all layers" if self.component_heads else "nothing is composed",
                field="attention.interaction.component_heads_by_layer",
                value=list(by_layer),
                fix=Settings("attention.interaction.component_heads_by_layer=[]"),
            )
        if not self.compose and self.head_norm:
            return super().invalid()
        return each_once("compose", self.compose) or super().invalid()

    def refuses(self, base: BaseOptions) -> str | None:
        """Composing keys needs keys, and composing them after rotation needs rotated ones."""
        heads = base.heads()
        if heads.tied and "k" in self.compose:
            return f"{TIED}; take attention.interaction.compose=[v]"
        if heads.latent and self.mix_after_rope:
            keys = f"the keys {base.name} makes from its latent are not rotated"
            return f"{keys}; take attention.interaction.mix_after_rope=false"
        return super().refuses(base)

    def conflict(self, partners: Partners) -> ConfigError | None:
        """A number for each layer; a norm over all heads has gains for the heads of the base."""
        by_layer = self.component_heads_by_layer
        if by_layer and len(by_layer) != partners.layers:
            return ConfigError(
                f"has {len(by_layer)} numbers for {partners.layers} layers",
                field="attention.interaction.component_heads_by_layer",
                value=list(by_layer),
                allowed=f"{partners.layers} numbers, or none",
                fix=Settings("attention.interaction.component_heads_by_layer=[]"),
            )
        fewer = self.component_heads or by_layer
        if partners.qk_norm != "full_width" or not fewer or not self.mix_after_rope:
            return None
        return ConfigError(
            "keys are normalised before they are composed, and this norm is as wide as the heads that they compose",
            field="attention.qk_norm",
            value="full_width",
            allowed="per_head, none",
            fix=Settings("attention.qk_norm=per_head"),
        )

    def identities(self, heads: HeadShape) -> Mapping[str, float | None]:
        """The compositions. The norm of the outputs is not among them, because heads exchange no information in it."""
        counts = self.component_heads_by_layer or (self.component_heads,)
        others = any(count not in (0, heads.kv_heads) for count in counts)
        return dict.fromkeys(self.compose, None if others else 1.0)

    def components(self, projection: Projection, heads: HeadShape) -> int:
        """h' of what is composed."""
        return self.component_heads or heads.kv_heads if projection in self.compose else heads.count(projection)

    def composed_when_read(self, projection: Projection, heads: HeadShape) -> bool:
        """Whether the cache keeps the components. It does if they are fewer. Rotated keys may be cached, for rotation
        commutes with the composition (eq 13); normalised ones may not, so a base that normalises keys must be able to
        do so after its cache, as a tied one does.
        """
        fewer = 0 < self.component_heads < heads.kv_heads and projection in self.compose
        cached = not heads.latent and not heads.summed
        return fewer and cached and (projection == "v" or self.mix_after_rope or not heads.normed or heads.projected)

    def cache_numbers(self, heads: HeadShape) -> int:
        """The components instead of the heads."""
        fewer = self.component_heads - heads.kv_heads
        return sum(fewer * heads.width(p) for p in self.compose if self.composed_when_read(p, heads))

    def matrix_numbers(self, heads: HeadShape) -> int:
        """An h' x G matrix for each kind."""
        return sum(self.components(p, heads) * heads.kv_heads for p in self.compose)

    def parameters(self, heads: HeadShape) -> int:
        """The matrices, and the norm's gain."""
        return super().parameters(heads) + (heads.value_width if self.head_norm else 0)

    def flops(self, heads: HeadShape) -> int:
        """Every dimension of a head times the matrix."""
        return sum(2 * self.components(p, heads) * heads.kv_heads * heads.width(p) for p in self.compose)

    def saved_numbers(self, heads: HeadShape, way: Implementation) -> int:
        """The components, unless folded, and the norm's normalised input and output."""
        held = sum(self.components(p, heads) * heads.width(p) for p in self.compose)
        composed = 0 if way.folded or not self.train else held
        return composed + (heads.query_heads * (2 * heads.value_width + 1) if self.head_norm else 0)

    def normalised_numbers(self, heads: HeadShape) -> int:
        """See `InteractionOptions.normalised_numbers`."""
        return heads.query_heads * heads.value_width if self.head_norm else 0

    def strides_values(self) -> bool:
        """A product over heads puts the heads last in memory."""
        return "v" in self.compose

    def folded_numbers(self, heads: HeadShape, inputs: InputWidths) -> int:
        """The weights of the projections."""
        return sum(heads.kv_heads * heads.width(p) * getattr(inputs, p) for p in self.compose)

    def implementation(self, heads: HeadShape, inputs: InputWidths, tokens: int, kernels: str) -> Implementation:
        """See `InteractionOptions.implementation`: one for all layers, that of the layer with the fewest components."""
        fewest = min((count for count in self.component_heads_by_layer if count), default=self.component_heads)
        one = replace(self, component_heads=fewest, component_heads_by_layer=())
        return FoldableOptions.implementation(one, heads, inputs, tokens, kernels)

    def unfoldable(self, heads: HeadShape) -> str | None:
        """Norm and rotation lie between the projection and what is composed."""
        return "keys are composed after norm and rotation" if self.mix_after_rope else None

    def saved_flops(self, heads: HeadShape, inputs: InputWidths) -> int:
        """All of it; but folded, the base projects the heads and not their components."""
        further = sum(
            (heads.kv_heads - self.components(p, heads)) * heads.width(p) * int(getattr(inputs, p))
            for p in self.compose
        )
        return self.flops(heads) - 2 * further

    def fold_flops(self, heads: HeadShape, inputs: InputWidths) -> int:
        """Every row of the projection times the matrix."""
        return sum(
            2 * self.components(p, heads) * heads.kv_heads * heads.width(p) * getattr(inputs, p) for p in self.compose
        )

    def absorbed(self, heads: HeadShape) -> InteractionOptions | None:
        """The norm of the outputs stays."""
        return None if self.mix_after_rope else self.uncomposed()
