"""Finding silent corruption: what ranks hold in common must be the same bits on all of them.

Every rank's copy of the weights comes from the fp32 masters, of which each element has one owner. Copying them out anew
changes nothing, unless a copy (or its master) was changed in between by something else than the optimiser. What has no
owner (buffers, and what decisions are made from) is put to the vote.

Not found: a bit that flips in a gradient before it is reduced, or in a moment, of which nobody has a second copy.
"""

from __future__ import annotations

import zlib
from collections import Counter

import torch
from torch import Tensor

from kha_train.engine.contract import Engine
from kha_train.errors import CorruptionError

_SUMMED_AT_ONCE = 1 << 24
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def audit(engine: Engine, decisions: str) -> None:
    """Raise CorruptionError on all ranks, naming one that does not hold what it should, and which part of it.

    To be called between the last micro-batch and the step: the weights have gone through a forward and a backward, and
    what was computed from wrong ones has not been applied. Nothing is changed. `decisions` is this rank's own text of
    what it decides from. Collective.
    """
    wrong = [f"its {what}" for what in _outvoted(engine, decisions)]
    before = _checksums(engine)
    engine.refresh_parameters()
    after = _checksums(engine)
    wrong += [f"its copy of {name}" for name in before if before[name] != after[name]]
    error = None
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        error = CorruptionError(
            f"silent corruption on rank {engine.world.rank}: {wrong[0]} differs from what the other ranks hold{more}",
            field="engine.audit_every",
            fix="take its device or host out; the same command goes on from the last checkpoint",
        )
    engine.world.raise_together(error)


def _checksums(engine: Engine) -> dict[str, int]:
    """A sum over the bits of what this rank keeps of each parameter: the whole, or under ZeRO 3 its share. No single
    flipped bit leaves it as it was."""
    held = engine.held_weights()
    return dict(zip(held, torch.stack([_bit_sum(tensor) for tensor in held.values()]).tolist(), strict=True))


def _bit_sum(tensor: Tensor) -> Tensor:
    bits = tensor.detach().view(_BITS[tensor.element_size()]).flatten()
    # A sum in int64 makes a copy in int64: of a part at a time.
    return torch.stack([part.sum(dtype=torch.int64) for part in bits.split(_SUMMED_AT_ONCE)]).sum()


def _outvoted(engine: Engine, decisions: str) -> list[str]:
    """Of buffers and decisions those in which this rank differs from most others; with two ranks, that both differ."""
    world = engine.world
    names = ["buffers", "decisions"]
    buffers = b"".join(buffer.cpu().numpy().tobytes() for buffer in engine.buffers().values())
    table = torch.zeros(world.size, len(names), dtype=torch.int64, device=world.device)
    own = [zlib.crc32(buffers), zlib.crc32(decisions.encode())]
    table[world.rank] = torch.tensor(own, device=world.device)
    votes = [Counter(column).most_common(2) for column in zip(*world.sum_(table).tolist(), strict=True)]
    tied = [len(found) > 1 and found[0][1] == found[1][1] for found in votes]
    return [
        name for name, value, found, tie in zip(names, own, votes, tied, strict=True) if tie or value != found[0][0]
    ]
