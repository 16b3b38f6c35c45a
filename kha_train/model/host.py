"""What the process is told of its device, and how tensors reach it without waiting."""

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
