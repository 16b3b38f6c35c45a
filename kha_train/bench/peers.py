"""Peers: other people's trainers and data loaders beside ours, through adapters that live outside this package.

`--against NAME --peers FOLDER` loads the file FOLDER/NAME.py, which has the functions of `Adapter`; `kha bench data
--peers FOLDER` loads FOLDER/loaders.py, which has `PEERS` and `PACKAGES` (see `LoaderAdapter`). A checkout has such a
folder: tests/peers. This file needs torch alone, because loaders are measured in an environment that has little else.
"""

# B rows   L tokens of a row   N tokens   D model width

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from kha_train.errors import ConfigError, Options

if TYPE_CHECKING:
    from kha_train.config.schema import RunConfig
    from kha_train.data.rows.batch import Batch
    from kha_train.model.moe.router import Routing

EXAMPLE = "--peers tests/peers"


class Problem(NamedTuple):
    """The leaves x, gate and up, down, and routing weights; the routing; and the output gradient."""

    leaves: tuple[Tensor, Tensor, Tensor, Tensor]
    routing: Routing
    grad_ND: Tensor


class Contender(NamedTuple):
    """One implementation on one problem: its forward, and the leaves that need gradients, in its own layout."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]


Implementation = Callable[[Problem], Contender]


class StepPeer(Protocol):
    """Another trainer of the same shape, and which of its expert implementations it uses."""

    experts: str

    def step(self, batch: Batch) -> float:
        """Run one optimiser step on the whole batch; return its mean loss."""


class Adapter(Protocol):
    """What FOLDER/NAME.py has for `kha bench step` and `kha bench moe`."""

    def check(self, config: RunConfig) -> None:
        """Raise ConfigError when the peer is not installed or has no model of this shape."""

    def fastest(
        self, config: RunConfig, batch: Batch, device: torch.device, dtype: torch.dtype
    ) -> tuple[StepPeer, dict[str, Any]]:
        """The peer with its fastest experts, and the seconds of each that was tried, or why it was left out. Raises
        ConfigError when none fits."""

    def experts(self, config: RunConfig, dtype: torch.dtype) -> tuple[dict[str, Implementation], dict[str, str]]:
        """Implementations of one layer's experts by name, and why others were left out."""


class Opened(NamedTuple):
    """A loader: `batches` from its beginning; `seek(step)` gives the batches from that step on, None where the loader
    cannot."""

    batches: Iterator[torch.Tensor]
    seek: Callable[[int], Iterator[torch.Tensor]] | None


class Shape(NamedTuple):
    """What is read: B rows of L tokens with ids below `vocab`."""

    B: int
    L: int
    vocab: int


class LoaderPeer(NamedTuple):
    """`write(ours, directory, shape)` makes the peer's format from our shards; `open(directory, shape)` reads it."""

    write: Callable[[Path, Path, Shape], None]
    open: Callable[[Path, Shape], Opened]


class LoaderAdapter(Protocol):
    """What FOLDER/loaders.py has: loaders by name, and the packages that pip installs together, the first of each
    named in the protocol."""

    PEERS: Mapping[str, LoaderPeer]
    PACKAGES: Sequence[tuple[str, ...]]


def load_adapters(folder: Path | None, names: Sequence[str]) -> dict[str, Adapter]:
    """The adapters of `--against` by name. Raises ConfigError when one of them is not in `folder`."""
    return {name: cast(Adapter, _module(folder, name, "--against")) for name in names}


def load_loaders(folder: Path) -> LoaderAdapter:
    """The data loaders of `folder`. Raises ConfigError when it has none."""
    return cast(LoaderAdapter, _module(folder, "loaders", "--peers"))


def _module(folder: Path | None, name: str, field: str) -> ModuleType:
    if folder is None:
        problem = "needs the folder of its adapter"
        raise ConfigError(problem, field=field, value=name, fix=Options(EXAMPLE, "{} (in a checkout)"))
    file = folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"kha_train_peer_{name}", file) if file.is_file() else None
    if spec is None or spec.loader is None:
        allowed = ", ".join(sorted(path.stem for path in folder.glob("*.py"))) or "a folder with adapters"
        raise ConfigError(f"no adapter {file}", field=field, value=name, allowed=allowed)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
