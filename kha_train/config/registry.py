"""Names of the attention variants -> where their module lives and which options they take. No torch is imported here.

A new variant is one file with its module (and, if it has any, its options), one YAML under `configs/`, and one line
here.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from kha_train.config.options import BaseOptions, GroupedQueryOptions, InteractionOptions, KnockingOptions


@dataclass(frozen=True)
class Variant:
    """A registered name: `path` is `module:Class`, imported only when the model is built; `options` its dataclass."""

    path: str
    options: type[BaseOptions | InteractionOptions]

    def load(self) -> Any:
        """The class that builds this variant."""
        module, _, name = self.path.partition(":")
        return getattr(import_module(module), name)


BASES: dict[str, Variant] = {
    "gqa": Variant("kha_train.model.attention.grouped_query:GroupedQueryAttention", GroupedQueryOptions),
}

INTERACTIONS: dict[str, Variant] = {
    "none": Variant("kha_train.model.attention.interaction:NoInteraction", InteractionOptions),
    "knocking_linear": Variant("kha_train.model.attention.knocking:KnockingLinear", KnockingOptions),
    "knocking_mlp": Variant("kha_train.model.attention.knocking:KnockingMlp", KnockingOptions),
}
