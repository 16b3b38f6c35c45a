"""`config.json` of a foreign model -> our settings, with every entry accounted for.

An entry gives a setting, or must have the value with which our decoder computes the same (both stand in the model's
`Family`), or has no effect on what a model computes. Anything else is refused by name and value, because an option that
is ignored changes the model in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple

from kha_train.config.build import flatten, to_plain
from kha_train.config.compose import compose, quoted
from kha_train.config.constants import ALIGNED_NUMBERS
from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError
from kha_train.export.directory import CONFIG_NAME, ModelDirectory
from kha_train.export.families import FAMILIES
from kha_train.export.family import Family
from kha_train.export.fields import Fixed, Reading, Settings, read_fixed
from kha_train.export.hosts.scaling import ENTRIES, scaling_kind
from kha_train.foreign.documents import Json
from kha_train.foreign.typed import Range, Source, short

NotNegative = Annotated[float, Range(0, 1e6)]

WITHOUT_EFFECT = frozenset({
    "model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "id2label", "label2id",
    "problem_type", "chunk_size_feed_forward", "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp",
    "initializer_range", "router_aux_loss_coef", "aux_loss_alpha", "seq_aux", "ep_size", "max_window_layers",
    "sliding_window", "is_llama_config", "transformers.js_config", "_attn_implementation_autoset", "num_mtp_layers",
})  # fmt: skip
"""Entries that no class lets change what a model computes. A window has an effect with `use_sliding_window` alone."""
COMPUTED = {"deepseek_v3": {"head_dim", "qk_head_dim"}}
"""Entries of a class that it computes from others, whatever they say."""
EVERYWHERE = (
    Fixed("attention_dropout", 0.0, 0.0),
    Fixed("is_encoder_decoder", False, False),
    Fixed("add_cross_attention", False, False),
    Fixed("rope_interleaved", False, False),
    Fixed("mlp_bias", False, False),
    Fixed("use_sliding_window", False, False),
)
"""Options that our decoder lacks, in whichever class they appear."""
ROPE = {"rope_theta", "partial_rotary_factor", "rope_scaling"}
"""Entries in which older releases keep what `rope_parameters` holds."""
INTERACTION = "interaction@attention.interaction"
"""The preset of an interaction, among settings."""
FREE = (
    "attention.interaction.impl",
    "model.name",
    "model.seq_len",
    "model.init_std",
    "model.scale_residual_init",
    "model.loss_chunk_tokens",
)
GIVEN = (
    "model.", "attention.base.", "attention.qk_norm", "attention.positions", "moe.experts", "moe.top_k",
    "moe.expert_width", "moe.shared_experts", "moe.dense_layers", "moe.dense_width", "moe.score", "moe.renormalize",
    "moe.routed_scaling", "moe.expert_groups", "moe.top_groups",
)  # fmt: skip
"""Settings, or sections (with a dot at the end), that say what a model computes. `FREE` ones do not."""


class Described(NamedTuple):
    """A model as `config.json` describes it: its class, and our settings of it by dotted key."""

    family: Family
    settings: Settings

    def overrides(self, further: Sequence[str] = ()) -> tuple[str, ...]:
        """The settings as they are typed, with `further` ones, which replace those of the same key."""
        typed = {text.partition("=")[0] for text in further}
        own = [f"{key}={_typed(value)}" for key, value in self.settings.items() if key not in typed]
        return (*own, *further)


def describe(model: ModelDirectory, heads: Settings) -> Described:
    """Read `config.json`; `heads` are the settings of an interaction that is saved beside the model.

    Raises ConfigError for a class that is not known, and for an entry that is unknown, malformed or not what our
    decoder computes.
    """
    source = Source(str(model.path / CONFIG_NAME), ConfigError, "import a model without it")
    family = FAMILIES.get(str(model.config.get("model_type")))
    if family is None:
        known = ", ".join(FAMILIES)
        raise source.fault("model_type", "a class that is not imported", model.config.get("model_type"), known)
    _refuse_unknown(family, model.config, source)
    settings = family.settings(model.config, source)
    _check_rope(model.config, source, partial="model.partial_rotary_factor" in settings)
    layers, experts, most = settings["model.layers"], settings["moe.experts"], len(model.tensors)
    if layers + (layers - settings["moe.dense_layers"]) * experts > most:
        # Every layer has a tensor, and every expert of one. Found before anything of that size is laid out.
        raise source.fault("", f"describes {layers} layers of {experts} experts, and the weights are {most} tensors")
    training = _training(settings, model.config, source)
    return Described(family, {"model.name": family.model_type, **settings, **heads, **training})


def configure(described: Described, overrides: Sequence[str]) -> RunConfig:
    """The configuration of the model, with `overrides` for what it leaves free: an interaction, the length of rows, all
    that concerns training. Raises ConfigError for one that would make another model of it, and as `compose`.
    """
    plain, config = compose(described.overrides()), compose(described.overrides(overrides))
    given = (*GIVEN, *(("attention.interaction.",) if INTERACTION in described.settings else ()))
    before, now = (flatten(to_plain(one)) for one in (plain, config))
    for key in before.keys() | now.keys():
        computed = any(key == name or (name[-1] == "." and key.startswith(name)) for name in given)
        if computed and key not in FREE and before.get(key) != now.get(key):
            raise ConfigError(
                "is given by the model that is imported",
                field=key,
                value=now.get(key),
                allowed=str(before.get(key)),
                fix="leave it out",
            )
    return config


def _refuse_unknown(family: Family, values: Mapping[str, Json], source: Source) -> None:
    """Raises ConfigError for an entry that is not known, or that our decoder lacks in every class."""
    own = {fixed.key for fixed in family.fixed}
    known = own | {name for field in family.fields for name in (field.key, *field.also)}
    for fixed in EVERYWHERE:
        if fixed.key not in known:
            read_fixed(fixed, Reading(values, source))
    known |= {"layer_types", *(fixed.key for fixed in EVERYWHERE)} | ROPE | WITHOUT_EFFECT
    known |= COMPUTED.get(family.model_type, set())
    kinds = set(Reading(values, source).take("layer_types", list[str], []))
    if other := sorted(kinds - {"full_attention"}):
        raise source.fault("layer_types", "our decoder does not compute this", other[0], "full_attention")
    if unknown := sorted(values.keys() - known):
        raise _unknown(source, unknown[0], values[unknown[0]])


def _unknown(source: Source, key: str, value: Json) -> ConfigError:
    return ConfigError(
        "an unknown option, which may change what the model computes",
        field=f"{source.name} {short(key)}",
        value="null" if value is None else short(value),
        fix="if it has no effect, remove it from a copy",
    )


def _check_rope(values: Mapping[str, Json], source: Source, partial: bool) -> None:
    """Raises ConfigError for an unknown option of positions, and, but for a class that rotates a part of each head, for
    such a part."""
    given = [values[key] for key in ("rope_parameters", "rope_scaling") if values.get(key) is not None]
    if len(given) == 2 and given[0] != given[1]:
        raise source.fault("rope_scaling", "says otherwise than rope_parameters", given[1])
    inside = given[0] if given and isinstance(given[0], dict) else {}
    known = ENTRIES.get(scaling_kind(Reading(inside, source)), inside.keys())
    for key in sorted(inside.keys() - known):
        raise _unknown(source, f"rope_parameters.{key}", inside[key])
    if not partial:
        for place in (values, inside):
            read_fixed(Fixed("partial_rotary_factor", 1.0, 1.0), Reading(place, source))


def _training(settings: Settings, values: Mapping[str, Json], source: Source) -> Settings:
    """How a training goes on: experts of a class without selection biases are balanced by its auxiliary loss, which is
    a mean over layers there and a sum here. Widths that grouped experts cannot read are computed by the plain ones.
    """
    found: Settings = {}
    layers = settings["model.layers"] - settings["moe.dense_layers"]
    if layers and settings["moe.score"] == "softmax":
        weight = Reading(values, source).take("router_aux_loss_coef", NotNegative, 0.001)
        found = {
            "moe.bias_update_rate": 0.0,
            "moe.auxiliary_loss.weight": weight / layers,
            "moe.auxiliary_loss.scope": "micro_batch",
        }
    if settings["model.hidden_size"] % ALIGNED_NUMBERS or settings.get("moe.expert_width", 0) % ALIGNED_NUMBERS:
        found["moe.backend"] = "loop"
    return found


def _typed(value: Json) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_typed, value))}]"
    return quoted(value) if isinstance(value, str) else str(value).lower()
