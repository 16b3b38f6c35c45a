"""Process settings for its device, and copying tensors to it without waiting."""

# B rows   T places of a row   S document borders   R places of the flattened B * T that hold a token

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor


class HostBatch(Protocol):
    """What the decoder needs of a batch on the CPU: int64 tensors, `cu_seqlens_S` int32, `samples_B` numpy int64."""

    samples_B: np.ndarray

    @property
    def tokens_BT(self) -> Tensor:
        """The ids."""

    @property
    def labels_BT(self) -> Tensor:
        """The id after each token."""

    @property
    def positions_BT(self) -> Tensor:
        """The position of each token in its document or row."""

    @property
    def cu_seqlens_S(self) -> Tensor:
        """The borders of documents and rows."""

    @property
    def max_seqlen(self) -> int:
        """The length of the longest document."""

    @property
    def real_R(self) -> Tensor | None:
        """The places that hold a token; None when all do."""


class DecoderInputs(NamedTuple):
    """The first arguments of `Decoder.forward`, in its order and on its device."""

    tokens_BT: Tensor
    labels_BT: Tensor
    positions_BT: Tensor
    cu_seqlens_S: Tensor
    max_seqlen: int
    samples_B: Tensor
    real_R: Tensor | None


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. A plain copy to CUDA waits until the device has finished all its work; a copy from pinned
    memory is queued.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def inputs_of(batch: HostBatch, device: torch.device) -> DecoderInputs:
    """What `Decoder.forward` reads of a batch, on the device and in its order."""
    return DecoderInputs(
        to_device(batch.tokens_BT, device),
        to_device(batch.labels_BT, device),
        to_device(batch.positions_BT, device),
        to_device(batch.cu_seqlens_S, device),
        batch.max_seqlen,
        to_device(torch.from_numpy(batch.samples_B), device),
        None if batch.real_R is None else to_device(batch.real_R, device),
    )


def use_tensor_cores(dtype: torch.dtype) -> None:
    """If parameters are bf16, and only then, let the process use TF32 where it multiplies in fp32. Folds and router
    scores are products of bf16 numbers, which TF32 represents exactly, with sums in fp32. The gradient of router scores
    is rounded, and so are the matrices of Muon's iteration in fp32.
    """
    torch.set_float32_matmul_precision("high" if dtype == torch.bfloat16 else "highest")


def spare_the_compiler(function: Callable[..., Any]) -> None:
    """Call a function that torch excludes from compilation without importing the compiler, which takes seconds.

    torch imports the compiler at the first call of such a function, only to mark it as not compiled. If nobody else has
    imported it, nothing is compiled.
    """
    plain: Any = function.__wrapped__  # type: ignore[attr-defined]  # functools.wraps sets it

    def call(*arguments: Any, **named: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return plain(*arguments, **named)
        if not hasattr(plain, "_kept_away"):
            plain._kept_away = sys.modules["torch._dynamo"].disable(plain)
        return plain._kept_away(*arguments, **named)

    plain.__dict__.setdefault("__dynamo_disable", call)
