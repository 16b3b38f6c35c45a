"""RMSNorm of every head followed by its rotation, in one pass over queries or keys.

    n = x / sqrt(mean(x^2) + eps) * w      y_i = n_i c - n_(i+R) s      y_(i+R) = n_(i+R) c + n_i s      for i < R

Dimension i is read together with its partner i + R (or i - R), so that a tile holds whole heads. The backward rotates
the gradient back (the same with -s), recomputes n, and sums the weight's gradient over the rows of each program.
"""

# M rows: tokens x heads   K head width   R rotation planes

from __future__ import annotations

from kha_train.model.kernels.language import jit, load_rows, tl, wide


@jit
def _partner(dim, PLANES: tl.constexpr) -> tl.tensor:
    """The dimension paired with `dim`; itself where nothing is rotated."""
    return tl.where(dim < PLANES, dim + PLANES, tl.where(dim < 2 * PLANES, dim - PLANES, dim))


@jit
def _angle(table, row, dim, rows, other, HEADS: tl.constexpr, PLANES: tl.constexpr) -> tl.tensor:
    """The table value [tokens, R] for each row's token and each dimension; `other` where nothing is rotated."""
    plane = tl.where(dim < PLANES, dim, dim - PLANES)
    place = (row // HEADS).to(tl.int64)[:, None] * PLANES + plane[None, :]
    return tl.load(table + place, mask=(row < rows)[:, None] & (dim < 2 * PLANES)[None, :], other=other)


@jit
def forward(
    x, weight, cos, sin, out, rows, token_stride, head_stride,
    HEADS: tl.constexpr, K: tl.constexpr, PLANES: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """y, contiguous [B, T, H, K], from x by its strides."""
    dim = tl.arange(0, K)
    partner = _partner(dim, PLANES)
    gain, partner_gain = wide(tl.load(weight + dim)), wide(tl.load(weight + partner))
    sign = tl.where(dim < PLANES, -1.0, 1.0)
    tile = tl.program_id(0)
    while tile * ROWS < rows:
        row = tile * ROWS + tl.arange(0, ROWS)
        x_MK = wide(load_rows(x, row, dim, token_stride, head_stride, rows, HEADS))
        other = wide(load_rows(x, row, partner, token_stride, head_stride, rows, HEADS))
        scale = tl.rsqrt(tl.sum(x_MK * x_MK, axis=1) / K + EPS)[:, None]
        c = _angle(cos, row, dim, rows, 1.0, HEADS, PLANES)
        s = _angle(sin, row, dim, rows, 0.0, HEADS, PLANES) * sign[None, :]
        y = scale * (x_MK * gain[None, :] * c + other * partner_gain[None, :] * s)
        place = row.to(tl.int64)[:, None] * K + dim[None, :]
        tl.store(out + place, y.to(out.dtype.element_ty), mask=(row < rows)[:, None])
        tile += tl.num_programs(0)


@jit
def backward(
    x, weight, cos, sin, grad, grad_x, grad_weight, rows, token_stride, head_stride,
    tokens, grad_batch_stride, grad_token_stride, grad_head_stride,
    HEADS: tl.constexpr, K: tl.constexpr, PLANES: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """dx, contiguous [B, T, H, K], and each program's share of dw [programs, K], from dy by its strides."""
    dim = tl.arange(0, K)
    partner = _partner(dim, PLANES)
    gain = wide(tl.load(weight + dim))
    sign = tl.where(dim < PLANES, -1.0, 1.0)
    share = tl.zeros((K,), dtype=gain.dtype)
    tile = tl.program_id(0)
    while tile * ROWS < rows:
        row = tile * ROWS + tl.arange(0, ROWS)
        x_MK = wide(load_rows(x, row, dim, token_stride, head_stride, rows, HEADS))
        scale = tl.rsqrt(tl.sum(x_MK * x_MK, axis=1) / K + EPS)[:, None]
        c = _angle(cos, row, dim, rows, 1.0, HEADS, PLANES)
        s = _angle(sin, row, dim, rows, 0.0, HEADS, PLANES) * sign[None, :]
        token, inside = row // HEADS, (row < rows)[:, None]
        start = (token // tokens).to(tl.int64) * grad_batch_stride + (token % tokens).to(tl.int64) * grad_token_stride
        start = (start + (row % HEADS) * grad_head_stride)[:, None]
        dy = wide(tl.load(grad + start + dim[None, :], mask=inside, other=0.0))
        other = wide(tl.load(grad + start + partner[None, :], mask=inside, other=0.0))
        dn = dy * c - other * s
        normed = x_MK * scale
        share += tl.sum(dn * normed, axis=0)
        dn *= gain[None, :]
        dx = scale * (dn - normed * (tl.sum(dn * normed, axis=1) / K)[:, None])
        place = row.to(tl.int64)[:, None] * K + dim[None, :]
        tl.store(grad_x + place, dx.to(grad_x.dtype.element_ty), mask=inside)
        tile += tl.num_programs(0)
    tl.store(grad_weight + tl.program_id(0) * K + dim, share)
