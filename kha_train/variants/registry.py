"""Names of the optimisers -> where their code lives and which options they take. No torch is imported here.

A new optimiser is one file with its step and its options, one YAML under `configs/optim/`, and one line here.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Generic, TypeVar

from kha_train.variants.optimizer import AdamWOptions, OptimSection

Options = TypeVar("Options")


@dataclass(frozen=True)
class Variant(Generic[Options]):
    """A registered name: `path` is `module:Class`, imported only when it is built; `options` is its dataclass, or the
    `module:Class` of it, imported when a configuration names the variant."""

    path: str
    options: type[Options] | str

    def load(self) -> Any:
        """The class that builds this variant."""
        return _import(self.path)

    def options_class(self) -> type[Options]:
        """The dataclass of its options."""
        found: type[Options] = _import(self.options) if isinstance(self.options, str) else self.options
        return found


OPTIMIZERS: dict[str, Variant[OptimSection]] = {
    "adamw": Variant("kha_train.optim.adamw:AdamW", AdamWOptions),
}


def _import(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
