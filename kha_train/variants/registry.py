"""Names of attention variants, optimisers, evaluation tasks and engines -> their code and their options. Imports no
torch.

A new variant or optimiser needs a file with its code and options, a YAML file under `configs/`, and a line here; a task
needs no YAML file. The options of the package's own variants are beside this file, so that a configuration can be
checked without importing torch; others may name theirs by path, in the file of their code. A new engine is a package of
`kha_train/engine`, and needs no line here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Generic, TypeVar

from kha_train.variants.attention import BaseOptions, InteractionOptions
from kha_train.variants.bases import (
    DifferentialOptions,
    GroupedQueryOptions,
    GroupedTiedOptions,
    LatentOptions,
    LinearOptions,
    TalkingHeadsOptions,
)
from kha_train.variants.explicit import ExplicitOptions
from kha_train.variants.interactions import (
    KnockingGateOptions,
    KnockingLinearOptions,
    KnockingMlpOptions,
)
from kha_train.variants.optimizer import AdamWOptions, MuonOptions, OptimSection
from kha_train.variants.task import ContextOptions, HarnessOptions, RepeatsOptions, RowTaskOptions, TaskOptions

Options = TypeVar("Options")


@dataclass(frozen=True)
class Variant(Generic[Options]):
    """A registered name: `path` is `module:Class`, imported only when it is built; `options` is its dataclass, or its
    `module:Class`, imported when a configuration names the variant.
    """

    path: str
    options: type[Options] | str

    def load(self) -> Any:
        """The class that builds this variant."""
        return _import(self.path)

    def options_class(self) -> type[Options]:
        """The dataclass of its options."""
        found: type[Options] = _import(self.options) if isinstance(self.options, str) else self.options
        return found


BASES: dict[str, Variant[BaseOptions]] = {
    "gqa": Variant("kha_train.model.attention.grouped_query:GroupedQueryAttention", GroupedQueryOptions),
    "gta": Variant("kha_train.model.attention.grouped_tied:GroupedTiedAttention", GroupedTiedOptions),
    "mla": Variant("kha_train.model.attention.latent:LatentAttention", LatentOptions),
    "diff": Variant("kha_train.model.attention.differential:DifferentialAttention", DifferentialOptions),
    "linear": Variant("kha_train.model.attention.linear:LinearAttention", LinearOptions),
    "talking_heads": Variant("kha_train.model.attention.talking_heads:TalkingHeadsAttention", TalkingHeadsOptions),
}

INTERACTIONS: dict[str, Variant[InteractionOptions]] = {
    "none": Variant("kha_train.model.attention.interaction:NoInteraction", InteractionOptions),
    "knocking_linear": Variant("kha_train.model.attention.knocking:KnockingLinear", KnockingLinearOptions),
    "knocking_mlp": Variant("kha_train.model.attention.knocking:KnockingMlp", KnockingMlpOptions),
    "knocking_gate": Variant("kha_train.model.attention.knocking:KnockingGate", KnockingGateOptions),
    "explicit": Variant("kha_train.model.attention.explicit:Explicit", ExplicitOptions),
}

OPTIMIZERS: dict[str, Variant[OptimSection]] = {
    "adamw": Variant("kha_train.optim.adamw:AdamW", AdamWOptions),
    "muon": Variant("kha_train.optim.muon:Muon", MuonOptions),
}

TASKS: dict[str, Variant[TaskOptions]] = {
    "answers": Variant("kha_train.evaluate.answers:Answers", RowTaskOptions),
    "bits_per_byte": Variant("kha_train.evaluate.bits_per_byte:BitsPerByte", RowTaskOptions),
    "context": Variant("kha_train.evaluate.context:Context", ContextOptions),
    "repeats": Variant("kha_train.evaluate.repeats:Repeats", RepeatsOptions),
    "harness": Variant("kha_train.evaluate.harness_task:HarnessTask", HarnessOptions),
}


ENGINES_IN_ONE_FILE = ("deepspeed", "plain")


@cache
def engines() -> tuple[str, ...]:
    """The values of `engine.name`: the engines in one file, and every package of `kha_train/engine` by its name.

    The module or package has a class `Engine` that implements `kha_train/engine/contract.py`.
    """
    room = Path(__file__).parents[1] / "engine"
    return tuple(sorted({*ENGINES_IN_ONE_FILE, *(found.name for found in iter_modules([str(room)]) if found.ispkg)}))


@cache
def sinks() -> tuple[str, ...]:
    """The values of `telemetry.sinks`: the modules of `kha_train/telemetry` with a function `open_sink`."""
    room = Path(__file__).parents[1] / "telemetry"
    return tuple(sorted(path.stem for path in room.glob("*.py") if "\ndef open_sink(" in path.read_text("utf-8")))


def _import(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
