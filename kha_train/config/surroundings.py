"""Sections of the configuration that change no number of a training: what is shown and measured of a run, and the
machine that it is planned for. They belong to the tree of `schema.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

from kha_train.errors import ConfigError, Settings
from kha_train.variants.registry import sinks


@dataclass(frozen=True, kw_only=True)
class WandbSection:
    """The W&B mirror. `auto` is online with a key and a network, offline otherwise; never fatal."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "kha_train"
    entity: str = ""
    group: str = ""
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TelemetrySection:
    """What is measured and shown of a run. `peak_tflops` (0: look up or measure) is the denominator of MFU. Every
    `layer_statistics_every` steps (0: never) the record has norms of gradient, update and activations of each layer.
    `sinks` are the programs that mirror the record, beside the console.
    """

    console: Literal["auto", "lines", "progress", "quiet"] = "auto"
    sinks: tuple[str, ...] = ("wandb",)
    peak_tflops: float = 0.0
    layer_statistics_every: int = 0
    wandb: WandbSection = field(default_factory=WandbSection)

    def invalid(self) -> ConfigError | None:
        """The error about a sink that does not exist or is named twice, or None."""
        known, once = sinks(), tuple(dict.fromkeys(self.sinks))
        if not set(once) <= set(known):
            close = [name for given in once for name in get_close_matches(given, known, n=1)]
            fix = Settings(f"telemetry.sinks=[{','.join(dict.fromkeys(close))}]")
            return ConfigError(
                "no such sink", field="telemetry.sinks", value=list(self.sinks), allowed=", ".join(known), fix=fix
            )
        if once != self.sinks:
            fix = Settings(f"telemetry.sinks=[{','.join(once)}]")
            return ConfigError("names a sink twice", field="telemetry.sinks", value=list(self.sinks), fix=fix)
        return None


@dataclass(frozen=True, kw_only=True)
class ProfileSection:
    """Which steps are profiled into `<run.dir>/profile/`: `first_step` (0: none) to `last_step`; with `memory` also
    what they allocate."""

    first_step: int = 0
    last_step: int = 0
    memory: bool = False


@dataclass(frozen=True, kw_only=True)
class ClusterSection:
    """The machine a run is planned for (`kha plan`); training itself uses the machine it runs on.

    Per device: dense peak in `peak_tflops`, `memory_gib` of which the model cannot use `reserved_gib`,
    `price_per_hour`, and the compute `capability` of CUDA, such as 9.0, which decides what kernels can run. Bandwidths
    are GB a second, one way: `node_bandwidth_gb` of a device to its node of `devices_per_node`, `network_bandwidth_gb`
    of a device to other nodes, `storage_bandwidth_gb` of all writes. 0 means unknown, and nothing is checked against
    it. `mfu` and `hours_between_failures` (of one device) are assumptions; replace them with measured values.
    """

    name: str
    device: Literal["cpu", "cuda"]
    devices: int
    devices_per_node: int
    memory_gib: float
    reserved_gib: float
    peak_tflops: float
    mfu: float
    node_bandwidth_gb: float
    network_bandwidth_gb: float
    storage_bandwidth_gb: float
    price_per_hour: float
    hours_between_failures: float
    capability: float = 0.0

    def bandwidth_gb(self, ranks: int) -> float:
        """Of the slowest link between so many neighbouring ranks, in groups that begin with the first rank. Where a
        node has no whole number of groups, one of them reaches into the next node.
        """
        one_node = self.devices <= self.devices_per_node
        inside = one_node or (ranks <= self.devices_per_node and self.devices_per_node % ranks == 0)
        return self.node_bandwidth_gb if inside else self.network_bandwidth_gb
