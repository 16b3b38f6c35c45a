"""Host memory for snapshots, allocated once and reused by every save."""

# P the elements of one piece

from __future__ import annotations

import torch
from torch import Tensor


class HostBuffers:
    """Copies tensors to host memory, which is pinned when they come from a GPU. The n-th copy of every save reuses one
    buffer.

    The buffers hold one snapshot of this rank's share: 12 bytes per parameter / ranks.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._used = 0

    def restart(self) -> None:
        """Begin a new snapshot; it overwrites the copies of the last one."""
        self._used = 0

    def copy(self, source_P: Tensor) -> Tensor:
        """A host copy of a 1-D tensor. From a GPU the copy is asynchronous: call `synchronize` before reading it.

        Raises MemoryError when the host has too little memory.
        """
        if self._used == len(self._buffers) or self._buffers[self._used].shape != source_P.shape:
            del self._buffers[self._used :]
            self._buffers.append(_taken(source_P))
        target_P = self._buffers[self._used]
        self._used += 1
        return target_P.copy_(source_P, non_blocking=True)

    def synchronize(self) -> None:
        """Return when every copy is complete."""
        if any(buffer.is_pinned() for buffer in self._buffers[:1]):
            torch.cuda.synchronize()


def _taken(like_P: Tensor) -> Tensor:
    try:
        return torch.empty(like_P.shape, dtype=like_P.dtype, pin_memory=like_P.is_cuda)
    except RuntimeError as error:
        raise MemoryError(f"{like_P.nbytes} bytes of host memory: {error}") from error
