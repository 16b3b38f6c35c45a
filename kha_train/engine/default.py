"""Selects the engine of a run. Code outside this room constructs engines only through `engine_for`."""

from __future__ import annotations

from importlib import import_module

from kha_train.config.schema import RunConfig
from kha_train.engine.contract import Engine


def engine_for(config: RunConfig, ranks: int) -> type[Engine]:
    """The class of the engine that `engine.name` selects. Raises ConfigError when it cannot train on `ranks` ranks."""
    engine: type[Engine] = import_module(f"kha_train.engine.{config.engine.name}").Engine
    problem = engine.refuses(config, ranks)
    if problem:
        raise problem
    return engine
