"""Copies token rows to their routed places and sums them back. Each is the other's transpose, and a row is read once.

A program owns tokens, so no two write to the same place and sums have one order: no atomics in either direction.
"""

# N tokens   D model width   J copies per token   M = N * J routed copies

from __future__ import annotations

from kha_train.model.kernels.language import jit, tl, wide


@jit
def spread(
    x, home, out, tokens,
    D: tl.constexpr, J: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """Row n of X [N, D] to the rows `home[n, 0..J-1]` of [M, D]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside, place = row < tokens, row.to(tl.int64)
    for start in range(0, D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < D)[None, :]
        tile = tl.load(x + place[:, None] * D + column[None, :], mask=mask)
        for copy in tl.static_range(J):
            at = tl.load(home + place * J + copy, mask=inside, other=0)
            tl.store(out + at[:, None] * D + column[None, :], tile, mask=mask)


@jit
def gather_sum(
    y, home, out, tokens,
    D: tl.constexpr, J: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """The sum of rows `home[n, 0..J-1]` of Y [M, D], in that order and at least fp32, as row n of [N, D]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside, place = row < tokens, row.to(tl.int64)
    for start in range(0, D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < D)[None, :]
        first = tl.load(home + place * J, mask=inside, other=0)
        total = wide(tl.load(y + first[:, None] * D + column[None, :], mask=mask, other=0.0))
        for copy in tl.static_range(1, J):
            at = tl.load(home + place * J + copy, mask=inside, other=0)
            total += wide(tl.load(y + at[:, None] * D + column[None, :], mask=mask, other=0.0))
        tl.store(out + place[:, None] * D + column[None, :], total.to(out.dtype.element_ty), mask=mask)
