"""The import of Triton for kernels. Raises ConfigError when it is imported without Triton.

It works around two differences between Triton's interpreter (`TRITON_INTERPRET=1`, read when a kernel is defined) and a
GPU. The interpreter's `tl.dot` multiplies the bit patterns of bfloat16 as integers, so `dot` widens them first. And
with numpy 2.4, Triton 3.6 cannot loop over a `range` with bounds known only at run time, so kernels loop with `while`,
or over `constexpr` bounds.
"""

# K head width

from __future__ import annotations

import os

from kha_train.errors import ConfigError

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ConfigError(
        "needs the package triton, which is not installed",
        field="engine.kernels",
        value="triton",
        fix="pip install triton (Linux), or engine.kernels=torch and attention.interaction.impl=auto",
    ) from missing

__all__ = ["dot", "jit", "load_rows", "tl", "triton", "wide"]

jit = triton.jit
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@jit
def dot(a, b) -> tl.tensor:
    """a @ b, summed in fp32 (float64 for float64); full precision for fp32 operands, as in torch by default."""
    if a.dtype == tl.float64:
        return tl.dot(a, b, out_dtype=tl.float64, input_precision="ieee")
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@jit
def wide(x) -> tl.tensor:
    """x in fp32, or unchanged in float64."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@jit
def load_rows(x, row, dim, token_stride, head_stride, rows, HEADS: tl.constexpr) -> tl.tensor:
    """Rows of x [tokens, HEADS, K] by its strides: row = token * HEADS + head; zero from `rows` on."""
    place = (row // HEADS).to(tl.int64) * token_stride + (row % HEADS) * head_stride
    return tl.load(x + place[:, None] + dim[None, :], mask=(row < rows)[:, None], other=0.0)
