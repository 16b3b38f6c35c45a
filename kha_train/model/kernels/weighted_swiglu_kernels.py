"""The activation between an expert's two products, with the routing weight on it, forward and backward.

    A = w U silu(G)        silu(G) = G S,  S = sigmoid(G)
    dw = <dA, U silu(G)>   dU = w dA silu(G)   dG = w dA U (S + silu(G) (1 - S))

The backward reads only G, U and w again. Beside [dG, dU] it rewrites A, which the gradient of the second matrix needs.
Row m takes its weight from `order[m]` and writes its gradient there; no two rows share a place.
"""

# M routed copies, sorted by expert   F expert width   G, U: gate and up, side by side in rows of 2F

from __future__ import annotations

from kha_train.model.kernels.language import jit, tl, wide


@jit
def forward(
    gate_up, weight, order, hidden, rows, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """A [M, F] from [G, U] [M, 2F], both contiguous."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside, place = row < rows, row.to(tl.int64)[:, None]
    w = tl.load(weight + tl.load(order + row, mask=inside, other=0), mask=inside, other=0.0)[:, None]
    for start in range(0, F, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        mask = inside[:, None] & (column < F)
        gate = wide(tl.load(gate_up + place * (2 * F) + column, mask=mask, other=0.0))
        up = wide(tl.load(gate_up + place * (2 * F) + F + column, mask=mask, other=0.0))
        value = gate * tl.sigmoid(gate) * up * w
        tl.store(hidden + place * F + column, value.to(hidden.dtype.element_ty), mask=mask)


@jit
def backward(
    gate_up, weight, order, grad, hidden, grad_gate_up, grad_weight, rows,
    F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """A, [dG, dU] and dw from [G, U], w and dA. All contiguous."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside, place = row < rows, row.to(tl.int64)[:, None]
    origin = tl.load(order + row, mask=inside, other=0)
    w = tl.load(weight + origin, mask=inside, other=0.0)
    grad_w = tl.zeros_like(w)
    kind = hidden.dtype.element_ty
    for start in range(0, F, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        mask = inside[:, None] & (column < F)
        gate = wide(tl.load(gate_up + place * (2 * F) + column, mask=mask, other=0.0))
        up = wide(tl.load(gate_up + place * (2 * F) + F + column, mask=mask, other=0.0))
        grad_hidden = wide(tl.load(grad + place * F + column, mask=mask, other=0.0))
        opened = tl.sigmoid(gate)
        silu = gate * opened
        grad_w += tl.sum(grad_hidden * silu * up, axis=1)
        tl.store(hidden + place * F + column, (silu * up * w[:, None]).to(kind), mask=mask)
        weighted = grad_hidden * w[:, None]
        grad_gate = weighted * up * (opened + silu * (1.0 - opened))
        tl.store(grad_gate_up + place * (2 * F) + column, grad_gate.to(kind), mask=mask)
        tl.store(grad_gate_up + place * (2 * F) + F + column, (weighted * silu).to(kind), mask=mask)
    tl.store(grad_weight + origin, grad_w, mask=inside)
