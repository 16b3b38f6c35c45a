"""A stage of collective work that all ranks leave together: all well, or all with the same error."""

from __future__ import annotations

from types import TracebackType

from kha_train.distributed import World
from kha_train.errors import CheckpointError


class Agreed:
    """`with Agreed(world, "write"):` around local work. No rank leaves before all arrive; one error is everyone's.

    The body must not call collectives: a rank that fails half-way would leave the others waiting in them. Raises
    whatever `World.raise_together` raises; an OSError becomes a CheckpointError ("cannot write ...") first.
    """

    def __init__(self, world: World, doing: str) -> None:
        self._world, self._doing = world, doing

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, OSError):
            error = CheckpointError(f"cannot {self._doing} the checkpoint: {error}")
        self._world.raise_together(error)
