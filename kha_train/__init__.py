"""kha_train: pretraining of mixture-of-experts language models with cross-head attention.

`compose`, `build_decoder` and `open_stream` are the interface for notebooks; they are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_SURFACE = {
    "RunConfig": "kha_train.config.schema",
    "compose": "kha_train.config.compose",
    "build_decoder": "kha_train.model.decoder",
    "open_stream": "kha_train.data.stream",
}

__all__ = ["RunConfig", "build_decoder", "compose", "open_stream"]


def __getattr__(name: str) -> Any:
    """The public names, imported on first use (PEP 562)."""
    if name not in _SURFACE:
        raise AttributeError(f"module 'kha_train' has no attribute {name!r}")
    return getattr(import_module(_SURFACE[name]), name)


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted(__all__)
