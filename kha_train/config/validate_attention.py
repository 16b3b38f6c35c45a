"""Finds attention settings that cannot work together, before anything is built. Each error says what to change."""

from __future__ import annotations

import math

from kha_train.config.resolve import invalid_backend, turned_dimensions
from kha_train.config.schema import ModelSection, RunConfig
from kha_train.errors import ConfigError, Settings, either
from kha_train.variants.attention import POSITIONS, Partners


def check_attention(config: RunConfig) -> None:
    """Base, interaction, norm, positions and backend must fit together. Raises ConfigError."""
    attention, base, interaction = config.attention, config.attention.base, config.attention.interaction
    partners = Partners(attention.qk_norm, attention.positions, config.model.seq_len, config.model.layers)
    problem = base.invalid() or interaction.invalid() or base.conflict(partners) or interaction.conflict(partners)
    problem = problem or invalid_backend(config) or _without_identity(config)
    if problem:
        raise problem
    reason = interaction.refuses(base)
    if reason:
        pair = f"{interaction.name} on {base.name}"
        raise ConfigError(reason, field="attention.interaction", value=pair, code="E05")
    _rotary(config)
    _rope_scaling(config)
    _context(config)


def _without_identity(config: RunConfig) -> ConfigError | None:
    """Why `optim.interaction_decay=identity` has no target to decay towards, or None."""
    base, interaction = config.attention.base, config.attention.interaction
    trained = not interaction.frozen_numbers(base.heads())
    values = {**base.identities(), **(interaction.identities(base.heads()) if trained else {})}
    if config.optim.interaction_decay != "identity" or (values and None not in values.values()):
        return None
    unknown = [name for name, value in values.items() if value is None]
    none = f"{'there are no matrices' if trained else 'no matrices are trained'} whose values could leave"
    return ConfigError(
        f"{f'no value of {unknown[0]} leaves' if unknown else none} heads unchanged in interaction "
        f"{interaction.name} on {base.name}",
        field="optim.interaction_decay",
        value="identity",
        allowed="zero, none",
        fix=Settings("optim.interaction_decay=zero"),
    )


def _rotary(config: RunConfig) -> None:
    """The rotated part must be an even number of dimensions, at least 2, of the part of a head that rotary embedding
    acts on.
    """
    factor, base = config.model.partial_rotary_factor, config.attention.base
    turns = POSITIONS[config.attention.positions].turns
    if not 0 < factor <= 1 and not turns:
        raise ConfigError(
            "must be a share",
            field="model.partial_rotary_factor",
            value=factor,
            allowed="above 0 up to 1",
            fix=Settings("model.partial_rotary_factor=1.0"),
        )
    width, turned = base.rotary_width(), turned_dimensions(config)
    exact = math.isclose(turned, width * factor, rel_tol=1e-9)
    if not turns or (exact and turned % 2 == 0 and 2 <= turned <= width):
        return
    name, value = base.rotary_setting(max(width + width % 2, 2))
    section = "model" if name == "head_dim" and config.model.head_dim == base.head_dim else "attention.base"
    wider = f"{section}.{name}={value}"
    if width >= 2 and factor != 1:
        nearest = min(max(2 * round(width * factor / 2), 2), width - width % 2)
        field, given, fix = "model.partial_rotary_factor", factor, f"model.partial_rotary_factor={nearest / width}"
    else:
        field, given = f"{section}.{name}", getattr(base, name)
        fix = wider if factor == 1 else f"{wider} model.partial_rotary_factor=1.0"
    raise ConfigError(
        f"rotary embedding rotates pairs of dimensions, and {base.name} would rotate {width * factor:g} of {width}",
        field=field,
        value=given,
        allowed=f"an even number of rotated dimensions, from 2 to {max(width, 2)}",
        fix=Settings(fix),
        code="E04",
    )


def _rope_scaling(config: RunConfig) -> None:
    """A scaling needs a rotation, and a factor needs a scaling."""
    model, positions = config.model, config.attention.positions
    if model.rope_scaling == "none":
        if model.rope_factor != 1:
            ways = ("model.rope_factor=1.0", "model.rope_scaling=linear")
            raise ConfigError(
                "divides no frequency with model.rope_scaling=none",
                field="model.rope_factor",
                value=model.rope_factor,
                fix=either(*map(Settings, ways)),
            )
    elif not POSITIONS[positions].turns:
        raise ConfigError(
            f"attention.positions={positions} rotates nothing",
            field="model.rope_scaling",
            value=model.rope_scaling,
            allowed="none",
            fix=Settings("model.rope_scaling=none model.rope_factor=1.0"),
        )
    elif model.rope_scaling == "yarn":
        _yarn(model)


def _yarn(model: ModelSection) -> None:
    if model.rope_original_seq_len < 1:
        raise ConfigError(
            "yarn compares wavelengths with the rows that the model was trained on",
            field="model.rope_original_seq_len",
            value=model.rope_original_seq_len,
            allowed="1 or more",
            fix=Settings(f"model.rope_original_seq_len={max(1, round(model.seq_len / model.rope_factor))}"),
        )
    if model.rope_beta_fast <= model.rope_beta_slow:
        raise ConfigError(
            "dimensions that turn fast must turn more often than those that turn slowly",
            field="model.rope_beta_fast",
            value=model.rope_beta_fast,
            allowed=f"above model.rope_beta_slow={model.rope_beta_slow}",
            fix=Settings("model.rope_beta_fast=32.0 model.rope_beta_slow=1.0"),
        )
    if model.rope_theta <= 1:
        raise ConfigError(
            "yarn needs wavelengths that grow with the dimension",
            field="model.rope_theta",
            value=model.rope_theta,
            allowed="above 1",
            fix=Settings("model.rope_theta=10000.0"),
        )


def _context(config: RunConfig) -> None:
    """Ranks that share rows need equal parts of them, and of heads that are computed alone."""
    parts, base, model = config.engine.context_parallel, config.attention.base, config.model
    field, whole = "engine.context_parallel", Settings("engine.context_parallel=1")
    if parts == 1:
        return
    if base.asks != "softmax":
        why = "mixes the scores of all heads" if base.asks == "scores" else "keeps sums over earlier tokens"
        problem = f"{base.name} {why}, and ranks that share rows compute each head alone over whole rows"
        raise ConfigError(problem, field=field, value=parts, allowed="1", fix=whole)
    heads = base.separable_heads()
    for number, what in ((heads, f"heads, or pairs, of {base.name}"), (model.seq_len, "tokens of a row")):
        if number % parts:
            raise ConfigError(
                f"does not divide the {number} {what}",
                field=field,
                value=parts,
                allowed=f"common divisors of {heads} and model.seq_len={model.seq_len}",
                fix=Settings(f"{field}={math.gcd(heads, model.seq_len, parts)}"),
            )
    if config.engine.compile == "block":
        problem = "compiled blocks do not exchange heads between ranks"
        raise ConfigError(problem, field=field, value=parts, fix=either(whole, Settings("engine.compile=none")))
