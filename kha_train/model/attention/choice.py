"""Reports how attention is computed, once, when a run starts, and checks a backend of CUDA on the device."""

# B batch   T tokens (U: attended tokens)   H query heads   G key/value heads   K, W key and value head width
# S document borders

from __future__ import annotations

import torch
from torch import Tensor

from kha_train.config.resolve import Resolved
from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError, Settings
from kha_train.model.attention.backends import BACKENDS, Backend, Documents, eager, lay_out_documents
from kha_train.model.device import DTYPES
from kha_train.variants.attention import FoldableOptions
from kha_train.variants.backends import TRAITS

CHECK_TOLERANCE = 3e-2
"""Largest relative error (Frobenius) allowed for half-precision outputs and gradients against fp32 maths in the first
check.
"""
CHECK_BORDERS = (0, 100, 256, 300, 512)
"""Document borders in the two rows of 256 tokens of that check."""


def announce(config: RunConfig, resolved: Resolved, device: torch.device) -> list[str]:
    """The start-up message about attention: backend, implementation, reasons, warnings. Checks a backend of CUDA first.
    Raises ConfigError when it computes wrong numbers here.
    """
    options, base, backend = config.attention.interaction, config.attention.base, resolved.backend
    lines = [f"attention {base.name} x {options.name} | backend {backend.name} ({backend.why})"]
    if "triton" in (config.engine.kernels, resolved.norm.name):
        lines[0] += f" | norm and rotation {resolved.norm.name} ({resolved.norm.why})"
    if isinstance(options, FoldableOptions):
        lines[0] += f" | interaction {resolved.interaction.name} ({resolved.interaction.why})"
    if TRAITS[backend.name].cuda:
        check_against_maths(config, backend.name, device, DTYPES[resolved.precision])
    return lines + [f"warning: {text}" for text in options.warnings()]


def check_against_maths(config: RunConfig, name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Compare the backend `name` with the formula in fp32, forward and backward, on heads of the run's shape: some
    releases of cuDNN silently computed wrong numbers. Checks whole rows, and rows of documents if the run isolates
    them. Raises ConfigError when they disagree.
    """
    q_BTHK, k_BTGK, v_BTGW = inputs = attention_inputs(config, 2, 256, device, dtype)
    for borders in (None, CHECK_BORDERS) if config.data.isolate_documents else (None,):
        borders_S = None if borders is None else torch.tensor(borders, dtype=torch.int32, device=device)
        documents = lay_out_documents(2, 256, device, borders_S, masked=not TRAITS[name].packed)
        results = [_outputs_and_gradients(BACKENDS[name], inputs, documents)]
        documents = lay_out_documents(2, 256, device, borders_S)
        results.append(_outputs_and_gradients(eager, (q_BTHK.float(), k_BTGK.float(), v_BTGW.float()), documents))
        rows = "whole rows" if borders is None else "rows of documents"
        for part, found, expected in zip(("output", "gradient of q", "of k", "of v"), *results, strict=True):
            error = ((found.float() - expected).norm() / expected.norm()).item()
            if not error < CHECK_TOLERANCE:
                raise ConfigError(
                    f"computes wrong numbers on {_name(device)}, {rows}: {part} is off by {error:.2g}",
                    field="attention.backend",
                    value=name,
                    fix=Settings("attention.backend=sdpa"),
                )


def attention_inputs(
    config: RunConfig, rows: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values with the run's heads, [rows, tokens, heads, width]."""
    shape, base = config.attention.base.heads(), config.attention.base
    key_width = base.kernel_width()
    sizes = [(shape.query_heads, key_width), (shape.kv_heads, key_width), (shape.kv_heads, shape.value_width)]
    generator = torch.Generator().manual_seed(0)
    q_BTHK, k_BTGK, v_BTGW = (
        torch.randn(rows, tokens, heads, width, generator=generator).to(device, dtype) for heads, width in sizes
    )
    return q_BTHK, k_BTGK, v_BTGW


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _outputs_and_gradients(
    backend: Backend, inputs: tuple[Tensor, Tensor, Tensor], documents: Documents
) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    out = backend(q, k, v, documents, q.shape[-1] ** -0.5)
    return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]
