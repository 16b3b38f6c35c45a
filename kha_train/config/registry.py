"""Names of the attention variants -> where their module lives and which options they take. No torch is imported here.

A new variant is one file with its module and its options, one YAML under `configs/`, and one line here. The options of
the variants that come with the package stand beside this file, so that a configuration is judged without importing
torch; a variant may as well name them by path, in the file of its module.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from kha_train.config.base_options import GroupedQueryOptions, GroupedTiedOptions, LatentOptions, TalkingHeadsOptions
from kha_train.config.interaction_options import (
    ExplicitOptions,
    KnockingGateOptions,
    KnockingLinearOptions,
    KnockingMlpOptions,
)
from kha_train.config.options import BaseOptions, InteractionOptions


@dataclass(frozen=True)
class Variant:
    """A registered name: `path` is `module:Class`, imported only when the model is built; `options` is its dataclass,
    or the `module:Class` of it, imported when a configuration names the variant."""

    path: str
    options: type[BaseOptions | InteractionOptions] | str

    def load(self) -> Any:
        """The class that builds this variant."""
        return _import(self.path)

    def options_class(self) -> type[BaseOptions | InteractionOptions]:
        """The dataclass of its options."""
        return _import(self.options) if isinstance(self.options, str) else self.options


BASES: dict[str, Variant] = {
    "gqa": Variant("kha_train.model.attention.grouped_query:GroupedQueryAttention", GroupedQueryOptions),
    "gta": Variant("kha_train.model.attention.grouped_tied:GroupedTiedAttention", GroupedTiedOptions),
    "mla": Variant("kha_train.model.attention.latent:LatentAttention", LatentOptions),
    "talking_heads": Variant("kha_train.model.attention.talking_heads:TalkingHeadsAttention", TalkingHeadsOptions),
}

INTERACTIONS: dict[str, Variant] = {
    "none": Variant("kha_train.model.attention.interaction:NoInteraction", InteractionOptions),
    "knocking_linear": Variant("kha_train.model.attention.knocking:KnockingLinear", KnockingLinearOptions),
    "knocking_mlp": Variant("kha_train.model.attention.knocking:KnockingMlp", KnockingMlpOptions),
    "knocking_gate": Variant("kha_train.model.attention.knocking:KnockingGate", KnockingGateOptions),
    "explicit": Variant("kha_train.model.attention.explicit:Explicit", ExplicitOptions),
}


def _import(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
