"""Checks that a checkpoint fits this model and release: nothing is broadcast, dropped or invented."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kha_train.checkpoint.manifest import MANIFEST_FILE, TRAINER_FILE
from kha_train.checkpoint.reader import Checkpoint
from kha_train.errors import CheckpointError, FormatError
from kha_train.foreign.typed import Source

FROZEN = "weight"
"""Last name of a matrix of an interaction that is not trained (`attention.interaction.train: false`)."""
KNOWN_BUFFERS = ("selection_bias", "previous_share", "steps_done", FROZEN)
"""Last names of buffers that this release knows. Whether a model has them depends on its settings."""


def source_of(checkpoint: Checkpoint, file: str = TRAINER_FILE) -> Source:
    """How errors name the trainer's state, or another `file`, in `checkpoint`."""
    path = checkpoint.path
    fix = (
        f"resume with what wrote it ({checkpoint.manifest.tool}), or move {path} aside: the previous checkpoint is "
        "used then"
    )
    return Source(str(path / file), CheckpointError, fix)


def refuse_unknown(
    checkpoint: Checkpoint, found: Iterable[str], known: Iterable[str], place: str, file: str = TRAINER_FILE
) -> None:
    """Raises FormatError for state that a later release stores and this one would drop."""
    later = sorted(set(found) - set(known))
    if later:
        source = source_of(checkpoint, file)
        problem = f"unknown to this release, which would drop it; written by {checkpoint.manifest.tool}"
        raise FormatError(problem, field=f"{source.name} {place}{later[0]}", fix=source.fix)


def check_buffers(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError unless the buffers of `checkpoint` are fp32 and have these `shapes` by name.

    Raises FormatError for an unknown kind of buffer, which this release would drop.
    """
    entries, source = checkpoint.manifest.contents.buffers, source_of(checkpoint, MANIFEST_FILE)
    for name, shape in shapes.items():
        if name not in entries:
            raise source.fault(f"buffers.{name}", "missing")
        if entries[name].shape != shape or entries[name].dtype != "F32":
            saved = f"{entries[name].dtype} {list(entries[name].shape)}"
            raise source.fault(f"buffers.{name}", "has another shape", saved, f"F32 {list(shape)}")
    further = {name for name in entries if name.rpartition(".")[2] not in KNOWN_BUFFERS}
    refuse_unknown(checkpoint, further, shapes, "buffers.", MANIFEST_FILE)


def check_parameters(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError unless the parameters of `checkpoint` have these names and shapes."""
    source, saved = source_of(checkpoint, MANIFEST_FILE), checkpoint.names()
    for name in [*shapes, *saved]:
        if saved.get(name) != shapes.get(name):
            found = "none" if name not in saved else str(list(saved[name]))
            expected = "none" if name not in shapes else str(list(shapes[name]))
            raise source.fault(f"parameters.{name}", "differs from the model's", found, expected)
