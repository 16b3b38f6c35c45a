"""The gated perceptron shared by heads (KHA eq 9): forward and backward kernels, with one pass over the rows each.

    U = X W_up     S = sigmoid(X W_gate)     A = 2 U S     Y = A W_down
    dU = 2 dA S    dG = dU U (1 - S)

Programs load their matrices once and iterate over tiles of rows. U and S are never stored; the backward recomputes
them. A row is one head of one token, read in place by its strides.
"""

# M rows: tokens x heads   K head width

from __future__ import annotations

from kha_train.model.kernels.language import dot, jit, load_rows, tl, wide


@jit
def _square(matrix, K: tl.constexpr) -> tl.tensor:
    """A contiguous matrix [K, K]."""
    dim = tl.arange(0, K)
    return tl.load(matrix + dim[:, None] * K + dim[None, :])


@jit
def forward(
    x, up, gate, down, out, rows, token_stride, head_stride,
    HEADS: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, DOWN: tl.constexpr,
) -> None:  # fmt: skip
    """A (without DOWN) or Y, contiguous [M, K], from X by its strides."""
    dim = tl.arange(0, K)
    w_up, w_gate = _square(up, K), _square(gate, K)
    if DOWN:
        w_down = _square(down, K)
    tile = tl.program_id(0)
    while tile * ROWS < rows:
        row = tile * ROWS + tl.arange(0, ROWS)
        x_MK = load_rows(x, row, dim, token_stride, head_stride, rows, HEADS)
        opened = tl.sigmoid(dot(x_MK, w_gate))
        y = 2.0 * dot(x_MK, w_up) * opened
        if DOWN:
            y = dot(y.to(x_MK.dtype), w_down)
        place = row.to(tl.int64)[:, None] * K + dim[None, :]
        tl.store(out + place, y.to(out.dtype.element_ty), mask=(row < rows)[:, None])
        tile += tl.num_programs(0)


@jit
def backward(
    x, up, gate, grad_hidden, grad_both, hidden, rows, token_stride, head_stride,
    HEADS: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, HIDDEN: tl.constexpr,
) -> None:  # fmt: skip
    """[dU, dG], contiguous [M, 2 K], from dA, contiguous [M, K]; with HIDDEN A too, which dW_down reads."""
    dim = tl.arange(0, K)
    w_up, w_gate = _square(up, K), _square(gate, K)
    tile = tl.program_id(0)
    while tile * ROWS < rows:
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None]
        x_MK = load_rows(x, row, dim, token_stride, head_stride, rows, HEADS)
        opened = tl.sigmoid(dot(x_MK, w_gate))
        raised = dot(x_MK, w_up)
        start = row.to(tl.int64)[:, None]
        grad = wide(tl.load(grad_hidden + start * K + dim[None, :], mask=inside, other=0.0))
        grad_up = 2.0 * grad * opened
        kind = grad_both.dtype.element_ty
        tl.store(grad_both + start * (2 * K) + dim[None, :], grad_up.to(kind), mask=inside)
        tl.store(
            grad_both + start * (2 * K) + K + dim[None, :], (grad_up * (1.0 - opened) * raised).to(kind), mask=inside
        )
        if HIDDEN:
            tl.store(hidden + start * K + dim[None, :], (2.0 * raised * opened).to(kind), mask=inside)
        tile += tl.num_programs(0)
