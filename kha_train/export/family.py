"""A model class of transformers, and what of ours it computes: one description for exporting and for importing.

An export asks `refuses`, writes `config` and, for every entry of `links`, makes the host's tensors of ours
(`layout.to_host`). An import reads `settings` from a foreign config.json, composes a configuration of them, and makes
ours of the host's tensors (`layout.to_ours`) for the entries of `links`; `Link.host_shapes` says which shapes the
file must have. Parameters of an interaction or an output gate stand in no link: a host has none.

    family = FAMILIES["glm4_moe"]                       # by model_type, see families.py
    values = family.config(config)                      # ours -> config.json
    settings = family.settings(values, source)          # config.json -> {"attention": "gqa", "model.layers": 4, ...}
    for link in family.links(config, values): ...       # names and layouts of all tensors
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError
from kha_train.export.fields import Field, Fixed, Reading, Settings, read_fixed
from kha_train.export.links import Link
from kha_train.foreign.documents import Json
from kha_train.foreign.typed import Source


@dataclass(frozen=True)
class Family:
    """`model_type` and `architecture` are transformers' names. `given` are the settings that every model of the class
    has; the first is the attention preset. `refuses` says why a configuration of ours is none of this class, or None.
    `links` are the tensors of a configuration, for the values of its config.json. Keys in `ignored` say nothing about
    what the model computes.
    """

    model_type: str
    architecture: str
    given: Mapping[str, Json]
    fields: tuple[Field, ...]
    fixed: tuple[Fixed, ...]
    refuses: Callable[[RunConfig], ConfigError | None]
    links: Callable[[RunConfig, Mapping[str, Json]], Iterator[Link]]

    def config(self, config: RunConfig) -> dict[str, Json]:
        """What config.json says of the model: every key that this class reads, where its default is right too."""
        written = {field.key: field.write(config) for field in self.fields}
        fixed = {one.key: one.value for one in self.fixed if one.value is not None}
        return {"architectures": [self.architecture], "model_type": self.model_type, **written, **fixed}

    def settings(self, values: Mapping[str, Json], source: Source) -> Settings:
        """The settings of ours that a foreign config.json means, by dotted key. Raises `source.error` for a value of a
        wrong type or out of range, and for a model that our decoder does not compute.
        """
        reading, found = Reading(values, source), dict(self.given)
        for fixed in self.fixed:
            read_fixed(fixed, reading)
        for field in self.fields:
            found |= field.read(reading.take(field.key, field.hint, field.default, field.also), reading)
        return found


def plain_groups(config: RunConfig) -> RunConfig:
    """`config` without groups of experts where they change no choice: all are open, or each is one expert, of which a
    token chooses no more than there are open groups.
    """
    moe = config.moe
    if moe.expert_groups == 1 or moe.top_groups < moe.expert_groups < moe.experts:
        return config
    return replace(config, moe=replace(moe, expert_groups=1, top_groups=1))
