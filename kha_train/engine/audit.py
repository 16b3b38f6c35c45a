"""Detects silent corruption: values that all ranks share must be bit-identical on all of them.

Every rank's copy of the weights comes from the fp32 masters, in which each element has one owner. Copying them again
changes nothing, unless a copy (or its master) was changed in between by something other than the optimiser. Values
without an owner (buffers, and the values behind decisions) are compared by majority.

Not found: a bit that flips in a gradient before it is reduced, or in a moment, because nobody has a second copy.
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
    """Raises CorruptionError on all ranks, naming a rank with wrong values and which of them are wrong.

    Call it between the last micro-batch and the step: the weights have been through a forward and a backward, and
    nothing computed from wrong ones has been applied. It changes nothing. `decisions` is a text of the values behind
    this rank's decisions. Collective.
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
            fix="take its device or host out of service; the same command continues from the last checkpoint",
        )
    engine.world.raise_together(error)


def _checksums(engine: Engine) -> dict[str, int]:
    """A sum over the bits of what this rank keeps of each parameter: the whole or, under ZeRO 3, its share. Any single
    flipped bit changes it.
    """
    held = engine.held_weights()
    return dict(zip(held, torch.stack([_bit_sum(tensor) for tensor in held.values()]).tolist(), strict=True))


def _bit_sum(tensor: Tensor) -> Tensor:
    bits = tensor.detach().view(_BITS[tensor.element_size()]).flatten()
    # A sum in int64 makes an int64 copy, so it is computed in parts.
    return torch.stack([part.sum(dtype=torch.int64) for part in bits.split(_SUMMED_AT_ONCE)]).sum()


def _outvoted(engine: Engine, decisions: str) -> list[str]:
    """The buffers and decisions in which this rank differs from most others; with two ranks, those in which they
    differ.
    """
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
