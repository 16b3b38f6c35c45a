"""Names of the attention variants -> where their module lives and which options they take. No torch is imported here.

A new variant is one file with its module and its options, one YAML under `configs/`, and one line here. The options of
the variants that come with the package stand beside this file, so that a configuration is judged without importing
torch; a variant may as well name them by path, in the file of its module.
"""

from __future__ import annotations

from kha_train.config.base_options import GroupedQueryOptions, GroupedTiedOptions, LatentOptions, TalkingHeadsOptions
from kha_train.config.interaction_options import (
    ExplicitOptions,
    KnockingGateOptions,
    KnockingLinearOptions,
    KnockingMlpOptions,
)
from kha_train.config.options import BaseOptions, InteractionOptions
from kha_train.variants.registry import Variant

BASES: dict[str, Variant[BaseOptions]] = {
    "gqa": Variant("kha_train.model.attention.grouped_query:GroupedQueryAttention", GroupedQueryOptions),
    "gta": Variant("kha_train.model.attention.grouped_tied:GroupedTiedAttention", GroupedTiedOptions),
    "mla": Variant("kha_train.model.attention.latent:LatentAttention", LatentOptions),
    "talking_heads": Variant("kha_train.model.attention.talking_heads:TalkingHeadsAttention", TalkingHeadsOptions),
}

INTERACTIONS: dict[str, Variant[InteractionOptions]] = {
    "none": Variant("kha_train.model.attention.interaction:NoInteraction", InteractionOptions),
    "knocking_linear": Variant("kha_train.model.attention.knocking:KnockingLinear", KnockingLinearOptions),
    "knocking_mlp": Variant("kha_train.model.attention.knocking:KnockingMlp", KnockingMlpOptions),
    "knocking_gate": Variant("kha_train.model.attention.knocking:KnockingGate", KnockingGateOptions),
    "explicit": Variant("kha_train.model.attention.explicit:Explicit", ExplicitOptions),
}
