"""What the process is told of its device, and how tensors reach it without waiting."""

# B rows   T places of a row   S document borders   R places of the flattened B * T that hold a token

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: Any) -> Tensor:
    """`tensor` on `device`. A plain copy to CUDA waits until all that was asked of the device is done; from pinned
    memory it takes its place in the queue."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def inputs_of(batch: Any, device: Any) -> tuple[Any, ...]:
    """What `Decoder.forward` reads of a batch, on the device and in its order. One without `real_R` has no padding."""
    samples_B, real_R = torch.from_numpy(batch.samples_B), getattr(batch, "real_R", None)
    tensors = (batch.tokens_BT, batch.labels_BT, batch.positions_BT, batch.cu_seqlens_S, samples_B, real_R)
    *first, samples_B, real_R = (None if tensor is None else to_device(tensor, device) for tensor in tensors)
    return *first, batch.max_seqlen, samples_B, real_R


def use_tensor_cores(dtype: torch.dtype) -> None:
    """Let a process whose parameters are bf16, and no other, multiply in TF32 where it multiplies in fp32: folds and
    router scores are products of bf16 numbers, which TF32 holds whole, with sums in fp32. The gradient of router scores
    is rounded."""
    torch.set_float32_matmul_precision("high" if dtype == torch.bfloat16 else "highest")


def spare_the_compiler(function: Callable[..., Any]) -> None:
    """Let a function that torch keeps away from its compiler be called without importing the compiler: seconds.

    torch imports it at the first call of such a function, only to say that it is not to be compiled. Where nobody else
    has imported it, nothing is compiled.
    """
    plain: Any = function.__wrapped__  # type: ignore[attr-defined]

    def call(*arguments: Any, **named: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return plain(*arguments, **named)
        if not hasattr(plain, "_kept_away"):
            plain._kept_away = sys.modules["torch._dynamo"].disable(plain)
        return plain._kept_away(*arguments, **named)

    plain.__dict__.setdefault("__dynamo_disable", call)
