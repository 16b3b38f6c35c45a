"""Collects the metrics that a run declares from the parts it is built of."""

from __future__ import annotations

from kha_train.config.schema import RunConfig
from kha_train.data import stream
from kha_train.evaluate import opening
from kha_train.metric import Metric, in_force
from kha_train.model.decoder import Decoder, lay_out_decoder
from kha_train.model.observed import declared_metrics
from kha_train.record.metrics import HEAD
from kha_train.stability import monitor
from kha_train.telemetry import meters, throughput
from kha_train.train import layer_statistics, probe, reporter, saving, watch


def declared(config: RunConfig, decoder: Decoder | None = None) -> dict[str, Metric]:
    """The metrics that lines of a run of `config` may hold, by name. Without a `decoder`, lays one out on `meta`."""
    decoder = decoder or lay_out_decoder(config)
    own = [HEAD, reporter.LINE, throughput.METRICS, stream.METRICS, meters.METRICS, saving.METRICS, watch.METRICS]
    statistics = [layer_statistics.METRICS] if config.telemetry.layer_statistics_every else []
    sources = [*own, tuple(declared_metrics(decoder)), *statistics, probe.METRICS]
    sources.append(tuple(Metric(*one) for one in monitor.METRICS))
    sources.append(opening.declared(config))
    return in_force(metric for source in sources for metric in source)
