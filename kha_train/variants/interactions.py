"""Options of the package's own head interactions. Their counts are the formulas of docs/attention.md."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from kha_train.errors import ConfigError, Settings
from kha_train.variants.attention import (
    BaseOptions,
    FoldableOptions,
    HeadShape,
    Implementation,
    InputWidths,
    InteractionOptions,
    Projection,
)

KERNEL_WIDTHS = (16, 32, 64, 128)
"""Head widths that the Triton kernels support."""
TIED = "a tied base has no keys of its own (values and half of the keys are one state, reached as v)"


@dataclass(frozen=True, kw_only=True)
class MatrixInit:
    """The initial values of an interaction's square matrices.

    `identity`: at the values that leave heads unchanged. `scaled_identity`: at `scale` times these, so that the
    diagonal of every matrix but a gate is `scale`. `random`: normal with deviation `scale` / sqrt(width), so that the
    product with a vector has about the vector's size times `scale`. `random_orthogonal`: a random orthogonal matrix
    times `scale`, with which it has exactly that size.

    `scale` is not used by `identity`. Papers start from the identity; the others are for studies.
    """

    kind: Literal["identity", "scaled_identity", "random", "random_orthogonal"] = "identity"
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class MatrixOptions(InteractionOptions, ABC):
    """An interaction whose heads exchange information through matrices.

    Without `train` the matrices stay at their initial values for good, and have neither gradient nor optimiser state:
    with a random orthogonal matrix, what sharing alone does.
    """

    init: MatrixInit = field(default_factory=MatrixInit)
    train: bool = True

    @abstractmethod
    def matrix_numbers(self, heads: HeadShape) -> int:
        """Number of elements of all its matrices."""

    def parameters(self, heads: HeadShape) -> int:
        """The matrices, if they are trained."""
        return self.matrix_numbers(heads) if self.train else 0

    def frozen_numbers(self, heads: HeadShape) -> int:
        """The matrices, if they are not trained."""
        return 0 if self.train else self.matrix_numbers(heads)


@dataclass(frozen=True, kw_only=True)
class KnockingOptions(MatrixOptions, ABC):
    """Knocking-heads: matrices on any of the projections q, k, v (KHA eq 5-9).

    `share`: `heads` is the paper's, one matrix for all heads of a kind; with `none` every head has its own, so heads
    exchange nothing, which shows what sharing does. `value_only`: on a tied base, the map of v changes values and not
    the keys that are made of the same states.
    """

    matrices: ClassVar[dict[str, float]]
    """The matrices of one projection, by name, each with the diagonal value at which heads pass unchanged (0 for a
    gate).
    """
    saved: ClassVar[int]
    """Copies of a projection that the backward needs."""
    saved_frozen: ClassVar[int]
    """The same where the matrices need no gradient."""
    projections: tuple[Projection, ...]
    share: Literal["heads", "none"] = "heads"
    value_only: bool = False

    def invalid(self) -> ConfigError | None:
        """At least one projection, each once."""
        if self.value_only and "v" not in self.projections:
            return ConfigError(
                "values are not mapped",
                field="attention.interaction.value_only",
                value=True,
                fix=Settings("attention.interaction.value_only=false"),
            )
        return each_once("projections", self.projections) or super().invalid()

    def refuses(self, base: BaseOptions) -> str | None:
        """A tied base has no keys to act on, and only on one a map of v reaches keys."""
        if self.value_only and not base.heads().tied:
            return (
                f"{base.name} has values of its own, so a map of v changes nothing else; take "
                "attention.interaction.value_only=false"
            )
        if base.heads().tied and "k" in self.projections:
            return f"{TIED}; take attention.interaction.projections=[v] or [q,v]"
        return super().refuses(base)

    def identities(self, heads: HeadShape) -> Mapping[str, float]:
        """`matrices`, for each projection."""
        return {f"{p} {name}": diagonal for p in self.projections for name, diagonal in self.matrices.items()}

    def shape(self, heads: HeadShape, projection: Projection) -> tuple[int, ...]:
        """The shape of each matrix of the projection: [K, K] or, where heads do not share it, [H, K, K]."""
        square = (heads.width(projection),) * 2
        return square if self.share == "heads" else (heads.count(projection), *square)

    def matrix_numbers(self, heads: HeadShape) -> int:
        """Square matrices, one of each name for all heads of a kind, or for every head."""
        return sum(len(self.matrices) * math.prod(self.shape(heads, p)) for p in self.projections)

    def flops(self, heads: HeadShape) -> int:
        """Every head times every matrix."""
        return sum(2 * len(self.matrices) * heads.count(p) * heads.width(p) ** 2 for p in self.projections)

    def saved_numbers(self, heads: HeadShape, way: Implementation) -> int:
        """The inputs and intermediate results of the maps."""
        copies = self.saved if self.train else self.saved_frozen
        return sum(copies * heads.count(p) * heads.width(p) for p in self.projections)


@dataclass(frozen=True, kw_only=True)
class KnockingLinearOptions(KnockingOptions, FoldableOptions):
    """KHA-Linear: one matrix for each projection."""

    matrices: ClassVar[dict[str, float]] = {"map": 1.0}
    saved: ClassVar[int] = 1
    saved_frozen: ClassVar[int] = 0

    def saved_numbers(self, heads: HeadShape, way: Implementation) -> int:
        """Nothing per token when folded."""
        return 0 if way.folded else super().saved_numbers(heads, way)

    def folded_numbers(self, heads: HeadShape, inputs: InputWidths) -> int:
        """The weights of the projections, or of the output projection for values alone."""
        return sum(heads.width(p) * self._rows(heads, inputs, p) for p in self.projections)

    def saved_flops(self, heads: HeadShape, inputs: InputWidths) -> int:
        """All of it."""
        return self.flops(heads)

    def fold_flops(self, heads: HeadShape, inputs: InputWidths) -> int:
        """Every head's part of these weights times the matrix."""
        return sum(2 * heads.width(p) ** 2 * self._rows(heads, inputs, p) for p in self.projections)

    def _rows(self, heads: HeadShape, inputs: InputWidths, projection: Projection) -> int:
        """How many vectors of a head's width are in the weight that the map of `projection` is multiplied into."""
        if projection == "v" and self.value_only:
            return heads.query_heads * inputs.output
        count: int = heads.count(projection) * getattr(inputs, projection)
        return count

    def unfoldable(self, heads: HeadShape) -> str | None:
        """What stands before the output projection may not be linear."""
        if self.value_only and heads.altered:
            return "the map of values alone does not reach the output projection"
        return None

    def absorbed(self, heads: HeadShape) -> InteractionOptions | None:
        """Nothing is left (KHA eq 8), if all of it can be multiplied in."""
        return None if self.unfoldable(heads) else InteractionOptions(name="none")


@dataclass(frozen=True, kw_only=True)
class _NonLinearOptions(KnockingOptions):
    """Knocking variants that act on activations between a projection and the scores, or between values and output."""

    def refuses(self, base: BaseOptions) -> str | None:
        """Latent attention never computes keys and values at inference."""
        if base.heads().latent:
            return (
                f"{base.name} attends to its latent when decoding and never makes keys and values; a non-linear map "
                "between them and the output could not be absorbed (KHA 4.2.3); take interaction knocking_linear"
            )
        return super().refuses(base)

    def absorbed(self, heads: HeadShape) -> InteractionOptions | None:
        """Not possible: the gate acts on activations."""
        return None


@dataclass(frozen=True, kw_only=True)
class KnockingMlpOptions(_NonLinearOptions, FoldableOptions):
    """KHA-MLP: up, gate and down for each projection. Folded, the down of v is part of the output projection."""

    matrices: ClassVar[dict[str, float]] = {"up": 1.0, "gate": 0.0, "down": 1.0}
    saved: ClassVar[int] = 4
    saved_frozen: ClassVar[int] = 2

    def saved_numbers(self, heads: HeadShape, way: Implementation) -> int:
        """Input, up, gate and the input of down; folded, the last is the value itself. The kernel keeps only its
        input.
        """
        if way.name == "triton":
            return sum(heads.count(p) * heads.width(p) for p in self.projections)
        spared = heads.count("v") * heads.value_width if way.folded and self.train else 0
        return super().saved_numbers(heads, way) - spared

    def folded_numbers(self, heads: HeadShape, inputs: InputWidths) -> int:
        """The weight of the output projection."""
        return heads.query_heads * heads.value_width * inputs.output

    def unfoldable(self, heads: HeadShape) -> str | None:
        """Attention must be linear in what is folded."""
        if "v" not in self.projections:
            return "only the map of v reaches the output projection"
        if heads.tied and not self.value_only:
            return "the tied state is key as well as value, and scores are not linear in it"
        if heads.altered:
            return "a norm or a gate of every dimension stands between the values and the output projection"
        return None

    def without_kernel(self, heads: HeadShape) -> str | None:
        """The kernel holds the matrices of all heads on the chip, in tensor-core tiles."""
        if self.share == "none":
            return "the kernel holds one set of matrices, and every head has its own"
        odd = sorted({heads.width(p) for p in self.projections} - set(KERNEL_WIDTHS))
        if not odd:
            return None
        takes = ", ".join(map(str, KERNEL_WIDTHS))
        return f"the kernel supports heads of {takes} dimensions, and these have {', '.join(map(str, odd))}"

    def saved_flops(self, heads: HeadShape, inputs: InputWidths) -> int:
        """The down product of v."""
        return 2 * heads.count("v") * heads.value_width**2

    def fold_flops(self, heads: HeadShape, inputs: InputWidths) -> int:
        """The output projection's rows of every query head times the matrix."""
        return 2 * heads.query_heads * heads.value_width**2 * inputs.output

    def warnings(self) -> list[str]:
        """The paper finds no gain on q and k."""
        costly = [p for p in self.projections if p != "v"]
        if not costly:
            return []
        return [f"knocking_mlp on {' and '.join(costly)} costs more and gains nothing over v alone (KHA table 2) [E06]"]


@dataclass(frozen=True, kw_only=True)
class KnockingGateOptions(_NonLinearOptions):
    """The paper's ablation without up and down, which harms (KHA table 2: +0.063): kept to study why."""

    matrices: ClassVar[dict[str, float]] = {"gate": 0.0}
    saved: ClassVar[int] = 3
    saved_frozen: ClassVar[int] = 2

    def invalid(self) -> ConfigError | None:
        """Its matrix is a gate, which is the identity when zero."""
        if self.init.kind == "scaled_identity":
            return ConfigError(
                "a gate starts as the identity map when its matrix is zero; there is nothing to scale",
                field="attention.interaction.init.kind",
                value="scaled_identity",
                allowed="identity, random, random_orthogonal",
            )
        return super().invalid()


def each_once(field_name: str, chosen: tuple[Projection, ...]) -> ConfigError | None:
    """The error in a setting of an interaction that lists projections, or None."""
    if chosen and len(set(chosen)) == len(chosen):
        return None
    return ConfigError(
        "give each projection once",
        field=f"attention.interaction.{field_name}",
        value=list(chosen),
        allowed="a non-empty choice of q, k, v",
        fix=Settings(f"attention.interaction.{field_name}=[v]"),
    )
