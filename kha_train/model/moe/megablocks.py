"""The `megablocks` expert backend: its permutations and the grouped GEMM of the `grouped_gemm` package, CUDA and bf16.

The only user of megablocks. There is no fallback: the error names what is missing and the command that installs it. The
routing weight is applied before the second GEMM, as in `experts.grouped`, so its `scatter` adds unweighted copies.
"""

# N tokens   D model width   F expert width   E experts   M routed copies, sorted by expert   X = 2F

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kha_train.config.resolve import megablocks_unavailable
from kha_train.model.moe.router import Routing
from kha_train.model.moe.swiglu import weighted_swiglu

NEEDED = ("megablocks", "stk", "triton", "megablocks_ops", "grouped_gemm")


class Kernels(NamedTuple):
    """The functions used from megablocks: `ops` (sort, inclusive_cumsum, gather, scatter) and `gmm` of grouped_gemm."""

    ops: Any
    gmm: Any


def missing_packages() -> list[str]:
    """The required packages that are not installed."""
    return [name for name in NEEDED if find_spec(name) is None]


def load_kernels() -> Kernels:
    """The kernels. Raises ConfigError naming every missing package, or the import error."""
    missing = missing_packages()
    if missing:
        raise megablocks_unavailable(f"not installed: {', '.join(missing)}")
    try:
        # Imported by name: it pins another torch, so it cannot be a requirement of this package, not even an optional
        # one.
        ops, gemm = import_module("megablocks.ops"), import_module("megablocks.grouped_gemm_util")
    except (ImportError, RuntimeError, AssertionError) as error:
        raise megablocks_unavailable(f"its import failed: {error}") from error
    return Kernels(ops, gemm.ops.gmm)


def run_kernels(kernels: Kernels, x_ND: Tensor, gate_up_EDX: Tensor, down_EFD: Tensor, routing: Routing) -> Tensor:
    """The weighted sum of every token's experts, as `experts.grouped`, with `kernels`. Waits for the device: the GEMM
    needs its counts on the host.
    """
    ops, top_k = kernels.ops, routing.expert_NJ.shape[1]
    experts = gate_up_EDX.shape[0]
    if not x_ND.shape[0]:
        # A micro-batch that is all padding: kernels do not support products without rows. A product saves its factors,
        # as the kernels do: recomputation ends at the last tensor saved, and ranks that share experts end together.
        return x_ND * (1 + 0 * (gate_up_EDX.sum() + down_EFD.sum() + routing.weight_NJ.sum()))
    with torch.no_grad():
        bin_ids_M, indices_M = ops.sort(routing.expert_NJ.flatten().int(), max(experts - 1, 1).bit_length())
        # For a single expert it returns a number without a dimension.
        bins_E = ops.inclusive_cumsum(routing.load_E.int(), 0).view(experts)
        counts_E = routing.load_E.cpu()
    x_MD = ops.gather(x_ND, indices_M, bin_ids_M, bins_E, top_k)
    weight_M = routing.weight_NJ.flatten()[indices_M.long()]
    hidden_MF = weighted_swiglu(kernels.gmm(x_MD, gate_up_EDX, counts_E), weight_M)
    out_MD = kernels.gmm(hidden_MF, down_EFD, counts_E)
    out_ND: Tensor = ops.scatter(out_MD, indices_M, bin_ids_M, None, bins_E, top_k)
    return out_ND
