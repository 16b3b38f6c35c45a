"""The interactions that can be inserted, by name, each with its options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from .changes import Change, Composition, Gate, Home, Linear, Matrices, Norm, OutputGate, Perceptron
from .errors import HeadsError
from .layouts import Layout


@dataclass(frozen=True, kw_only=True)
class Interaction(ABC):
    """What is inserted into every attention of a model. `output_gate` multiplies head outputs, after everything else,
    by gates that read the attention's input: one for each head (`headwise`) or for each dimension (`elementwise`).
    """

    name: ClassVar[str]
    output_gate: str = "none"

    @abstractmethod
    def invalid(self) -> str | None:
        """What is wrong with an option, or None. Options may come from a file and be of any type."""

    def refuses(self, layout: Layout) -> str | None:
        """Why it cannot be inserted there, or None."""
        return None

    def gate(self, layout: Layout, inputs: int, home: Home) -> OutputGate | None:
        """A new output gate for an attention with so many `inputs`; None without one."""
        if self.output_gate == "none":
            return None
        return OutputGate(layout.output, inputs, home, self.output_gate == "elementwise")

    @abstractmethod
    def changes(self, layout: Layout, home: Home) -> dict[str, Change]:
        """New modules for q, k, v and the `output` of heads, as far as it changes them."""

    def options(self) -> dict[str, Any]:
        """Its options as JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class Knocking(Interaction):
    """Knocking-heads: matrices on any of the projections q, k, v, before norm and rotation. `share`: one matrix for all
    `heads` of a kind, as in the paper; with `none` every head has its own.
    """

    change: ClassVar[type[Matrices]]
    projections: tuple[str, ...] = ("v",)
    share: str = "heads"

    def invalid(self) -> str | None:
        """See `Interaction.invalid`."""
        if self.share not in ("heads", "none"):
            return f"share={self.share!r}: heads or none"
        return _not_a_choice("projections", self.projections, ("q", "k", "v"))

    def changes(self, layout: Layout, home: Home) -> dict[str, Change]:
        """See `Interaction.changes`."""
        return {kind: self.change(getattr(layout, kind), home, self.share == "none") for kind in self.projections}


@dataclass(frozen=True, kw_only=True)
class KnockingLinear(Knocking):
    """KHA-Linear, on all three."""

    name: ClassVar[str] = "kha_linear"
    change: ClassVar[type[Matrices]] = Linear
    projections: tuple[str, ...] = ("q", "k", "v")


@dataclass(frozen=True, kw_only=True)
class _NonLinear(Knocking):
    def refuses(self, layout: Layout) -> str | None:
        """See `Interaction.refuses`."""
        if not layout.latent:
            return None
        return (
            "latent attention may attend to its latent and never make keys and values, and a map between them and the "
            "output that is not linear cannot be absorbed (KHA 4.2.3); insert kha_linear"
        )


@dataclass(frozen=True, kw_only=True)
class KnockingMlp(_NonLinear):
    """KHA-MLP: the paper's default, on the values."""

    name: ClassVar[str] = "kha_mlp"
    change: ClassVar[type[Matrices]] = Perceptron


@dataclass(frozen=True, kw_only=True)
class KnockingGate(_NonLinear):
    """The gate of KHA-MLP alone, the paper's harmful ablation."""

    name: ClassVar[str] = "kha_gate"
    change: ClassVar[type[Matrices]] = Gate


@dataclass(frozen=True, kw_only=True)
class Explicit(Interaction):
    """Explicit multi-head attention (MEA): heads of keys and values are composed, before norm and rotation, and
    `head_norm` normalises the output of each. With the norm a model does not start as it was.
    """

    name: ClassVar[str] = "mea"
    compose: tuple[str, ...] = ("k", "v")
    head_norm: bool = True

    def invalid(self) -> str | None:
        """See `Interaction.invalid`."""
        if not isinstance(self.head_norm, bool):
            return f"head_norm={self.head_norm!r}: true or false"
        if self.compose == () and self.head_norm:
            return None
        return _not_a_choice("compose", self.compose, ("k", "v"))

    def changes(self, layout: Layout, home: Home) -> dict[str, Change]:
        """See `Interaction.changes`."""
        changes: dict[str, Change] = {kind: Composition(getattr(layout, kind), home) for kind in self.compose}
        return changes | ({"output": Norm(layout.output, home)} if self.head_norm else {})


@dataclass(frozen=True, kw_only=True)
class Gated(Interaction):
    """The output gate alone (Qiu et al. 2025). A model does not start as it was: gates start at one half."""

    name: ClassVar[str] = "gated"
    output_gate: str = "elementwise"

    def invalid(self) -> str | None:
        """See `Interaction.invalid`."""
        return "output_gate='none': headwise or elementwise" if self.output_gate == "none" else None

    def changes(self, layout: Layout, home: Home) -> dict[str, Change]:
        """See `Interaction.changes`."""
        return {}


INTERACTIONS: dict[str, type[Interaction]] = {
    kind.name: kind for kind in (KnockingLinear, KnockingMlp, KnockingGate, Explicit, Gated)
}


def interaction_of(name: object, options: dict[str, Any]) -> Interaction:
    """The interaction called `name` with these options, lists in place of tuples allowed. Raises HeadsError when there
    is none, or an option is wrong.
    """
    kind = INTERACTIONS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise HeadsError(f"interaction {str(name)[:80]!r}: one of {', '.join(INTERACTIONS)}")
    known = [field.name for field in fields(kind)]
    if strange := [str(option)[:80] for option in options if option not in known]:
        raise HeadsError(f"{kind.name} has no option {strange[0]!r}: {', '.join(known)}")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    made = kind(**values)
    if problem := _unknown_gate(made.output_gate) or made.invalid():
        raise HeadsError(f"{kind.name}: {problem[:300]}")
    return made


def _unknown_gate(chosen: object) -> str | None:
    return (
        None
        if chosen in ("none", "headwise", "elementwise")
        else f"output_gate={chosen!r}: none, headwise, elementwise"
    )


def _not_a_choice(option: str, chosen: object, allowed: tuple[str, ...]) -> str | None:
    if isinstance(chosen, tuple) and chosen and all(chosen.count(one) == 1 and one in allowed for one in chosen):
        return None
    return f"{option}={chosen!r}: a choice of {', '.join(allowed)}, each once"
