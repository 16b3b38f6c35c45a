"""`model.rope_scaling` and the entry `rope_parameters` of transformers, which older releases call `rope_scaling`."""

from __future__ import annotations

import math
from typing import Annotated

from kha_train.config.schema import RunConfig
from kha_train.export.fields import Positive, Reading, Settings, Size
from kha_train.foreign.documents import Json
from kha_train.foreign.typed import Range

NotNegative = Annotated[float, Range(0, 1e30)]
EVERYWHERE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
ENTRIES: dict[str, set[str]] = {
    "default": EVERYWHERE,
    "linear": EVERYWHERE | {"factor"},
    "yarn": EVERYWHERE
    | {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"}
    | {"mscale", "mscale_all_dim", "truncate"},
}
"""The scalings that our decoder computes, each with the entries that it may have."""


def scaling_kind(inner: Reading) -> str:
    """The name of the scaling among the entries `inner`."""
    return str(inner.take("rope_type", str, inner.take("type", str, "default")))


def scaling_as_written(config: RunConfig) -> dict[str, Json]:
    """What config.json says of the frequencies of `config`."""
    model = config.model
    theta: dict[str, Json] = {"rope_theta": model.rope_theta}
    if model.rope_scaling == "none":
        return {"rope_type": "default", **theta}
    scaled: dict[str, Json] = {"rope_type": model.rope_scaling, **theta, "factor": model.rope_factor}
    if model.rope_scaling == "linear":
        return scaled
    factor = model.rope_attention_factor
    return {
        **scaled,
        "original_max_position_embeddings": model.rope_original_seq_len,
        "beta_fast": model.rope_beta_fast,
        "beta_slow": model.rope_beta_slow,
        **({} if factor is None else {"attention_factor": factor}),
    }


def scaling_as_read(inner: Reading, reading: Reading) -> Settings:
    """The settings of ours that the entries `inner` mean, beside the others of the file in `reading`. Raises its error
    for a scaling that our decoder does not compute.
    """
    kind, source = scaling_kind(inner), reading.source
    if kind not in ENTRIES:
        place = "rope_scaling" if reading.values.get("rope_parameters") is None else "rope_parameters"
        raise source.fault(f"{place}.rope_type", "our decoder does not compute this", kind, ", ".join(ENTRIES))
    if kind == "default":
        return {}
    found: Settings = {
        "model.rope_scaling": kind,
        "model.rope_factor": float(inner.take("factor", Positive)),
    }
    if kind == "linear":
        return found
    if inner.take("truncate", bool, True) is not True:
        raise source.fault("rope_parameters.truncate", "our decoder rounds the borders of yarn", False, "true")
    length = reading.take("max_position_embeddings", Size, 2048)
    factor = _attention_factor(inner, float(found["model.rope_factor"]))
    return {
        **found,
        "model.rope_original_seq_len": inner.take("original_max_position_embeddings", Size, length),
        "model.rope_beta_fast": float(inner.take("beta_fast", Positive, 32.0)),
        "model.rope_beta_slow": float(inner.take("beta_slow", Positive, 1.0)),
        **({} if factor is None else {"model.rope_attention_factor": factor}),
    }


def _attention_factor(inner: Reading, factor: float) -> float | None:
    """`attention_factor`, or what follows from both of `mscale` and `mscale_all_dim`; None for yarn's own."""
    given = inner.take("attention_factor", Positive, None)
    one, all_dimensions = (inner.take(key, NotNegative, None) for key in ("mscale", "mscale_all_dim"))
    if given is None and one and all_dimensions:
        grown = 0.1 * math.log(max(factor, 1.0))
        return float((one * grown + 1.0) / (all_dimensions * grown + 1.0))
    return None if given is None else float(given)
